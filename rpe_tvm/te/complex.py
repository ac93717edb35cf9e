"""Complex numbers as pairs of scalar expressions: TVM has no complex dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

Expr = Any
Complex = tuple[Expr, Expr]

FLOAT = "float32"


def int64(value: int) -> Expr:
    """Return a 64-bit index constant; all shapes use them, so that no index is ever cast."""
    return tirx.const(value, "int64")


def real(value: float) -> Expr:
    """Return a float32 constant."""
    return tirx.const(value, FLOAT)


def add(a: Complex, b: Complex) -> Complex:
    return a[0] + b[0], a[1] + b[1]


def sub(a: Complex, b: Complex) -> Complex:
    return a[0] - b[0], a[1] - b[1]


def scale(a: Complex, factor: Expr) -> Complex:
    return a[0] * factor, a[1] * factor


def mul(a: Complex, w: Complex) -> Complex:
    return a[0] * w[0] - a[1] * w[1], a[0] * w[1] + a[1] * w[0]


def mul_conj(a: Complex, w: Complex) -> Complex:
    """Return a * conj(w)."""
    return a[0] * w[0] + a[1] * w[1], a[1] * w[0] - a[0] * w[1]


def times_i(a: Complex, sign: int) -> Complex:
    """Return a * (sign * i)."""
    return (-a[1], a[0]) if sign > 0 else (a[1], -a[0])


def part(index: Expr, value: Complex) -> Expr:
    """Return the real (index 0) or the imaginary (index 1) part."""
    return tirx.Select(index == 0, value[0], value[1])


def choose(index: Expr, options: Sequence[Complex]) -> Complex:
    """Return `options[index]`; the index is a loop that schedules unroll, so no choice is left in the code."""
    chosen = options[-1]
    for position in range(len(options) - 2, -1, -1):
        option = options[position]
        chosen = tuple(tirx.Select(index == position, option[p], chosen[p]) for p in (0, 1))
    return chosen[0], chosen[1]


def load(tensor: te.Tensor, *index: Expr) -> Complex:
    """Return a complex number stored as a pair on the last axis."""
    return tensor[(*index, 0)], tensor[(*index, 1)]


def load_flat(tensor: te.Tensor, start: Expr) -> Complex:
    """Return the complex number at float position `start` of a flat tensor."""
    return tensor[start], tensor[start + 1]


def compute(shape: Sequence[Expr], fcompute: Callable[..., Expr], name: str) -> te.Tensor:
    """`te.compute` for functions of any number of indices, with 64-bit extents."""
    extents = [int64(extent) if isinstance(extent, int) else extent for extent in shape]
    arguments = ", ".join(f"i{axis}" for axis in range(len(extents)))
    return te.compute(extents, eval(f"lambda {arguments}: f({arguments})", {"f": fcompute}), name=name)


def _dft3(x: Sequence[Complex], sign: int) -> list[Complex]:
    total = add(x[1], x[2])
    middle = sub(x[0], scale(total, real(0.5)))
    turned = times_i(scale(sub(x[1], x[2]), real(math.sqrt(0.75))), sign)
    return [add(x[0], total), add(middle, turned), sub(middle, turned)]


def _dft5(x: Sequence[Complex], sign: int) -> list[Complex]:
    cos1, cos2 = (real(math.cos(2 * math.pi * k / 5)) for k in (1, 2))
    sin1, sin2 = (real(math.sin(2 * math.pi * k / 5)) for k in (1, 2))
    sum14, sum23 = add(x[1], x[4]), add(x[2], x[3])
    diff14, diff23 = sub(x[1], x[4]), sub(x[2], x[3])
    even1 = add(x[0], add(scale(sum14, cos1), scale(sum23, cos2)))
    even2 = add(x[0], add(scale(sum14, cos2), scale(sum23, cos1)))
    odd1 = times_i(add(scale(diff14, sin1), scale(diff23, sin2)), sign)
    odd2 = times_i(sub(scale(diff14, sin2), scale(diff23, sin1)), sign)
    return [
        add(x[0], add(sum14, sum23)),
        add(even1, odd1),
        add(even2, odd2),
        sub(even2, odd2),
        sub(even1, odd1),
    ]


def _dft4(x: Sequence[Complex], sign: int) -> list[Complex]:
    even, odd = (add(x[0], x[2]), sub(x[0], x[2])), (add(x[1], x[3]), times_i(sub(x[1], x[3]), sign))
    return [add(even[0], odd[0]), add(even[1], odd[1]), sub(even[0], odd[0]), sub(even[1], odd[1])]


def dft(x: Sequence[Complex], sign: int) -> list[Complex]:
    """Return sum_s x[s] exp(sign 2 pi i s t / r) for all t, unrolled, for r = len(x) of 2, 3, 4 or 5."""
    if len(x) == 2:
        return [add(x[0], x[1]), sub(x[0], x[1])]
    return {3: _dft3, 4: _dft4, 5: _dft5}[len(x)](x, sign)


def rotate(value: Complex, k: int, size: int, sign: int) -> Complex:
    """Return value * exp(sign 2 pi i k / size), exact where k / size is a multiple of 1/4 or 1/8."""
    k %= size
    if 2 * k >= size:
        value, k = (-value[0], -value[1]), k - size // 2
    if k == 0:
        return value
    turned = times_i(value, sign)
    if 4 * k == size:
        return turned
    root = real(math.sqrt(0.5))
    if 8 * k == size:
        return scale(add(value, turned), root)
    if 8 * k == 3 * size:
        return scale(sub(turned, value), root)
    angle = 2 * math.pi * k / size
    return mul(value, (real(math.cos(angle)), real(sign * math.sin(angle))))


def load_lanes(tensor: te.Tensor, index: Sequence[Expr], lane: Expr) -> Complex:
    """Return a complex lane of a tensor whose last two axes are (real or imaginary, lane)."""
    return tensor[(*index, 0, lane)], tensor[(*index, 1, lane)]
