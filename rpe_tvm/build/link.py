"""Links compiled code with our backend hooks (addon.cc), or with device code, into a shared library, with the
machine's C++ compiler or a cross compiler."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rpe_tvm.build import cache
from rpe_tvm.errors import BuildError, CompilerNotFoundError
from rpe_tvm.machine import this_machine

ADDON = Path(__file__).with_name("addon.cc")
Threads = Literal["openmp", "none"]

ADDON_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fopenmp")
LINK_FLAGS = ("-shared", "-fPIC", "-fopenmp", "-Wl,--strip-debug")
# Without threads a library needs nothing but the C library: not every device has libgomp and libstdc++.
SERIAL_ADDON_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti")
SERIAL_LINK_FLAGS = ("-shared", "-fPIC", "-nodefaultlibs", "-Wl,--as-needed,--exclude-libs,ALL,--strip-debug")
# The last two are static: 32-bit ARM needs divisions and a symbol of unwinding.
_SERIAL_LIBRARIES = ("-lm", "-lc", "-lgcc", "-lgcc_eh")
# -Bsymbolic: functions call those of their own library, whatever else the process has loaded.
DEVICE_LINK_FLAGS = ("-shared", "-fPIC", "-Wl,-Bsymbolic", "-Wl,--strip-debug")

# What addon.cc defines. TVM's code may refer to more hooks; without a definition they are null pointers.
_HOOKS = frozenset(
    (
        b"__TVMBackendParallelLaunch",
        b"__TVMBackendAllocWorkspace",
        b"__TVMBackendFreeWorkspace",
    )
)

# Where TVM's loader looks for what a library brings along besides host code.
_DATA_SYMBOL = """\
    .section .rodata
    .globl __tvm_ffi__library_bin
    .type __tvm_ffi__library_bin, @object
    .balign 16
__tvm_ffi__library_bin:
    .incbin "{path}"
    .size __tvm_ffi__library_bin, . - __tvm_ffi__library_bin
    .section .note.GNU-stack,"",@progbits
"""


# Machine -> Debian's cross compiler for it, and the package that brings it.
CROSS_COMPILERS = {
    "x86_64": ("x86_64-linux-gnu-g++", "g++-x86-64-linux-gnu"),
    "aarch64": ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"),
    "armv7": ("arm-linux-gnueabihf-g++", "g++-arm-linux-gnueabihf"),
}


def find_compiler(machine: str = "") -> list[str]:
    """The command of the C++ compiler.

    Parameters
    ----------
    machine
        For which machine, as of `TargetSpec.machine`. This machine, or nothing: what the variable CXX names, else g++,
        c++ or clang++ on PATH. Another one: what CXX names if that compiles for it, else Debian's cross compiler.

    Raises
    ------
    CompilerNotFoundError
        If there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]) is None:
        raise CompilerNotFoundError(
            f"No C++ compiler: the variable CXX names {named[0]!r}, which is not on PATH. Correct it."
        )
    if machine and machine != this_machine():
        return named if named and _compiles_for(named, machine) else [_cross_compiler(machine)]
    if named:
        return named
    for name in ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found is not None:
            return [found]
    raise CompilerNotFoundError(
        "No C++ compiler: exporting a library needs g++, c++ or clang++ on PATH, or one named by the "
        "variable CXX. Install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: "
        "conda install -c conda-forge gxx). Without one, rpe_tvm.build.in_memory compiles for one process."
    )


def _compiles_for(compiler: list[str], machine: str) -> bool:
    """Whether a compiler's own name of its machine, such as aarch64-linux-gnu, is that of `machine`."""
    done = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=False)
    prefix = "arm" if machine == "armv7" else machine
    return done.returncode == 0 and done.stdout.startswith(prefix)


def _cross_compiler(machine: str) -> str:
    name, package = CROSS_COMPILERS[machine]
    found = shutil.which(name)
    if found is None:
        raise CompilerNotFoundError(
            f"No C++ compiler for {machine}: expected {name} on PATH, or a compiler for it in the variable CXX, such "
            f"as CXX='clang++ --target={name.removesuffix('-g++')}'. Install one (Debian and Ubuntu: apt install "
            f"{package})."
        )
    return found


def fingerprint(threads: Threads = "openmp") -> dict[str, object]:
    """What linking contributes to a library, for its cache key: the source of the hooks and all flags."""
    return {
        "addon": hashlib.sha256(ADDON.read_bytes()).hexdigest(),
        "flags": [*_addon_flags(threads), *_link_flags(threads)],
    }


def _addon_flags(threads: Threads) -> tuple[str, ...]:
    return ADDON_FLAGS if threads == "openmp" else SERIAL_ADDON_FLAGS


def _link_flags(threads: Threads) -> tuple[str, ...]:
    return LINK_FLAGS if threads == "openmp" else SERIAL_LINK_FLAGS


def link(code: Path, library: Path, machine: str = "", threads: Threads = "openmp") -> None:
    """Link the object file `code`, which TVM wrote for `machine`, and the hooks into the shared library `library`.

    With ``threads="none"`` parallel loops run in the calling thread, and the library needs nothing but the C library.
    """
    unknown = set(re.findall(rb"__TVM\w+", code.read_bytes())) - _HOOKS
    if unknown:
        names = ", ".join(sorted(name.decode() for name in unknown))
        raise BuildError(f"Compiled code calls {names} of libtvm_runtime, which {ADDON.name} does not replace.")
    compiler = find_compiler(machine)
    hooks = _addon_object(compiler, machine, threads)
    libraries = () if threads == "openmp" else _SERIAL_LIBRARIES
    _call([*compiler, *_link_flags(threads), "-o", str(library), str(code), str(hooks), *libraries])


def compile_library(source: Path, library: Path, machine: str = "") -> None:
    """Compile one C++ file, with OpenMP, to the shared library `library` for `machine`."""
    _call([*find_compiler(machine), *ADDON_FLAGS, *LINK_FLAGS, "-o", str(library), str(source)])


def link_with_device(objects: Sequence[Path], data: Path, library: Path) -> None:
    """Link objects of host code and packed device code (`rpe_tvm.build.device_code.blob`) into `library`."""
    code = b"".join(path.read_bytes() for path in objects)
    hooks = {name.decode() for name in re.findall(rb"__TVMBackend\w+", code)}
    if hooks:
        raise BuildError(
            f"Host code of a GPU library calls {', '.join(sorted(hooks))}: it may only check arguments and launch "
            "kernels. Intermediate arrays have to be arguments."
        )
    assembly = data.with_suffix(".s")
    assembly.write_text(_DATA_SYMBOL.format(path=data), encoding="utf-8")
    _call([*find_compiler(), *DEVICE_LINK_FLAGS, "-o", str(library), *map(str, objects), str(assembly)])


def _addon_object(compiler: list[str], machine: str, threads: Threads) -> Path:
    """The compiled hooks; compiled once per cache, compiler and machine."""
    key = cache.key_of({"compiler": compiler, "machine": machine or this_machine(), **fingerprint(threads)})

    def is_whole(directory: Path) -> bool:
        recorded = (directory / "sha256").read_text(encoding="ascii")
        return hashlib.sha256((directory / "addon.o").read_bytes()).hexdigest() == recorded

    def build(directory: Path) -> None:
        target = directory / "addon.o"
        _call([*compiler, *_addon_flags(threads), "-c", str(ADDON), "-o", str(target)])
        (directory / "sha256").write_text(hashlib.sha256(target.read_bytes()).hexdigest(), encoding="ascii")

    return cache.entry(Path("objects") / key, is_whole, build) / "addon.o"


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CompilerNotFoundError(f"Could not start the C++ compiler {command[0]!r}: {error}") from error
    if done.returncode != 0:
        raise BuildError(
            f"The C++ compiler failed with status {done.returncode}: {shlex.join(command)}\n"
            f"{(done.stderr or done.stdout).strip()}"
        )
