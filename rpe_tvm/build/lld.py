"""Links AMD GPUs' code to a code object with LLVM's linker."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rpe_tvm.errors import BuildError, CompilerNotFoundError

# Older ones refuse code objects of LLVM 22 ("unknown abi version").
OLDEST = 19
FLAGS = ("--no-undefined", "-shared")
_NAMES = (*(f"ld.lld-{version}" for version in range(22, OLDEST - 1, -1)), "ld.lld", "/opt/rocm/llvm/bin/ld.lld")


def find() -> Path:
    """LLVM's linker on PATH, or that of ROCm.

    Raises
    ------
    CompilerNotFoundError
        If there is none that is new enough.
    """
    found = [path for path in map(shutil.which, _NAMES) if path is not None]
    for path in found:
        if _version(path)[0] >= OLDEST:
            return Path(path)
    older = f" {found[0]} is of version {_version(found[0])[1]}." if found else ""
    raise CompilerNotFoundError(
        f"No ld.lld of LLVM {OLDEST} or later: compiling for an AMD GPU needs it on PATH.{older} Install it (Debian "
        "and Ubuntu: apt install lld-22)."
    )


def version() -> str:
    """The version of the linker, such as ``22.1.8``."""
    return _version(str(find()))[1]


def link(code: bytes) -> bytes:
    """Link one object file to a code object; `BuildError` if a symbol is undefined."""
    with tempfile.TemporaryDirectory() as directory:
        source, linked = Path(directory) / "kernels.o", Path(directory) / "kernels.hsaco"
        source.write_bytes(code)
        _call([str(find()), *FLAGS, "-o", str(linked), str(source)])
        return linked.read_bytes()


def _version(path: str) -> tuple[int, str]:
    found = re.search(r"LLD (\d+)[.\d]*", _call([path, "--version"]))
    return (int(found[1]), found[0].removeprefix("LLD ")) if found else (0, "unknown")


def _call(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CompilerNotFoundError(f"Could not start the linker {command[0]!r}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
