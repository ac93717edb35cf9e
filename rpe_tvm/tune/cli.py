"""Command line of the tuning scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpe_tvm import targets
from rpe_tvm.build.workloads import TUNED
from rpe_tvm.errors import RpeTvmError
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.targets import TargetSpec
from rpe_tvm.tune.options import numbers
from rpe_tvm.tune.session import Run, tune


@dataclass(frozen=True)
class Preset:
    """Lengths, features and budgets of one kind of run."""

    lengths: tuple[int, ...]
    features: tuple[int, ...]
    trials: int
    seconds: float


PRESETS = {
    "quick": Preset((1024, 4096), (32,), 8, 90.0),
    "default": Preset((512, 1024, 2048, 4096, 8192, 16384), (16, 32, 64), 16, 180.0),
    "thorough": Preset((256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384), (16, 24, 32, 64), 64, 1200.0),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the tuning scripts' options."""
    options = argparse.ArgumentParser(
        description="Measure which algorithm and factorisation is fastest at which length on this CPU, tune its "
        "schedule with MetaSchedule, and add the result to the tuning logs that the package uses."
    )
    options.add_argument("--op", choices=TUNED, default=AttentionConfig.op, help="what to tune (default attention)")
    options.add_argument("--preset", choices=PRESETS, default="default", help="lengths, features and budgets")
    options.add_argument("--lengths", type=numbers, help="sequence lengths, as 512,1024")
    options.add_argument("--features", type=numbers, help="numbers of features m, as 16,32")
    options.add_argument("--head-dim", type=int, default=64, help="channels d of a head (default 64)")
    options.add_argument("--trials", type=int, help="candidates of MetaSchedule for each length and m")
    options.add_argument("--seconds", type=float, help="time of MetaSchedule for each length and m")
    options.add_argument("--threads", type=int, default=2, help="OpenMP threads to time with (default 2)")
    options.add_argument("--resume", action="store_true", help="go on with the run in --work-dir")
    options.add_argument("--work-dir", type=Path, default=Path("tuning_work"), help="databases (default tuning_work)")
    options.add_argument(
        "--logs", type=Path, default=wisdom.LOGS, help="tuning logs to add to (default: the package's)"
    )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Tune for this machine; returns 1 with one message where nothing valid came out, 130 where interrupted."""
    options = parser().parse_args(argv)
    return finish(lambda: run_of(options, targets.detect()), resume=options.resume)


def run_of(options: argparse.Namespace, target: TargetSpec) -> Run:
    """Return the run that the options ask for."""
    preset = PRESETS[options.preset]
    return Run(
        op=options.op,
        target=target,
        lengths=options.lengths or preset.lengths,
        features=options.features or preset.features,
        head_dim=options.head_dim,
        trials=preset.trials if options.trials is None else options.trials,
        seconds=preset.seconds if options.seconds is None else options.seconds,
        threads=options.threads,
        work_dir=options.work_dir.resolve(),
        logs=options.logs.resolve(),
    )


def finish(make: Callable[[], Run], *, resume: bool) -> int:
    """Make a run and tune; returns the exit status."""
    try:
        run = make()
        print(
            f"Tuning {run.op} for {run.target.id} on {run.place.device['device']} with {run.threads} threads: "
            f"{len(run.pairs)} pairs of length and features",
            flush=True,
        )
        tune(run, resume=resume)
    except RpeTvmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Finished records are kept; go on with --resume.", file=sys.stderr)
        return 130
    if run.place.device.get(wisdom.EMULATED):
        print(f"Logs: {run.log}. Times of an emulator mean nothing: these logs are for a look, and refused otherwise.")
    else:
        print(f"Logs: {run.log}. See them with: python -m rpe_tvm info")
    return 0
