"""Compiles operators: into the cache, into a directory to ship, or for this process only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rpe_tvm.build import cache, cuda, link, manifest, rocm
from rpe_tvm.errors import BuildError
from rpe_tvm.files import copy_files
from rpe_tvm.gpu_targets import GpuTargetSpec
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.targets import AnyTarget, TargetSpec, to_tvm

if TYPE_CHECKING:
    import tvm

    from rpe_tvm.build.lower import Lowered

OfGpu = GpuAttentionConfig | TensorCoreConfig | TensorCoreBackwardConfig | TileConfig | TileBackwardConfig
Config = AttentionConfig | BackwardConfig | ToeplitzConfig | OfGpu

_DEFAULT_SCHEDULE: Mapping[str, Any] = {"source": "default"}


def compile_operator(config: Config, target: AnyTarget, threads: link.Threads = "openmp") -> Path:
    """Compile an operator, or take it from the cache.

    Parameters
    ----------
    config
        What to compile.
    target
        The CPU or GPU to compile for; it must be of the kind that the config is made for.
    threads
        Of a CPU's library: ``"openmp"``, or ``"none"`` for devices that have no OpenMP runtime.

    Returns
    -------
    Path
        The directory of the artefact in the cache, for `rpe_tvm.runtime.load`.

    Raises
    ------
    CompilerNotFoundError
        If it is not in the cache and there is no C++ compiler, no nvcc for an NVIDIA GPU, or no ld.lld for an AMD GPU.
    BuildError
        If it does not compile, or the cache cannot be used.
    """
    lowered = _lower(config, target)
    return compile_module(
        lowered.mod, config.name, config.to_json(), target, op=config.op, schedule=lowered.schedule, threads=threads
    )


def export(config: Config, target: AnyTarget, out_dir: str | os.PathLike[str]) -> Path:
    """Compile an operator, copy it to ``<out_dir>/<config name>/<target id>`` and return that.

    Beside artefacts for NVIDIA GPUs it puts the libraries of TVM that run them, so that `out_dir` needs nothing more of
    TVM's.
    """
    if target.kind == "cuda":
        cuda.pack_runtime(Path(out_dir))
    return copy_artefact(compile_operator(config, target), Path(out_dir) / config.name / target.id)


def in_memory(config: Config, target: TargetSpec) -> dict[str, Callable[..., Any]]:
    """Compile an operator for this process only: writes nothing and needs no C++ compiler.

    The functions run on the thread pool of TVM, whose number of threads is that of the variables
    TVM_NUM_THREADS or OMP_NUM_THREADS, else of the CPUs that this process may use; it does not follow
    ``torch.set_num_threads``. For `rpe_tvm.runtime.Instance.of`.
    """
    return load_module(_lower(config, target).mod, target)


def compile_module(
    mod: tvm.IRModule,
    name: str,
    config: Mapping[str, Any],
    target: AnyTarget,
    *,
    op: str = "attention",
    schedule: Mapping[str, Any] = _DEFAULT_SCHEDULE,
    threads: link.Threads = "openmp",
) -> Path:
    """Compile the functions of `mod` to a library in the cache and return its directory.

    Parameters
    ----------
    mod
        Scheduled PrimFuncs; their ``global_symbol`` are the names in the library.
    name
        Readable name of the artefact, part of its place.
    config
        JSON values for the manifest.
    target
        The CPU or GPU to compile for.
    op
        Name of the operator.
    schedule
        Where the schedule comes from, for the manifest; ``source`` is ``"tuned"``, ``"default"`` or ``"fixed"`` (there
        is nothing to tune).
    threads
        As of `compile_operator`.
    """
    from rpe_tvm.build import stack_arrays  # imports tvm

    tvm_target = to_tvm(target)
    functions = _function_names(mod)
    file = rocm.LIBRARY if target.kind == "rocm" else manifest.LIBRARY
    key = cache.key_of(
        {
            "tir": mod.script(show_meta=True),
            "target": str(tvm_target),
            "pipeline": stack_arrays.pipeline_of(tvm_target),
            "versions": manifest.versions(),
            "link": _builder(target).fingerprint(target)
            if isinstance(target, GpuTargetSpec)
            else link.fingerprint(threads),
            "manifest": [manifest.FORMAT, op, name, config, schedule, target.to_json()],
        }
    )

    def expected(directory: Path, device: Mapping[str, Any] | None) -> dict[str, Any]:
        return manifest.make(
            op=op,
            config=config,
            target=target,
            schedule=schedule,
            functions=functions,
            library=directory / file,
            device=device,
        )

    def is_whole(directory: Path) -> bool:
        found = manifest.read(directory)
        return found == expected(directory, found.get("device"))

    def build(directory: Path) -> None:
        library, device = directory / file, None
        if isinstance(target, GpuTargetSpec):
            device = _builder(target).build(mod, target, tvm_target, name, library)
        else:
            _build_for_cpu(mod, target, tvm_target, name, library, threads)
        manifest.write(directory, expected(directory, device))

    return cache.entry(Path("artefacts") / name / target.id / key, is_whole, build)


def load_module(mod: tvm.IRModule, target: TargetSpec) -> dict[str, Callable[..., Any]]:
    """Compile the functions of `mod` for this process only; see `in_memory`."""
    # Read by TVM when it makes its thread pool, which otherwise takes half of the CPUs and pins the calling
    # thread.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    compiled = _compile(mod, to_tvm(target), ", ".join(_function_names(mod)))
    return {name: compiled[name] for name in _function_names(mod)}


def copy_artefact(artefact: Path, destination: Path) -> Path:
    """Copy an artefact to the directory `destination`, file by file under temporary names, the manifest last.

    A library that a process has loaded from there stays as it is for that process.
    """
    return copy_files(artefact, (manifest.read(artefact)["library"]["file"], manifest.FILE), destination)


def _builder(target: GpuTargetSpec) -> ModuleType:
    return rocm if target.kind == "rocm" else cuda


def _lower(config: Config, target: AnyTarget) -> Lowered:
    # Not at the top: they import tvm, and the cache and the linker need none.
    from rpe_tvm.build import (
        lower,
        lower_backward,
        lower_gpu,
        lower_gpu_backward,
        lower_gpu_tiles,
        lower_gpu_tiles_backward,
        lower_gpu_toeplitz,
        lower_rocm,
        lower_tensor_cores,
        lower_tensor_cores_backward,
        lower_toeplitz,
    )

    if isinstance(config, OfGpu):
        if not isinstance(target, GpuTargetSpec):
            raise BuildError(
                f"The config {config.name} is for GPUs, and the target {target.id} is none: expected cuda-sm_* or "
                "rocm-gfx*."
            )
        if target.kind == "rocm":
            if type(config) is not GpuAttentionConfig:
                raise BuildError(
                    f"The config {config.name} is for NVIDIA GPUs, and the target {target.id} is none: expected "
                    "cuda-sm_*. On AMD GPUs there is attention in float32, without gradients."
                )
            return lower_rocm.lower(config)
        if isinstance(config, TensorCoreBackwardConfig):
            return lower_tensor_cores_backward.lower(config)
        if isinstance(config, TensorCoreConfig):
            return lower_tensor_cores.lower(config)
        if isinstance(config, TileConfig):
            return lower_gpu_tiles.lower(config)
        if isinstance(config, TileBackwardConfig):
            return lower_gpu_tiles_backward.lower(config)
        if isinstance(config, GpuBackwardConfig):
            return lower_gpu_backward.lower(config)
        if isinstance(config, GpuToeplitzConfig):
            return lower_gpu_toeplitz.lower(config)
        return lower_gpu.lower(config)
    if isinstance(target, GpuTargetSpec):
        raise BuildError(
            f"The config {config.name} is for CPUs, and the target {target.id} is none: expected x86_64-*, aarch64-* "
            "or armv7-*."
        )
    if isinstance(config, ToeplitzConfig):
        return lower_toeplitz.lower(config, target)
    if isinstance(config, BackwardConfig):
        return lower_backward.lower(config, target)
    return lower.lower(config, target)


def _build_for_cpu(
    mod: tvm.IRModule, spec: TargetSpec, target: tvm.target.Target, name: str, library: Path, threads: link.Threads
) -> None:
    link.find_compiler(spec.machine)  # before the compilation, which takes longer than to notice that there is none
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "code.o"
        _compile(mod, target, name).write_to_file(str(code))
        link.link(code, library, spec.machine, threads)


def _function_names(mod: tvm.IRModule) -> list[str]:
    return sorted(str(function.attrs["global_symbol"]) for function in mod.functions.values())


def _compile(mod: tvm.IRModule, target: tvm.target.Target, name: str) -> Any:
    from rpe_tvm.build import stack_arrays  # imports tvm

    try:
        compiled = stack_arrays.compile_for(mod, target)
    except Exception as error:  # TVM raises whatever class its C++ code named
        raise BuildError(f"TVM could not compile {name} for {target}: {error}") from error
    if compiled.imports:
        raise BuildError(f"TVM compiled {name} for {target} to more than CPU code, which cannot be linked here.")
    return compiled
