"""Orders algorithms and schedules for a CPU by the cost of their compiled code, where there is no board to time them.

python scripts/static_cost.py --target cortex-a72 --lengths 512,2048
python scripts/static_cost.py --target cpu --lengths 1024 --measure     # and how it agrees with times, on this machine
python scripts/static_cost.py --write               # the tables of all ARM targets, tuning_logs/<target>/static.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import tvm
from tvm.s_tir import Schedule

from rpe_tvm import arm_targets, targets
from rpe_tvm.build.workloads import TUNING_HEADS, tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.files import write_json
from rpe_tvm.plan import static_rates
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec, to_tvm
from rpe_tvm.tune import inputs, static_cost
from rpe_tvm.tune.builder import build_schedules
from rpe_tvm.tune.measure import Contestant, measure
from rpe_tvm.tune.static_table import candidates, describe, loops_of, table


def main() -> None:
    """Print the candidates of each length, the cheapest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="as of python -m rpe_tvm compile (default: cortex-a72; all with --write)")
    parser.add_argument("--lengths", default="512,2048", help="default: %(default)s")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--measure", action="store_true", help="time the candidates, too; the target must be this CPU")
    parser.add_argument("--write", action="store_true", help="write the table that the plan reads; takes minutes")
    args = parser.parse_args()
    if args.write:
        write([args.target] if args.target else sorted(arm_targets.PRESETS))
        return
    target = targets.preset(args.target or "cortex-a72")
    if not isinstance(target, TargetSpec):
        parser.error(f"argument --target: expected a CPU, got {args.target}")
    if args.measure and target != targets.detect():
        parser.error(f"argument --measure: expected this machine's CPU, {targets.detect().id}, got {target.id}")
    for n in map(int, args.lengths.split(",")):
        length = bucket_length(n)
        found = []
        for config, choices in candidates(target, length, args.features, args.head_dim):
            label = describe(config, choices)
            try:
                loops = loops_of(config, choices, target)
                cost = static_cost.cost(config, loops, static_cost.core_of(target.mcpu))
                sch = Schedule(tuning_workload(config))
                schedules_of(target.machine).schedule(sch, config, choices)
                found.append((cost, label, config, sch))
            except TuningError as error:
                print(f"  {label}: left out. {error}")
        found.sort(key=lambda entry: entry[0])
        times = timed(target, [(config, sch) for _, _, config, sch in found]) if args.measure else []
        print(f"n={length} m={args.features} d={args.head_dim} {target.id}: million cycles of one head")
        for number, (cost, label, *_) in enumerate(found):
            print(f"  {cost / 1e6:8.2f}  {label}" + (f"  {1e3 * times[number]:.2f} ms" if times else ""))
        if times:
            print(f"  rank correlation {rank_correlation([cost for cost, *_ in found], times):.2f}")


def write(names: list[str]) -> None:
    """Write the tables of targets; two names of one CPU share one."""
    for target in {targets.preset(name).id: targets.preset(name) for name in names}.values():
        path = static_rates.path_of(target.id)
        write_json(path, table(target))
        print(f"wrote {path}", flush=True)


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
