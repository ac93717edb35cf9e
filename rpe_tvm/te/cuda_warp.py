"""Instructions of a warp and of shared memory, as statements of the function that is being built.

Shared memory is addressed by 32-bit numbers, not by buffers: TVM then adds no barriers of its own between tiles that it
cannot tell apart. Fragments, the registers in which a warp holds a matrix: PTX ISA, "Matrix Fragments for
mma.m16n8k16". With group = lane // 4 and pair = lane % 4, register 0 and 1 of a 16 x 8 accumulator hold columns
2 pair and 2 pair + 1 of row `group`, 2 and 3 those of row `group + 8`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import WARP

Expr = Any  # TVM's expressions are built by operators, which type checkers do not see
Buffer = Any

PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}


def registers(count: int, dtype: str) -> Buffer:
    """Return an array of registers; every index into it must be a constant."""
    return T.alloc_buffer((count,), dtype, scope="local")


def zero(array: Buffer, count: int) -> None:
    """Set float32 registers to zero."""
    for i in range(count):
        T.buffer_store(array, T.float32(0), [i])


def uint32(x: Expr) -> Expr:
    """Return a number as an address of shared memory."""
    return T.Cast("uint32", x)


def copy_async(shared: Expr, pointer: Expr, ignore: Expr | None = None) -> None:
    """Start a copy of 16 bytes to shared memory; zeros arrive where `ignore` is true, and nothing is read."""
    copy = T.ptx["cp.async.cg.shared.global"]
    T.evaluate(copy(shared, pointer, 16) if ignore is None else copy(shared, pointer, 16, T.ptx.pred(ignore)))


def copy_float_async(shared: Expr, pointer: Expr, ignore: Expr) -> None:
    """Start a copy of one float32 to shared memory; zero arrives where `ignore` is true, and nothing is read."""
    T.evaluate(T.ptx["cp.async.ca.shared.global"](shared, pointer, 4, T.ptx.pred(ignore)))


def commit() -> None:
    """Close a group of copies."""
    T.evaluate(T.ptx["cp.async.commit_group"]())


def wait(pending: int) -> None:
    """Wait until at most `pending` groups of this thread's copies are on their way."""
    T.evaluate(T.ptx["cp.async.wait_group"](pending))


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.cuda.cta_sync())


def warp_barrier() -> None:
    """Wait for all lanes of the warp, and see what they have stored."""
    T.evaluate(T.cuda.warp_sync())


def load_matrices(target: Buffer, shared: Expr, offset: int, transpose: bool = False) -> None:
    """Load four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l // 8."""
    load = T.ptx[f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if transpose else ''}.shared.b16"]
    T.evaluate(load(*(target[i] for i in range(4)), T.ptx.addr(shared, offset)))


def load_float(target: Buffer, index: int, shared: Expr, offset: int) -> None:
    """Load one float32 of shared memory into a register."""
    T.evaluate(T.ptx["ld.shared.f32"](target[index], T.ptx.addr(shared, offset)))


def load_floats(target: Buffer, index: int, shared: Expr, offset: int) -> None:
    """Load two float32 of shared memory, at a multiple of 8 bytes, into registers."""
    T.evaluate(T.ptx["ld.shared.v2.f32"](target[index], target[index + 1], T.ptx.addr(shared, offset)))


def load_four(target: Buffer, index: int, shared: Expr, offset: int) -> None:
    """Load four float32 of shared memory, at a multiple of 16 bytes, into registers."""
    T.evaluate(T.ptx["ld.shared.v4.f32"](*(target[index + i] for i in range(4)), T.ptx.addr(shared, offset)))


def store_four(shared: Expr, offset: int, values: Sequence[Expr]) -> None:
    """Store four float32 in shared memory, at a multiple of 16 bytes."""
    T.evaluate(T.ptx["st.shared.v4.f32"](T.ptx.addr(shared, offset), *values))


def store_four_global(pointer: Expr, values: Sequence[Expr]) -> None:
    """Store four float32 in global memory, at a multiple of 16 bytes."""
    T.evaluate(T.ptx["st.global.v4.f32"](pointer, *values))


def store_float(shared: Expr, offset: int, value: Expr) -> None:
    """Store one float32 in shared memory."""
    T.evaluate(T.ptx["st.shared.f32"](T.ptx.addr(shared, offset), value))


def store_shared_pair(shared: Expr, offset: int, pair: Expr) -> None:
    """Store two 16-bit numbers in shared memory."""
    T.evaluate(T.ptx["st.shared.u32"](T.ptx.addr(shared, offset), pair))


def multiply_add(dtype: str, accumulator: Sequence[Expr], a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """Add A B to the accumulator: 16 x 8 float32 (4 registers), A 16 x 16 (4), B 16 x 8 (2), all of 16-bit numbers."""
    name = PTX_NAMES[dtype]
    multiply = T.ptx[f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"]
    T.evaluate(multiply(*accumulator, *a, *b, *accumulator))


def pack(dtype: str, target: Expr, low: Expr, high: Expr) -> None:
    """Round two float32 to the 16-bit halves of a register."""
    T.evaluate(T.ptx[f"cvt.rn.{PTX_NAMES[dtype]}x2.f32"](target, high, low))


def power_of_2(target: Buffer, index: int, exponent: Expr) -> None:
    """Put 2 to the exponent into a register, to 2 units in the last place; below 2^-126 zero."""
    T.evaluate(T.ptx["ex2.approx.ftz.f32"](target[index], exponent))


def quad_sum(array: Buffer, index: int) -> None:
    """Give the four lanes of each group the sum of their values."""
    sum_over_lanes(array, index, (1, 2))


def sum_over_lanes(array: Buffer, index: int, distances: Sequence[int]) -> None:
    """Give all lanes whose numbers differ in some of these bits the sum of their values."""
    for distance in distances:
        T.buffer_store(array, array[index] + _other_lane(array[index], distance), [index])


def quad_max(array: Buffer, index: int) -> None:
    """Give the four lanes of each group the largest of their values; NaN counts as no value."""
    for distance in (1, 2):
        T.buffer_store(array, T.max(array[index], _other_lane(array[index], distance)), [index])


def warp_max(array: Buffer, index: int) -> None:
    """Give all lanes of a warp the largest of their values; NaN counts as no value."""
    for distance in (1, 2, 4, 8, 16):
        T.buffer_store(array, T.max(array[index], _other_lane(array[index], distance)), [index])


def _other_lane(value: Expr, distance: int) -> Expr:
    return getattr(T.cuda, "__shfl_xor_sync")(T.uint32(0xFFFFFFFF), value, distance, WARP)


def unpack(dtype: str, pair: Expr) -> tuple[Expr, Expr]:
    """Return the float32 values of the 16-bit halves of a register, the low one first."""
    if dtype == "bfloat16":
        low, high = pair << T.uint32(16), pair & T.uint32(0xFFFF0000)
        return T.reinterpret("float32", low), T.reinterpret("float32", high)
    halves = (T.Cast("uint16", pair), T.Cast("uint16", pair >> T.uint32(16)))
    low, high = (T.Cast("float32", T.reinterpret("float16", half)) for half in halves)
    return low, high


def load_pair(target: Expr, pointer: Expr) -> None:
    """Load two 16-bit numbers of global memory that nothing writes meanwhile."""
    T.evaluate(T.ptx["ld.global.nc.u32"](target, pointer))


def add_float(pointer: Expr, value: Expr) -> None:
    """Add to a float32 of global memory without waiting for it."""
    T.evaluate(T.ptx["red.global.add.f32"](pointer, value))


def store_pair(pointer: Expr, pair: Expr) -> None:
    """Store two 16-bit numbers in global memory."""
    T.evaluate(T.ptx["st.global.u32"](pointer, pair))
