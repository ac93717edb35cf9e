"""A CUDA function that is written statement by statement: its frame, its arguments, and names in the source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES


@contextmanager
def function(name: str) -> Iterator[IRBuilder]:
    """Build the function `name` of what is called inside; `get()` of the yielded builder returns it afterwards."""
    with IRBuilder() as built, builder.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield built


def argument(name: str, shape: tuple[Any, ...], dtype: str, strided: bool = False, align: int = CHUNK_BYTES) -> Any:
    """Declare the next argument, an array `[B, H, row, column]` if `strided`, whose columns are contiguous."""
    handle = T.arg(name, T.handle())
    strides = None
    if strided:
        strides = [named(f"{name}_{axis}_stride", T.int64()) for axis in ("batch", "head", "row")] + [T.int64(1)]
    return named(name, T.match_buffer(handle, shape, dtype, strides=strides, align=align))


def blocks_at_once(count: int) -> AbstractContextManager[Any]:
    """Bound the registers of a thread so that a multiprocessor can hold `count` blocks; 0 leaves that to nvcc."""
    if count == 0:
        return nullcontext()
    return T.attr(T.int32(0), "tirx.launch_bounds_min_blocks_per_sm", T.int32(count))  # type: ignore[no-any-return]


@contextmanager
def only_if(condition: Any | None) -> Iterator[None]:
    """Guard what is called inside; None: nothing is to be checked."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


def loops_for_nvcc() -> AbstractContextManager[Any]:
    """Leave it to nvcc to unroll loops: TVM's passes take seconds for the statements of large products."""
    return T.attr(T.int32(0), "pragma_unroll_explicit", T.bool(False))  # type: ignore[no-any-return]


def named(name: str, var: Any) -> Any:
    """Give a variable or buffer its name."""
    IRBuilder.name(name, var)
    return var


def let(name: str, value: Any) -> Any:
    """Return a variable that holds the value."""
    return named(name, T.Bind(value))
