"""Command line of tuning for GPUs."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpe_tvm import targets
from rpe_tvm.errors import BuildError, RpeTvmError
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.plan import gpu_choice, wisdom
from rpe_tvm.tune.gpu_candidates import Size
from rpe_tvm.tune.gpu_place import GpuPlace, ThisGpu
from rpe_tvm.tune.gpu_remote import RemoteGpu
from rpe_tvm.tune.gpu_session import Run, build, race
from rpe_tvm.tune.gpu_work import Work
from rpe_tvm.tune.options import address, numbers
from rpe_tvm.tune.sessions import Connection


@dataclass(frozen=True)
class Vendor:
    """Whose GPUs a script tunes for.

    Parameters
    ----------
    kind : str
        TVM's kind of target.
    lengths : dict
        dtype that there are kernels for -> lengths to tune where nothing else is asked for; () stands for bfloat16's.
    dtypes : tuple of str
        dtypes to tune where nothing else is asked for.
    target : str
        Target where nothing else is asked for.
    example : str
        Another target, for the help.
    """

    kind: str
    lengths: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]
    target: str
    example: str


NVIDIA = Vendor(
    "cuda",
    {
        "float32": (512, 1024, 2048, 4096, 8192, 16384, 65536),
        "bfloat16": (1024, 2048, 4096, 16384, 32768, 65536),
        "float16": (),
    },
    ("float32", "bfloat16"),
    "cuda",
    "sm_90",
)
AMD = Vendor("rocm", {"float32": (512, 1024, 2048, 4096, 8192, 16384, 32768)}, ("float32",), "gfx942", "gfx1100")


def parser(vendor: Vendor = NVIDIA) -> argparse.ArgumentParser:
    """Return the parser of the script's options."""
    options = argparse.ArgumentParser(
        description="Measure which config of attention is fastest at which length and dtype on a GPU, and "
        "add the result to the tuning logs that the package uses. Building and racing can be done on two machines."
    )
    options.add_argument("--lengths", type=numbers, help="sequence lengths of all --dtypes (default: some for each)")
    options.add_argument(
        "--dtypes",
        type=functools.partial(_dtypes, tuple(vendor.lengths)),
        default=vendor.dtypes,
        help=f"of {','.join(vendor.lengths)} (default: {','.join(vendor.dtypes)})",
    )
    options.add_argument("--features", type=numbers, default=(32,), help="numbers of features m (default 32)")
    options.add_argument("--head-dim", type=int, default=64, help="channels d of a head (default 64)")
    options.add_argument("--seconds", type=float, default=120.0, help="time of all races together (default 120)")
    options.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options.add_argument(
        "--target",
        type=functools.partial(_target, vendor),
        default=vendor.target,
        help=f"what to compile for: {vendor.target} (the default), or as {vendor.example}; cuda is this machine's GPU",
    )
    options.add_argument("--resume", action="store_true", help="go on with the races in --work-dir")
    options.add_argument(
        "--work-dir",
        type=Path,
        default=Path(f"tuning_work_{vendor.kind}"),
        help="candidates and results (default: %(default)s)",
    )
    options.add_argument(
        "--logs", type=Path, default=wisdom.LOGS, help="tuning logs to add to (default: the package's)"
    )
    if vendor is AMD:
        options.add_argument("--tracker", type=address, metavar="HOST:PORT", help="race behind TVM's RPC tracker")
        options.add_argument("--key", help="key of the GPU's server there")
        options.add_argument("--wait", type=float, default=300.0, help="seconds to wait for that server (default 300)")
        options.add_argument(
            "--timeout",
            type=float,
            default=600.0,
            help="seconds that a race may take besides (default 600)",
        )
    part = options.add_mutually_exclusive_group()
    part.add_argument("--build-only", action="store_true", help="compile the candidates; needs no GPU")
    part.add_argument("--race-only", action="store_true", help="race what was built; needs neither TVM nor a compiler")
    return options


def _dtypes(known: tuple[str, ...], text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    if not set(values) <= set(known):
        raise argparse.ArgumentTypeError(f"expected dtypes of {', '.join(known)}, got {text}")
    return values


def _target(vendor: Vendor, name: str) -> GpuTargetSpec:
    try:
        found = targets.preset(name)
    except BuildError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(found, GpuTargetSpec) or found.kind != vendor.kind:
        raise argparse.ArgumentTypeError(f"expected {vendor.target}, or one as {vendor.example}, got {name}")
    return found


def sizes(options: argparse.Namespace, vendor: Vendor = NVIDIA) -> tuple[Size, ...]:
    """Return the races that the options ask for, of the lengths' buckets; a size without a kernel is a ValueError."""
    found = []
    for dtype in options.dtypes:
        for n in options.lengths or vendor.lengths[dtype] or vendor.lengths["bfloat16"]:
            for num_features in options.features:
                gpu_choice.rule(n, num_features, options.head_dim, dtype, options.target.id)
                found.append(Size(dtype, gpu_choice.bucket(n, dtype), num_features, options.head_dim))
    return tuple(dict.fromkeys(found))


def _place(line: argparse.ArgumentParser, options: argparse.Namespace) -> GpuPlace:
    """Where to race."""
    if (options.tracker is None) != (options.key is None):
        line.error("arguments --tracker and --key: expected both or none of them")
    if options.tracker is None:
        return ThisGpu()
    host, port = options.tracker
    return RemoteGpu(Connection(host, port, options.key, options.wait), options.timeout)


def main(argv: Sequence[str] | None = None, vendor: Vendor = NVIDIA) -> int:
    """Build, race, or both; returns 1 with one message where nothing valid came out, 130 where interrupted."""
    line = parser(vendor)
    options = line.parse_args(argv)
    try:
        wanted = sizes(options, vendor)
    except ValueError as error:
        line.error(str(error))
    try:
        run = Run(
            target=options.target,
            sizes=wanted,
            seconds=options.seconds,
            workers=options.workers,
            work=Work(options.work_dir.resolve()),
            logs=options.logs.resolve(),
            place=_place(line, options) if vendor is AMD else ThisGpu(),
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
