"""Compiled functions of another machine as Python functions: every call runs under qemu's user-mode emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("emulated_call.c")


@dataclass(frozen=True)
class Emulation:
    """What runs programs of a machine: its emulator, the C compiler for it, and the directory of its libraries."""

    emulator: str
    compiler: str
    libraries: str


EMULATIONS = {
    "aarch64": Emulation("qemu-aarch64-static", "aarch64-linux-gnu-gcc", "/usr/aarch64-linux-gnu"),
    "armv7": Emulation("qemu-arm-static", "arm-linux-gnueabihf-gcc", "/usr/arm-linux-gnueabihf"),
}


def needs(machine: str) -> pytest.MarkDecorator:
    """Mark that skips a test, with the reason, where programs of a machine cannot be made or run."""
    emulation = EMULATIONS[machine]
    programs = (emulation.emulator, emulation.compiler, emulation.compiler.replace("gcc", "g++"))
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"no {', '.join(missing)}: as root, bash scripts/debian_packages.sh installs them"
    )


@dataclass(frozen=True)
class EmulatedMachine:
    """A machine with the program that calls functions there."""

    emulation: Emulation
    program: Path

    @classmethod
    def make(cls, machine: str, directory: Path) -> EmulatedMachine:
        """Compile the program into `directory`."""
        emulation, program = EMULATIONS[machine], directory / f"call-{machine}"
        flags = ["-O1", "-Wall", "-Werror", "-rdynamic", "-o", str(program), str(SOURCE), "-ldl"]
        subprocess.run([emulation.compiler, *flags], check=True)
        return cls(emulation, program)

    def functions(self, library: Path, names: tuple[str, ...], cpu: str = "max") -> dict[str, Callable[..., None]]:
        """The functions of a compiled library, for `rpe_tvm.runtime.Instance.of`; `cpu` is qemu's name of a CPU."""

        def function(name: str) -> Callable[..., None]:
            return lambda *arguments: self._call(library, f"__tvm_ffi_{name}", arguments, cpu)

        return {name: function(name) for name in names}

    def _call(self, library: Path, symbol: str, arguments: tuple[Any, ...], cpu: str) -> None:
        arrays = [None if isinstance(each, int) else np.from_dlpack(each) for each in arguments]
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "arguments"
            words = [_words(len(arguments))]
            for argument, array in zip(arguments, arrays, strict=True):
                words.append(_words(-1, argument) if array is None else _tensor(array))
            file.write_bytes(b"".join(words))
            command = [self.emulation.emulator, "-L", self.emulation.libraries, str(self.program), str(library)]
            environment = {**os.environ, "QEMU_CPU": cpu}
            done = subprocess.run([*command, symbol, str(file)], capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                raise RuntimeError(f"{symbol} under {self.emulation.emulator} ({done.returncode}): {done.stderr}")
            _read_back(file.read_bytes(), arrays)


def _words(*numbers: int) -> bytes:
    return np.array(numbers, np.int64).tobytes()


def _tensor(array: Any) -> bytes:
    data = np.ascontiguousarray(array, np.float32)
    strides = [stride // 4 for stride in data.strides]
    return _words(data.ndim, *data.shape, *strides) + data.tobytes() + bytes(data.nbytes % 8)


def _read_back(content: bytes, arrays: list[Any]) -> None:
    at = 8
    for array in arrays:
        if array is None:
            at += 16
            continue
        at += 8 + 16 * array.ndim
        found = np.frombuffer(content, np.float32, array.size, at).reshape(array.shape)
        at += array.nbytes + array.nbytes % 8
        if array.flags.writeable:
            array[...] = found
