"""Runs a function of `rpe_tvm.te.gpu_forward` on the CPU: what it calls are Python functions on torch tensors."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_STUB = """
int __tvm_ffi_NAME(void* self, void* arguments, int count, void* result) { return call("NAME", arguments, count); }
"""
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_TENSOR = 7  # kTVMFFIDLTensorPtr


class _Any(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("unused", ctypes.c_int32), ("value", ctypes.c_int64)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def compile_calls(function: Any, callees: Mapping[str, Callable[..., None]], directory: Path) -> Callable[..., None]:
    """Compile `function` for the CPU; calls of other functions of its library go to `callees`."""
    import tvm
    import tvm_ffi

    name = str(function.attrs["global_symbol"])
    code, stubs, library = (directory / f"{name}{suffix}" for suffix in (".o", ".c", ".so"))
    tvm.compile(tvm.IRModule({name: function}), tvm.target.Target("llvm")).mod.write_to_file(str(code))
    stubs.write_text("int (*call)(const char*, void*, int);" + "".join(_STUB.replace("NAME", each) for each in callees))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, code, stubs], check=True)

    errors: list[BaseException] = []

    def call(callee: bytes, arguments: int, count: int) -> int:
        if not errors:
            try:
                callees[callee.decode()](*map(_value, (_Any * count).from_address(arguments)))
            except BaseException as error:  # cannot pass through compiled code
                errors.append(error)
        return 0

    callback = _CALLBACK(call)
    ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), "call").value = ctypes.cast(callback, ctypes.c_void_p).value
    compiled = tvm_ffi.load_module(str(library))[name]

    def run(*arguments: Any) -> None:
        assert callback  # Python's end of the pointer in the library
        compiled(*arguments)
        if errors:
            raise errors.pop()

    return run


def _value(argument: _Any) -> Any:
    if argument.kind != _TENSOR:
        return argument.value
    tensor = _Tensor.from_address(argument.value)
    code, bits, *_ = tensor.dtype
    kinds = {(2, 32): ctypes.c_float, (1, 8): ctypes.c_uint8, (0, 64): ctypes.c_int64}
    # float32, bytes of a workspace, and pairs of float32
    assert tensor.byte_offset == 0
    shape = tensor.shape[: tensor.rank]
    strides = tensor.strides[: tensor.rank] if tensor.strides else torch.empty(shape, device="meta").stride()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = np.ctypeslib.as_array((kinds[code, bits] * extent).from_address(tensor.data))
    return torch.from_numpy(memory).as_strided(shape, strides)
