"""Compiles CUDA source to machine code of several architectures with nvcc, and reads what ptxas reports about it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rpe_tvm.build import link
from rpe_tvm.errors import BuildError, CompilerNotFoundError

PACKAGE = "nvidia-cuda-nvcc"
# No --use_fast_math, which TVM's own call of nvcc passes: it loses digits of divisions and flushes denormals.
FLAGS = ("--fatbin", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v")

_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>sm_\w+)'\n"
    r"(?:(?!.*Compiling entry).*\n)*?"
    r"ptxas info\s*: Function properties for (?P=kernel)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*)"
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelUse:
    """What one kernel needs on one architecture, as ptxas reports it.

    Attributes
    ----------
    kernel, arch
        Which kernel, and for which architecture.
    registers
        Registers of a thread.
    stack_bytes
        Local memory of a thread, spills included.
    spill_bytes
        Bytes that a thread writes to or reads from local memory for want of registers.
    shared_bytes
        Shared memory of a block, without what a launch adds.
    """

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def find() -> Path:
    """nvcc on PATH, else that of the package `PACKAGE` in this Python environment.

    Raises
    ------
    CompilerNotFoundError
        If there is neither.
    """
    on_path = shutil.which("nvcc")
    if on_path is not None:
        return Path(on_path)
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.match("bin/nvcc"):
            return Path(str(file.locate()))
    raise CompilerNotFoundError(
        "No nvcc: compiling for a GPU needs it on PATH, or its package in this environment. Install CUDA 13, or the "
        "packages: pip install 'rpe_tvm[cuda]'"
    )


def version() -> str:
    """The version of nvcc, such as ``13.0.88``."""
    text = _call([str(find()), "--version"])
    found = re.search(r"\bV(\d+(?:\.\d+)+)", text)
    if found is None:
        raise BuildError(f"{find()} does not say its version: {text.strip()!r}.")
    return found[1]


def compile_fatbin(source: str, architectures: Sequence[str]) -> tuple[bytes, list[KernelUse]]:
    """Compile CUDA source to one file with the machine code of every architecture and the PTX of the last one.

    Parameters
    ----------
    source
        CUDA C++.
    architectures
        Such as ``["sm_80", "sm_90"]``, ascending.

    Returns
    -------
    fatbin
        For ``cuModuleLoadData``.
    uses
        What every kernel needs on every architecture.

    Raises
    ------
    CompilerNotFoundError
        If there is no nvcc, or no C++ compiler, which nvcc calls.
    BuildError
        If the source does not compile.
    """
    numbers = [arch.removeprefix("sm_") for arch in architectures]
    targets = [f"arch=compute_{number},code=sm_{number}" for number in numbers]
    targets.append(f"arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    command = [str(find()), "-ccbin", link.find_compiler()[0], *FLAGS]
    for target in targets:
        command += ["-gencode", target]
    with tempfile.TemporaryDirectory() as directory:
        code, fatbin = Path(directory) / "kernels.cu", Path(directory) / "kernels.fatbin"
        code.write_text(source, encoding="utf-8")
        report = _call([*command, "-o", str(fatbin), str(code)])
        return fatbin.read_bytes(), read_report(report)


def read_report(text: str) -> list[KernelUse]:
    """What ``ptxas -v`` printed about each kernel and architecture."""
    uses = []
    for found in _KERNEL.finditer(text):
        shared = _SHARED.search(found["rest"])
        uses.append(
            KernelUse(
                kernel=found["kernel"],
                arch=found["arch"],
                registers=int(found["registers"]),
                stack_bytes=int(found["stack"]),
                spill_bytes=int(found["stores"]) + int(found["loads"]),
                shared_bytes=int(shared[1]) if shared else 0,
            )
        )
    return uses


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise CompilerNotFoundError(f"Could not start nvcc: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"nvcc failed with status {done.returncode}: {shlex.join(command)}\n{done.stdout.strip()}")
    return done.stdout
