"""Orders algorithms and schedules for a CPU by the cost of their compiled code, where there is no board to time them.

python scripts/static_cost.py --target cortex-a72 --lengths 512,2048
python scripts/static_cost.py --target cpu --lengths 1024 --measure     # and how it agrees with times, on this machine
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import tvm
from tvm.s_tir import Schedule

from rpe_tvm import targets
from rpe_tvm.build.workloads import TUNING_HEADS, tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec, to_tvm
from rpe_tvm.tune import inputs, static_cost
from rpe_tvm.tune.assembly import assembly_of, innermost_loops
from rpe_tvm.tune.builder import build_schedules
from rpe_tvm.tune.measure import Contestant, measure

# Of tiles: rows and vectors of the output that are summed in registers.
REGISTER_BLOCKS = ((1, 1), (2, 2), (4, 1), (4, 4), (8, 2))


def main() -> None:
    """Print the candidates of each length, the cheapest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cortex-a72", help="as of python -m rpe_tvm compile (default: %(default)s)")
    parser.add_argument("--lengths", default="512,2048", help="default: %(default)s")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--measure", action="store_true", help="time the candidates, too; the target must be this CPU")
    args = parser.parse_args()
    target = targets.preset(args.target)
    if not isinstance(target, TargetSpec):
        parser.error(f"argument --target: expected a CPU, got {args.target}")
    if args.measure and target != targets.detect():
        parser.error(f"argument --measure: expected this machine's CPU, {targets.detect().id}, got {target.id}")
    for n in map(int, args.lengths.split(",")):
        length = bucket_length(n)
        found = []
        for config, choices in candidates(target, length, args.features, args.head_dim):
            sch = Schedule(tuning_workload(config))
            schedules_of(target.machine).schedule(sch, config, choices)
            function = sch.mod["main"].with_attr("global_symbol", "attention")
            label = describe(config, choices)
            try:
                loops = innermost_loops(assembly_of(function, target))
                found.append((static_cost.cost(config, loops, static_cost.core_of(target.mcpu)), label, config, sch))
            except TuningError as error:
                print(f"  {label}: left out. {error}")
        found.sort(key=lambda entry: entry[0])
        times = timed(target, [(config, sch) for _, _, config, sch in found]) if args.measure else []
        print(f"n={length} m={args.features} d={args.head_dim} {target.id}: million cycles of one head")
        for number, (cost, label, *_) in enumerate(found):
            print(f"  {cost / 1e6:8.2f}  {label}" + (f"  {1e3 * times[number]:.2f} ms" if times else ""))
        if times:
            print(f"  rank correlation {rank_correlation([cost for cost, *_ in found], times):.2f}")


def candidates(
    target: TargetSpec, length: int, num_features: int, head_dim: int
) -> Iterator[tuple[AttentionConfig, Choices]]:
    """Yield tiles with several register blocks, and FFTs with several factorisations."""
    schedules = schedules_of(target.machine)
    direct = wisdom.direct_config(num_features, head_dim, length, target.lanes)
    for rows, vectors in REGISTER_BLOCKS:
        if (head_dim // target.lanes) % vectors == 0:
            yield direct, replace(schedules.default_choices(direct), row_block=rows, vectors=vectors)
    for largest in (8, 5):
        for lanes in sorted({target.lanes, 8}):
            config = wisdom.fft_config(num_features, head_dim, length, lanes, largest)
            yield config, schedules.default_choices(config)


def describe(config: AttentionConfig, choices: Choices) -> str:
    """Return a short name of a candidate."""
    if config.algorithm == "fft":
        return f"{config.description}, {config.lanes} lanes"
    return f"{config.description}, {choices.row_block} rows of {choices.vectors} vectors"


def timed(target: TargetSpec, entrants: list[tuple[AttentionConfig, Schedule]]) -> list[float]:
    """Return the best seconds of each candidate on this machine, on one thread."""
    tvm_target = tvm.target.Target({**to_tvm(target).export(), "num-cores": 1})
    libraries = build_schedules([sch for _, sch in entrants], tvm_target, 1)
    failed = [str(each) for each in libraries if not isinstance(each, Path)]
    if failed:
        raise TuningError(f"A candidate was not built: {failed[0]}")
    with tempfile.TemporaryDirectory() as scratch:
        contestants = []
        for number, (library, (config, _)) in enumerate(zip(libraries, entrants, strict=True)):
            file = Path(scratch) / f"{number}.npz"
            inputs.save(config, TUNING_HEADS, file)
            contestants.append(Contestant(library, file))
        timings = measure(contestants, 1, 2.0, 600.0)
    return [timing.best for timing in timings]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Return Spearman's rank correlation."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == "__main__":
    main()
