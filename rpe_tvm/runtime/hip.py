"""Launches the kernels of a code object with AMD's HIP alone: no TVM, and no library of TVM's for ROCm.

What is launched, with which arguments and in how many blocks, is in the manifest. Tensors are torch's.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rpe_tvm.errors import GpuNotFoundError, HipError
from rpe_tvm.runtime import launch_rules

# The names that releases of ROCm have given it.
LIBRARIES = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")

# hipError_t of hip_runtime_api.h -> what to do
_HINTS = {
    98: "The code object is for another GPU, or damaged. Compile for this one.",
    200: "ROCm does not read this code object: it needs ROCm 6.3 or later.",
    209: "The code object is for another architecture. Compile with the --target of this GPU.",
    500: "The code object lacks this kernel. Compile again.",
}

Stream = Callable[[], int]  # -> hipStream_t of the calling thread


class Hip:
    """AMD's runtime library; every call that fails is a `HipError`."""

    def __init__(self, path: str | None = None) -> None:
        self._library = _open(path)
        self._library.hipGetErrorString.restype = ctypes.c_char_p

    def device(self) -> int:
        """Return the current GPU of this thread."""
        index = ctypes.c_int()
        self._call("hipGetDevice", ctypes.byref(index))
        return index.value

    def load(self, image: bytes) -> ctypes.c_void_p:
        """Load a code object into the current GPU."""
        module = ctypes.c_void_p()
        self._call("hipModuleLoadData", ctypes.byref(module), image)
        return module

    def kernel(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        """Return a kernel of a loaded code object."""
        found = ctypes.c_void_p()
        self._call("hipModuleGetFunction", ctypes.byref(found), module, name.encode())
        return found

    def launch(
        self,
        kernel: ctypes.c_void_p,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[ctypes.c_void_p | ctypes.c_int64],
        stream: int,
    ) -> None:
        """Launch blocks of threads on a stream; does not wait."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        sizes = map(ctypes.c_uint, (*grid, *block, 0))  # no local memory but the kernel's own
        self._call("hipModuleLaunchKernel", kernel, *sizes, ctypes.c_void_p(stream), pointers, None)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            said = self._library.hipGetErrorString(status) or b"unknown"
            raise HipError(f"{function} failed: {said.decode(errors='replace')} ({status}). {_HINTS.get(status, '')}")


class CodeObject:
    """A code object, loaded into each GPU at the first launch there."""

    def __init__(self, hip: Hip, image: bytes) -> None:
        self._hip, self._image = hip, image
        self._modules: dict[int, ctypes.c_void_p] = {}
        self._kernels: dict[tuple[int, str], ctypes.c_void_p] = {}

    def kernel(self, name: str) -> ctypes.c_void_p:
        """Return a kernel on the current GPU."""
        device = self._hip.device()
        if (device, name) not in self._kernels:
            if device not in self._modules:
                self._modules[device] = self._hip.load(self._image)
            self._kernels[device, name] = self._hip.kernel(self._modules[device], name)
        return self._kernels[device, name]


def functions_of(
    hip: Hip, library: Path, rules: Mapping[str, Mapping[str, Any]], stream: Stream
) -> dict[str, Callable[..., None]]:
    """Return the functions of a code object by name, with the arguments that the compiled functions of CUDA have.

    Parameters
    ----------
    hip
        AMD's runtime.
    library
        The code object.
    rules
        The manifest's ``device.functions``.
    stream
        Called for each launch.
    """
    code = CodeObject(hip, library.read_bytes())
    return {name: _function(hip, code, name, of, stream) for name, of in rules.items()}


def _function(hip: Hip, code: CodeObject, name: str, rules: Mapping[str, Any], stream: Stream) -> Callable[..., None]:
    parameters, kernels = rules["arguments"], rules["kernels"]

    def call(*arguments: Any) -> None:
        sizes = launch_rules.sizes_of(name, parameters, arguments)
        tensors = {p["name"]: a for p, a in zip(parameters, arguments, strict=True) if "shape" in p}
        for kernel in kernels:
            grid = [launch_rules.value(rule, sizes) for rule in kernel["grid"]]
            if min(grid) == 0:
                continue  # nothing to do, and HIP refuses it
            given = [_argument(rule, tensors, sizes) for rule in kernel["arguments"]]
            hip.launch(code.kernel(kernel["name"]), grid, kernel["block"], given, stream())

    return call


def _argument(rule: Any, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(rule, str) and rule in tensors:
        return ctypes.c_void_p(tensors[rule].data_ptr())
    return ctypes.c_int64(launch_rules.value(rule, sizes))


def _open(path: str | None) -> ctypes.CDLL:
    """Open a library: the one of this process if it has one, because a second one would not know torch's streams."""
    reasons = []
    for name in (path,) if path else (*_loaded(), *LIBRARIES):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise GpuNotFoundError(
        f"No AMD GPU: HIP's libamdhip64.so cannot be loaded ({reasons[-1]}). Install ROCm, or a PyTorch that is built "
        "for it and import that first."
    )


def _loaded() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*/libamdhip64\.so\S*", maps)))
