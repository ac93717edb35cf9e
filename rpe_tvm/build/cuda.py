"""Builds libraries for GPUs: machine code of several architectures, checked, and the host code that launches it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpe_tvm.build import device_code, fatbin, link, nvcc
from rpe_tvm.errors import BuildError
from rpe_tvm.files import copy_files
from rpe_tvm.gpu_targets import GpuTargetSpec, shared_bytes_of

if TYPE_CHECKING:
    import tvm


# Bytes that a thread may spill, stores and loads together. The 62 numbers that it spills at 4096 points cost less
# than a second block of threads on a multiprocessor gains: 0.396 ms in place of 0.41 on an H100.
MOST_SPILLED = 512


def fingerprint(target: GpuTargetSpec) -> dict[str, object]:
    """What building contributes to a library, for its cache key."""
    return {"nvcc": list(nvcc.FLAGS), "link": list(link.DEVICE_LINK_FLAGS), "architectures": list(target.architectures)}


def build(
    mod: tvm.IRModule, target: GpuTargetSpec, tvm_target: tvm.target.Target, name: str, library: Path
) -> dict[str, Any]:
    """Write the library of `mod`; returns the manifest's ``device``: what it holds and needs.

    Parameters
    ----------
    mod
        Scheduled PrimFuncs.
    target, tvm_target
        The GPUs to compile for, and TVM's form of it.
    name
        Name of the artefact, for messages.
    library
        The file to write.

    Raises
    ------
    CompilerNotFoundError
        If nvcc or the C++ compiler is missing.
    BuildError
        If something does not compile, a kernel needs more than the target has, or spills registers.
    """
    nvcc.find(), link.find_compiler()  # before the compilation, which takes longer than to notice that one is missing
    code = device_code.generate(mod, tvm_target, name)
    needed = {kernel: size for kernel, size in code.shared_bytes.items() if kernel not in code.optional}
    architectures = fitting(target, needed)
    binary, uses = nvcc.compile_fatbin(code.source, architectures)
    check_uses(uses, code.shared_bytes, architectures)
    with tempfile.TemporaryDirectory() as scratch:
        host, data = Path(scratch) / "host.o", Path(scratch) / "device.bin"
        code.host.write_to_file(str(host))
        data.write_bytes(device_code.blob(code, binary))
        calls = [Path(scratch) / f"calls{i}.o" for i in range(len(code.calls))]
        for module, path in zip(code.calls, calls, strict=True):
            module.write_to_file(str(path))
        link.link_with_device([host, *calls], data, library)
    fatbin.check_library(library.read_bytes(), architectures)
    return {
        "architectures": list(architectures),
        "ptx": architectures[-1],
        "shared_bytes": max(needed.values()),
        "nvcc": nvcc.version(),
        "kernels": _report(uses, code.shared_bytes),
    }


def pack_runtime(artefacts: Path) -> None:
    """Copy the libraries of TVM that run GPU libraries, and TVM's licence, from the installed package to a directory of
    artefacts."""
    from rpe_tvm.runtime import tvm_runtime  # imports tvm_ffi, and that torch

    package = tvm_runtime.installed()
    if package is None:
        raise BuildError("The package apache-tvm has no directory: install it with pip, from a wheel.")
    copy_files(package, tvm_runtime.LIBRARIES, artefacts / tvm_runtime.PACKED)
    for file in metadata.files("apache-tvm") or ():
        if file.name in ("LICENSE", "NOTICE"):
            copy_files(Path(str(file.locate())).parent, (file.name,), artefacts / tvm_runtime.PACKED)


def fitting(target: GpuTargetSpec, shared_bytes: dict[str, int]) -> tuple[str, ...]:
    """The architectures of `target` whose blocks may have as much shared memory as every kernel needs.

    Raises
    ------
    BuildError
        If ``target.arch`` itself is none of them.
    """
    kernel, most = max(shared_bytes.items(), key=lambda item: item[1])
    if most > target.shared_bytes:
        raise BuildError(
            f"The kernel {kernel} needs {most} bytes of shared memory for each block, {target.arch} has "
            f"{target.shared_bytes}. Choose a shorter length or a schedule with smaller tiles."
        )
    return tuple(arch for arch in target.architectures if most <= shared_bytes_of(arch))


def check_uses(uses: Iterable[nvcc.KernelUse], kernels: Iterable[str], architectures: Iterable[str]) -> None:
    """Raise `BuildError` unless there is a report on every kernel and architecture, and none spills many registers."""
    uses = list(uses)
    reported = {(use.kernel, use.arch) for use in uses}
    missing = [f"{kernel} for {arch}" for kernel in kernels for arch in architectures if (kernel, arch) not in reported]
    if missing:
        raise BuildError(f"nvcc reported nothing on {', '.join(missing)}: its output has an unknown form.")
    spilling = [
        f"{use.kernel} on {use.arch}: {use.spill_bytes} bytes, {use.registers} registers"
        for use in uses
        if use.spill_bytes > MOST_SPILLED
    ]
    if spilling:
        raise BuildError(
            "Kernels spill registers to memory, which makes them slow: "
            f"{'; '.join(spilling)}. Choose a schedule with smaller tiles or radices, or fewer threads in a block."
        )


def _report(uses: Iterable[nvcc.KernelUse], shared_bytes: dict[str, int]) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> architecture -> registers, local and shared memory."""
    report: dict[str, dict[str, dict[str, int]]] = {}
    for use in sorted(uses, key=lambda use: (use.kernel, use.arch)):
        report.setdefault(use.kernel, {})[use.arch] = {
            "registers": use.registers,
            "stack_bytes": use.stack_bytes,
            "spill_bytes": use.spill_bytes,
            "shared_bytes": shared_bytes.get(use.kernel, use.shared_bytes),
        }
    return report
