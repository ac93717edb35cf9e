"""The command line: ``python -m rpe_tvm info | compile | package | verify | bench | cache | tuning``, also installed as
``rpe-tvm``."""

from __future__ import annotations

import argparse
import datetime
import functools
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rpe_tvm import (
    __version__,
    arm_targets,
    bench,
    bench_cuda,
    bench_cuda_toeplitz,
    bench_cuda_train,
    bench_toeplitz,
    bench_train,
)
from rpe_tvm.errors import BuildError, RpeTvmError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 after a message on stderr, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except RpeTvmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rpe-tvm",
        description="Attention with relative positional encoding in O(n log n), compiled and tuned with TVM.",
    )
    parser.add_argument("--version", action="version", version=f"rpe_tvm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show versions, the target, the cache and the tuned records")
    info.set_defaults(run=_info)

    compiling = commands.add_parser("compile", help="compile operators into a directory to ship")
    compiling.add_argument(
        "--op",
        choices=["attention", "backward", "toeplitz"],
        default="attention",
        help="operator; backward: the gradients of attention, for training (default: %(default)s)",
    )
    compiling.add_argument("--features", type=_positive, default=32, metavar="M", help="default: %(default)s")
    compiling.add_argument("--head-dim", type=_positive, default=64, metavar="D", help="default: %(default)s")
    compiling.add_argument(
        "--lengths",
        type=_lengths,
        required=True,
        metavar="N,N,...",
        help="longest sequences to serve; each is rounded up to a length that transforms well",
    )
    compiling.add_argument(
        "--target",
        default="cpu",
        metavar="TARGET",
        help="cpu (on x86 also x86) for this machine's CPU, or LLVM's name of one: haswell, skylake-avx512, znver4, "
        f"..., {', '.join(arm_targets.PRESETS)}; cuda for this machine's GPU (sm_90 if there is none), or sm_80, "
        "sm_90, ...; gfx90a, gfx942, gfx1100, gfx1201 for AMD's GPUs (default: %(default)s)",
    )
    compiling.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of query, key and value on a GPU; others than float32 run on tensor cores (default: %(default)s)",
    )
    compiling.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    compiling.set_defaults(run=_compile, error=compiling.error)

    packaging = commands.add_parser("package", help="compile attention for devices without Python, into one archive")
    packaging.add_argument("--op", choices=["attention"], default="attention", help="operator (default: %(default)s)")
    packaging.add_argument("--features", type=_positive, default=32, metavar="M", help="default: %(default)s")
    packaging.add_argument("--head-dim", type=_positive, default=64, metavar="D", help="default: %(default)s")
    packaging.add_argument("--lengths", type=_lengths, required=True, metavar="N,N,...", help="as of compile")
    packaging.add_argument(
        "--target",
        required=True,
        metavar="TARGET,TARGET,...",
        help="CPUs to compile for, as of compile; a device takes the variant that uses most of its CPU",
    )
    packaging.add_argument(
        "--threads",
        choices=["openmp", "none"],
        default="openmp",
        help="none: one thread, for devices that have no libgomp (default: %(default)s)",
    )
    packaging.add_argument("--out", type=Path, required=True, metavar="FILE", help="the archive, such as bundle.tar.gz")
    packaging.set_defaults(run=_package, error=packaging.error)

    verifying = commands.add_parser("verify", help="check a bundle: hashes, what runs on this machine, numbers")
    verifying.add_argument("bundle", type=Path, metavar="BUNDLE", help="an archive, or where it was unpacked to")
    verifying.set_defaults(run=_verify)

    benchmark = commands.add_parser("bench", help="time the operator against its peers, on checked results")
    bench.add_arguments(benchmark)
    benchmark.set_defaults(run=_bench, error=benchmark.error)

    cache = commands.add_parser("cache", help="look into the cache of compiled libraries")
    actions = cache.add_subparsers(title="actions", required=True, metavar="ACTION")
    for name, action, description in (
        ("path", _cache_path, "print its directory"),
        ("list", _cache_list, "list the libraries in it"),
        ("clear", _cache_clear, "remove everything from it"),
    ):
        actions.add_parser(name, help=description, description=description).set_defaults(run=action)

    tuning = commands.add_parser("tuning", help="work with the tuning records that come with the package")
    actions = tuning.add_subparsers(title="actions", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="check that every record is found and replays")
    verify.set_defaults(run=_tuning_verify)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))


def _info(args: argparse.Namespace) -> int:
    def show(name: str, value: str) -> None:
        print(f"{name:<16}{value}")

    show("rpe_tvm", __version__)
    show("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("apache-tvm", "apache-tvm-ffi", "numpy", "torch"):
        show(package, _version(package))
    try:
        from rpe_tvm import build, targets
        from rpe_tvm.build import cache, link, nvcc
        from rpe_tvm.plan import backward, static_rates, wisdom
    except RpeTvmError as error:
        # Without TVM, or with a version that does not work, compiled libraries still run.
        print(f"\nNothing can be compiled here: {error}")
        return 0
    assert build is not None
    try:
        show("compiler", shlex.join(link.find_compiler()))
    except RpeTvmError as error:
        show("compiler", f"none: {error}")
    try:
        show("nvcc", f"{nvcc.find()} {nvcc.version()}")
    except RpeTvmError as error:
        show("nvcc", f"none: {error}")
    found = cache.entries()
    show("cache", f"{cache.root()} ({len(found)} libraries, {_size(sum(entry.bytes for entry in found))})")
    target = targets.detect()
    show("target", f"{target.id}, {target.lanes} float32 lanes")
    show("cpu features", " ".join(target.features))
    _show_gpus(show)
    records = [*wisdom.records(target.id), *wisdom.records(target.id, backward.BackwardConfig)]
    show("tuned records", f"{len(records)} for {target.id}")
    for record in records:
        print(
            f"  {record.config.name:<26} {record.config.description:<20} {record.ms:.2f} ms "
            f"(default schedule: {record.default_ms:.2f} ms)"
        )
    if not records:
        counted = static_rates.rates(target.id) is not None
        print(
            f"  {'Static choices and default' if counted else 'Default'} schedules are used. To tune for this CPU: "
            f"python scripts/tune_{'arm' if counted else 'x86'}.py"
        )
    show("static choices", "by cycles counted in compiled code, not measured, for")
    print(f"  {' '.join(static_rates.targets())}")
    return 0


def _show_gpus(show: Callable[[str, str], None]) -> None:
    from rpe_tvm.gpu_targets import DEFAULT_ARCH
    from rpe_tvm.plan import gpu_wisdom
    from rpe_tvm.runtime.gpu import gpus

    try:
        found = gpus()
    except RpeTvmError as error:
        show("gpu", f"none; --target cuda compiles for {DEFAULT_ARCH}. {error}")
        return
    for index, gpu in enumerate(found):
        show(
            f"gpu {index}", f"cuda-{gpu.arch}, {gpu.name}, {gpu.shared_bytes // 1024} KiB of shared memory for a block"
        )
    for target_id in sorted({f"cuda-{gpu.arch}" for gpu in found}):
        show("tuned records", f"{len(gpu_wisdom.records(target_id))} for {target_id}")


def _compile(args: argparse.Namespace) -> int:
    from rpe_tvm import build, targets
    from rpe_tvm.build import manifest
    from rpe_tvm.gpu_targets import GpuTargetSpec
    from rpe_tvm.plan import backward, gpu_backward_choice, gpu_choice, gpu_toeplitz, toeplitz, wisdom

    target = targets.preset(args.target)

    def choose(n: int) -> Any:
        if isinstance(target, GpuTargetSpec):
            try:
                if args.op == "toeplitz":
                    return gpu_toeplitz.choose(n, args.head_dim, target.shared_bytes)
                if args.op == "backward":
                    return gpu_backward_choice.choose(n, args.features, args.head_dim, args.dtype, target.shared_bytes)
                return gpu_choice.choose(n, args.features, args.head_dim, args.dtype, target.id)
            except ValueError as error:
                raise BuildError(str(error)) from error
        if args.op == "toeplitz":
            return toeplitz.choose(target.id, n, args.head_dim, target.lanes)
        if args.op == "backward":
            return backward.choose(target.id, n, args.features, args.head_dim, target.lanes)
        return wisdom.choose(target.id, n, args.features, args.head_dim, target.lanes)

    if args.dtype != "float32" and args.op == "toeplitz":
        args.error(f"argument --dtype: expected float32 for --op toeplitz, which computes in that, got {args.dtype}")
    if args.dtype != "float32" and not isinstance(target, GpuTargetSpec):
        args.error(f"argument --dtype: expected float32 for a CPU, which computes in that, got {args.dtype}")
    configs = [choose(n) for n in args.lengths]
    for config in sorted(set(configs), key=lambda each: each.length):
        start = time.perf_counter()
        path = build.export(config, target, args.out)
        contents = manifest.read(path)
        print(
            f"{path / contents['library']['file']}  {_size(contents['library']['bytes'])}  {config.description}, "
            f"{contents['schedule']['source']} schedule  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    return 0


def _package(args: argparse.Namespace) -> int:
    from rpe_tvm import edge, targets
    from rpe_tvm.gpu_targets import GpuTargetSpec
    from rpe_tvm.plan import wisdom

    configs = {}
    for name in args.target.split(","):
        target = targets.preset(name)
        if isinstance(target, GpuTargetSpec):
            raise BuildError(
                f"A bundle is for CPUs, got the target {name}. For GPUs: python -m rpe_tvm compile --out DIR"
            )
        chosen = {wisdom.choose(target.id, n, args.features, args.head_dim, target.lanes) for n in args.lengths}
        configs[target] = sorted(chosen, key=lambda config: config.length)
    packed = edge.package(configs, args.out, args.threads)
    for variant in packed.contents.variants:
        host = packed.host_bytes[variant.target]
        print(f"{variant.target}: glibc {variant.glibc}, threads {variant.threads}, C host {_size(host)}")
        for each in variant.libraries:
            tables = "" if each.tables is None else f" + tables {_size(each.tables.size)}"
            print(
                f"  n <= {each.length:<8} {each.algorithm:<7}{each.schedule} schedule  "
                f"library {_size(each.file.size)}{tables}; with host {_size(each.file.size + host)}"
            )
    print(f"{packed.path}  {_size(packed.path.stat().st_size)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from rpe_tvm import edge

    report = edge.verify(args.bundle)
    found = report.contents
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    print(f"{found.op}, {found.num_features} features, head_dim {found.head_dim}; made with {versions}")
    print(f"{report.files} files, all with the SHA-256 of SHA256SUMS")
    for variant in found.variants:
        if variant.target in report.refusals:
            print(f"{variant.target}: does not run here: {report.refusals[variant.target]}")
        elif variant.target != report.taken:
            print(f"{variant.target}: runs here; not taken, because {report.taken} uses more of this CPU")
        else:
            print(f"{variant.target}: runs here and is taken")
            for each in variant.libraries:
                error = report.errors[each.length]
                print(f"  n <= {each.length:<8} {each.algorithm:<7}{each.schedule} schedule  error {error:.1e}")
    if not report.is_good:
        reason = "no variant runs here" if report.taken is None else "the numbers are wrong"
        print(f"error: {reason}", file=sys.stderr)
    return 0 if report.is_good else 1


def _bench(args: argparse.Namespace) -> int:
    if args.target != "cuda" and args.dtypes not in (None, ("float32",)):
        args.error(f"argument --dtypes: expected --target cuda for {','.join(args.dtypes)}, got --target {args.target}")
    if args.target == "cuda" and args.lengths is None:
        if args.op == "toeplitz":
            args.lengths = bench_cuda_toeplitz.LENGTHS
        elif args.mode == "train":
            args.lengths = bench_cuda_train.LENGTHS
    dtypes = args.dtypes
    bench.fill_in(args)
    if args.target == "cuda":
        for option, value in (("--threads", args.threads), ("--memory-lengths", args.memory_lengths)):
            if value is not None:
                args.error(f"argument {option}: expected --target x86, got --target cuda; leave one of them out")
        if args.op == "toeplitz":
            if dtypes not in (None, ("float32",)):
                args.error(f"argument --dtypes: expected float32 for --op toeplitz, got {','.join(dtypes)}")
            if args.mode == "train" or args.plot is not None or args.causal:
                args.error("argument --op: toeplitz has no --mode train (its rows have both), --plot and --causal")
            return bench_cuda_toeplitz.main(args)
        if args.mode == "train":
            if args.plot is not None:
                args.error("argument --plot: expected --mode forward or --target x86; leave it out")
            return bench_cuda_train.main(args, functools.partial(_describe_gpu_training, args))
        return bench_cuda.main(args, functools.partial(_describe_gpu, args))
    if args.mode != "train" and args.memory_lengths is not None:
        args.error("argument --memory-lengths: expected --mode train, which measures memory, got --mode forward")
    if args.op == "toeplitz":
        if args.mode == "train":
            args.error("argument --mode: train expects --op attention, got --op toeplitz; leave one of them out")
        return bench_toeplitz.main(args)
    if args.mode == "train":
        return bench_train.main(args, functools.partial(_describe_training, args))
    return bench.main(args, functools.partial(_describe, args))


def _describe(args: argparse.Namespace, n: int) -> str:
    from rpe_tvm import torch

    return torch.describe(n, args.features, args.head_dim)


def _describe_gpu(args: argparse.Namespace, n: int, dtype: str) -> str:
    from rpe_tvm.plan import gpu_choice
    from rpe_tvm.torch import dispatch

    size = n, args.features, args.head_dim
    kernel = dtype if gpu_choice.is_direct(*size, dtype) else "float32"  # what has no kernel is converted
    return dispatch.get_gpu_operator(0, *size, kernel).config.description


def _describe_gpu_training(args: argparse.Namespace, n: int, dtype: str) -> str:
    from rpe_tvm.plan import gpu_backward_choice
    from rpe_tvm.torch import dispatch

    size = n, args.features, args.head_dim
    kernel = dtype if gpu_backward_choice.is_direct(*size[1:], dtype) else "float32"
    return f"{_describe_gpu(args, n, dtype)}, {dispatch.get_gpu_backward(0, *size, kernel).config.description}"


def _describe_training(args: argparse.Namespace, n: int) -> str:
    """Both algorithms, such as "direct 128x64, fft 8.8x8.4": those of forward and backward may differ."""
    from rpe_tvm.torch import dispatch

    backward = dispatch.get_backward(n, args.features, args.head_dim).config.description
    return f"{_describe(args, n)}, {backward}"


def _cache_path(args: argparse.Namespace) -> int:
    from rpe_tvm.build import cache

    print(cache.root())
    return 0


def _cache_list(args: argparse.Namespace) -> int:
    from rpe_tvm.build import cache

    found = cache.entries()
    for entry in found:
        date = datetime.datetime.fromtimestamp(entry.modified).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.name:<28} {entry.target:<24} {_size(entry.bytes):>10}  {date}  {entry.path.name[:12]}")
    print(f"{len(found)} libraries, {_size(sum(entry.bytes for entry in found))} in {cache.root()}")
    return 0


def _cache_clear(args: argparse.Namespace) -> int:
    from rpe_tvm.build import cache

    removed = cache.clear()
    print(f"removed {removed} libraries from {cache.root()}")
    return 0


def _tuning_verify(args: argparse.Namespace) -> int:
    from rpe_tvm.tune import verify

    return verify.main()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
