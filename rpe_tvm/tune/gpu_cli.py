"""Command line of tuning for NVIDIA GPUs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rpe_tvm import gpu_targets
from rpe_tvm.errors import RpeTvmError
from rpe_tvm.plan import gpu_choice, wisdom
from rpe_tvm.tune.gpu_candidates import Size
from rpe_tvm.tune.gpu_session import Run, build, race
from rpe_tvm.tune.gpu_work import Work
from rpe_tvm.tune.options import numbers

# What is tuned where nothing else is asked for.
LENGTHS: dict[str, tuple[int, ...]] = {
    "float32": (512, 1024, 2048, 4096, 8192, 16384, 65536),
    "bfloat16": (1024, 2048, 4096, 16384, 32768, 65536),
    "float16": (),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the script's options."""
    options = argparse.ArgumentParser(
        description="Measure which config of attention is fastest at which length and dtype on this machine's GPU, and "
        "add the result to the tuning logs that the package uses. Building and racing can be done on two machines."
    )
    options.add_argument("--lengths", type=numbers, help="sequence lengths of all --dtypes (default: some for each)")
    options.add_argument(
        "--dtypes",
        type=_dtypes,
        default=("float32", "bfloat16"),
        help="as float32,bfloat16,float16 (default: the first two)",
    )
    options.add_argument("--features", type=numbers, default=(32,), help="numbers of features m (default 32)")
    options.add_argument("--head-dim", type=int, default=64, help="channels d of a head (default 64)")
    options.add_argument("--seconds", type=float, default=120.0, help="time of all races together (default 120)")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options.add_argument("--target", default="cuda", help="cuda (this machine's GPU, the default), or as sm_90")
    options.add_argument("--resume", action="store_true", help="go on with the races in --work-dir")
    options.add_argument(
        "--work-dir", type=Path, default=Path("tuning_work_cuda"), help="candidates and results (tuning_work_cuda)"
    )
    options.add_argument(
        "--logs", type=Path, default=wisdom.LOGS, help="tuning logs to add to (default: the package's)"
    )
    part = options.add_mutually_exclusive_group()
    part.add_argument("--build-only", action="store_true", help="compile the candidates; needs no GPU")
    part.add_argument("--race-only", action="store_true", help="race what was built; needs neither TVM nor nvcc")
    return options


def _dtypes(text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    if not set(values) <= set(LENGTHS):
        raise argparse.ArgumentTypeError(f"expected dtypes of {', '.join(LENGTHS)}, got {text}")
    return values


def sizes(options: argparse.Namespace) -> tuple[Size, ...]:
    """Return the races that the options ask for, of the lengths' buckets; a size without a kernel is a ValueError."""
    found = []
    for dtype in options.dtypes:
        for n in options.lengths or LENGTHS[dtype] or LENGTHS["bfloat16"]:
            for num_features in options.features:
                gpu_choice.rule(n, num_features, options.head_dim, dtype)
                found.append(Size(dtype, gpu_choice.bucket(n, dtype), num_features, options.head_dim))
    return tuple(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Build, race, or both; returns 1 with one message where nothing valid came out, 130 where interrupted."""
    line = parser()
    options = line.parse_args(argv)
    try:
        wanted = sizes(options)
    except ValueError as error:
        line.error(str(error))
    try:
        run = Run(
            target=gpu_targets.preset(options.target),
            sizes=wanted,
            seconds=options.seconds,
            workers=options.workers,
            work=Work(options.work_dir.resolve()),
            logs=options.logs.resolve(),
        )
        print(f"Tuning for {run.target.id}: {len(run.sizes)} sizes", flush=True)
        if not options.race_only:
            build(run)
        if not options.build_only:
            race(run, resume=options.resume)
            print(f"Logs: {run.logs / run.target.id}")
    except RpeTvmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept; go on with --resume.", file=sys.stderr)
        return 130
    return 0
