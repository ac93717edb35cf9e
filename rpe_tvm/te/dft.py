"""DFT stages as tensor expressions, one `te.compute` per stage, for many independent lanes at once.

A forward transform decimates in frequency, an inverse one in time with the same radices, so the spectrum stays in
digit order (`plan.twiddles.digit_order`) and nothing is ever permuted. Lanes are the last axis: twiddles are scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import te

from rpe_tvm.plan.twiddles import TableLayout, stage_sizes
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Complex, Expr

# Radices that are made of two: the first factor's butterflies stay in registers.
COMPOSITE = {8: (2, 4)}

Index = tuple[Expr, ...]

# (leading indices, batch, q, s, lane) -> input s * (size / radix) + q of the transform
LoadForward = Callable[[tuple[Expr, ...], Expr, Expr, int, Expr], Complex]
# (leading indices, batch, position in digit order, lane) -> input of the inverse transform
LoadInverse = Callable[[tuple[Expr, ...], Expr, Expr, Expr], Complex]
# (leading indices, batch, position in digit order, value) -> value, applied to the result of a forward transform
Finish = Callable[[tuple[Expr, ...], Expr, Expr, Complex], Complex]


@dataclass(frozen=True)
class Tables:
    """The flat tensor of constants and where each table starts in it."""

    tensor: te.Tensor
    layout: TableLayout

    def twiddle(self, size: int, radix: int, q: Expr, t: Expr) -> Complex:
        return cx.load_flat(self.tensor, self.layout.stages[size, radix] + 2 * (q * radix + t))

    def split(self, n2: Expr, k1: Expr, size1: int) -> Complex:
        return cx.load_flat(self.tensor, self.layout.split + 2 * (n2 * size1 + k1))

    def parity(self, position: Expr) -> Complex:
        return cx.load_flat(self.tensor, self.layout.parity + 2 * position)


def _butterfly(
    name: str, lead: Sequence[Expr], radix: int, lanes: int, sign: int, load: Callable[[Index, int, Expr], Complex]
) -> Callable[[Index, Expr], list[Complex]]:
    """Return the function (indices of `lead`, lane) -> DFT of the `radix` values `load(indices, s, lane)`.

    A composite radix has a stage of its own for its first factor, `<name>_first`, which schedules keep in registers:
    the expressions of a whole radix 8 at once are so large that compilers lose the common parts.
    """
    rank = len(lead)
    if radix not in COMPOSITE:
        return lambda where, lane: cx.dft([load(where, s, lane) for s in range(radix)], sign)
    factor1, factor2 = COMPOSITE[radix]

    def first(*index: Expr) -> Expr:
        where, (t1, q, c, lane) = index[:rank], index[rank:]
        x = [cx.choose(q, [load(where, s1 * factor2 + q2, lane) for q2 in range(factor2)]) for s1 in range(factor1)]
        y = cx.dft(x, sign)
        turned = [cx.choose(q, [cx.rotate(y[k], k * q2, radix, sign) for q2 in range(factor2)]) for k in range(factor1)]
        return cx.part(c, cx.choose(t1, turned))

    halves = cx.compute((*lead, factor1, factor2, 2, lanes), first, f"{name}_first")

    def second(where: tuple[Expr, ...], lane: Expr) -> list[Complex]:
        columns = [
            cx.dft([cx.load_lanes(halves, (*where, t1, q), lane) for q in range(factor2)], sign)
            for t1 in range(factor1)
        ]
        return [columns[t % factor1][t // factor1] for t in range(radix)]

    return second


def forward(
    name: str,
    radices: tuple[int, ...],
    lead: Sequence[Expr],
    batch: int,
    lanes: int,
    tables: Tables,
    load: LoadForward,
    finish: Finish,
) -> te.Tensor:
    """Return `batch` forward transforms in digit order; blocks are named `<name><stage>`.

    Stage k has shape `lead + [batch, blocks, q, radix, 2, lanes]`: `blocks` counts the digits that are done,
    digit-ordered position = block * radix + t in the last stage, where q has extent 1.
    """
    result: te.Tensor = None
    blocks = 1
    rank = len(lead)
    for number, (size, radix) in enumerate(stage_sizes(radices)):
        rest = size // radix

        def load_stage(
            index: Index,
            s: int,
            lane: Expr,
            previous: te.Tensor = result,
            rest: int = rest,
            before: int = radices[number - 1],
        ) -> Complex:
            where, (b, block, q) = index[:rank], index[rank:]
            if previous is None:
                return load(where, b, q, s, lane)
            return cx.load_lanes(previous, (*where, b, block // before, s * rest + q, block % before), lane)

        shape = (*lead, batch, blocks, rest)
        butterfly = _butterfly(f"{name}{number}", shape, radix, lanes, -1, load_stage)

        def stage(
            *index: Expr,
            butterfly: Callable[[Index, Expr], list[Complex]] = butterfly,
            rest: int = rest,
            radix: int = radix,
            size: int = size,
        ) -> Expr:
            *at, t, c, lane = index
            where, (b, block, q) = tuple(at[:rank]), at[rank:]
            y = butterfly(tuple(at), lane)
            if rest > 1:
                y = [y[0]] + [cx.mul(y[k], tables.twiddle(size, radix, q, k)) for k in range(1, radix)]
            else:
                y = [finish(where, b, block * radix + k, y[k]) for k in range(radix)]
            return cx.part(c, cx.choose(t, y))

        result = cx.compute((*shape, radix, 2, lanes), stage, f"{name}{number}")
        blocks *= radix
    return result


def inverse(
    name: str,
    radices: tuple[int, ...],
    lead: Sequence[Expr],
    batch: int,
    lanes: int,
    tables: Tables,
    load: LoadInverse,
) -> te.Tensor:
    """Return `batch` unscaled inverse transforms of spectra in digit order; blocks are named `<name><stage>`.

    Stage k has shape `lead + [batch, blocks, q, radix, 2, lanes]`; in the last one blocks has extent 1 and the
    element (q, s) is output s * (size / radix) + q in natural order.
    """
    result: te.Tensor = None
    blocks = math.prod(radices)
    rank = len(lead)
    for number, (size, radix) in enumerate(reversed(stage_sizes(radices))):
        rest = size // radix
        blocks //= radix

        def load_stage(
            index: Index,
            t: int,
            lane: Expr,
            previous: te.Tensor = result,
            radix: int = radix,
            size: int = size,
        ) -> Complex:
            where, (b, block, q) = index[:rank], index[rank:]
            if previous is None:
                return load(where, b, block * radix + t, lane)
            rest_before = int(previous.shape[rank + 2])
            at = (*where, b, block * radix + t, q % rest_before, q // rest_before)
            value = cx.load_lanes(previous, at, lane)
            return value if t == 0 else cx.mul_conj(value, tables.twiddle(size, radix, q, t))

        shape = (*lead, batch, blocks, rest)
        butterfly = _butterfly(f"{name}{number}", shape, radix, lanes, +1, load_stage)

        def stage(*index: Expr, butterfly: Callable[[Index, Expr], list[Complex]] = butterfly) -> Expr:
            *at, s, c, lane = index
            return cx.part(c, cx.choose(s, butterfly(tuple(at), lane)))

        result = cx.compute((*shape, radix, 2, lanes), stage, f"{name}{number}")
    return result
