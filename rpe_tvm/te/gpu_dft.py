"""DFT stages for GPUs, one `te.compute` per stage: butterflies in registers, between them shared memory.

A forward transform decimates in frequency, an inverse one in time with the same radices, so the spectrum stays in
digit order and nothing is ever permuted. Neighbouring threads have neighbouring q, so that they read and write
neighbouring numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import te, tirx

from rpe_tvm.plan.gpu import COMPOSITE, TableLayout
from rpe_tvm.plan.twiddles import stage_sizes
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Complex, Expr

Index = tuple[Expr, ...]

# (leading indices, s, q) -> input s * (P / radix) + q of a forward transform
LoadForward = Callable[[Index, int, Expr], Complex]
# (leading indices, block, t) -> input block * radix + t, in digit order, of an inverse transform
LoadInverse = Callable[[Index, Expr, int], Complex]
# (leading indices, block, t, value) -> value, applied to the result of a forward transform
Finish = Callable[[Index, Expr, int, Complex], Complex]


@dataclass(frozen=True)
class Tables:
    """The flat tensor of constants and where each table starts in it."""

    tensor: te.Tensor
    layout: TableLayout
    length: int
    folds: int

    def twiddle(self, size: int, radix: int, t: int, q: Expr) -> Complex:
        if t > 4 and t % 4:  # 6 numbers in registers in place of 15
            return cx.mul(self.twiddle(size, radix, t - t % 4, q), self.twiddle(size, radix, t % 4, q))
        return cx.load_flat(self.tensor, self.layout.stages[size, radix] + 2 * (t * (size // radix) + q))

    def split(self, k1: Expr, n2: Expr, row: int) -> Complex:
        return cx.load_flat(self.tensor, self.layout.split + 2 * (k1 * row + n2))

    def turn(self, residue: Expr, position: Expr) -> Complex:
        """exp(-i pi residue position / P)"""
        return cx.load_flat(self.tensor, self.layout.turns + 2 * (residue * position % (2 * self.length)))

    def twist(self, residue: Expr, position: Expr, value: Complex) -> Complex:
        """Shift the frequencies of a remainder so that they are those of a transform of P / folds points."""
        if self.folds > 1:
            return cx.mul(value, self.turn(residue, position))
        turned = cx.mul(value, self._turn(position))
        return tuple(tirx.Select(residue == 0, value[k], turned[k]) for k in (0, 1))

    def untwist(self, residue: Expr, position: Expr, value: Complex) -> Complex:
        """Undo `twist`."""
        if self.folds > 1:
            return cx.mul_conj(value, self.turn(residue, position))
        turned = cx.mul_conj(value, self._turn(position))
        return tuple(tirx.Select(residue == 0, value[k], turned[k]) for k in (0, 1))

    def untwisted_sum(self, position: Expr, values: Sequence[Complex]) -> Complex:
        """Return the sum over remainders, shifted back."""
        total = values[0]
        for residue in range(1, len(values)):
            turn = self.turn(residue, position) if self.folds > 1 else self._turn(position)
            total = cx.add(total, cx.mul_conj(values[residue], turn))
        return total

    def _turn(self, position: Expr) -> Complex:
        return cx.load_flat(self.tensor, self.layout.turns + 2 * position)


def _dft(x: Sequence[Complex], sign: int) -> list[Complex]:
    """Return the DFT of 2, 3, 4, 5 or 8 values, unrolled."""
    if len(x) != 8:
        return cx.dft(x, sign)
    even, odd = cx.dft(x[0::2], sign), cx.dft(x[1::2], sign)
    turned = [cx.rotate(odd[k], k, 8, sign) for k in range(4)]
    return [cx.add(even[k], turned[k]) for k in range(4)] + [cx.sub(even[k], turned[k]) for k in range(4)]


def butterfly(
    name: str, shape: Sequence[Expr], radix: int, sign: int, load: Callable[[Index, int], Complex]
) -> Callable[[Index], list[Complex]]:
    """Return the function indices -> DFT of the `radix` values `load(indices, s)`.

    A composite radix has a stage of its own for its first factor, `<name>_first`: as one expression the compiler would
    lose the common parts.
    """
    if radix not in COMPOSITE:
        return lambda where: cx.dft([load(where, s) for s in range(radix)], sign)
    factor1, factor2 = COMPOSITE[radix]

    def first(*index: Expr) -> Expr:
        where, (t1, q, c) = index[:-3], index[-3:]
        x = [cx.choose(q, [load(where, s1 * factor2 + q2) for q2 in range(factor2)]) for s1 in range(factor1)]
        y = _dft(x, sign)
        turned = [cx.choose(q, [cx.rotate(y[k], k * q2, radix, sign) for q2 in range(factor2)]) for k in range(factor1)]
        return cx.part(c, cx.choose(t1, turned))

    halves = cx.compute((*shape, factor1, factor2, 2), first, f"{name}_first")

    def second(where: Index) -> list[Complex]:
        columns = [cx.dft([cx.load(halves, *where, t1, q) for q in range(factor2)], sign) for t1 in range(factor1)]
        return [columns[t % factor1][t // factor1] for t in range(radix)]

    return second


def forward(
    name: str, radices: tuple[int, ...], lead: Sequence[Expr], tables: Tables, load: LoadForward, finish: Finish
) -> te.Tensor:
    """Return forward transforms in digit order; blocks are named `<name><stage>`.

    Stage k has shape `lead + [blocks, radix, next radix, rest, 2]`, the next stage's inputs on an axis of their own:
    position block * radix + t in digit order in the last stage, where both are 1.
    """
    result: te.Tensor = None
    blocks, rank = 1, len(lead)
    for number, (size, radix) in enumerate(stage_sizes(radices)):
        rest = size // radix

        def load_stage(
            index: Index, s: int, previous: te.Tensor = result, before: int = radices[number - 1]
        ) -> Complex:
            where, (block, q) = index[:rank], index[rank:]
            if previous is None:
                return load(where, s, q)
            return cx.load(previous, *where, block // before, block % before, s, q)

        following = (*radices, 1)[number + 1]
        shape = (*lead, blocks, rest)
        butterfly_of = butterfly(f"{name}{number}", shape, radix, -1, load_stage)

        def stage(
            *index: Expr,
            butterfly_of: Callable[[Index], list[Complex]] = butterfly_of,
            rest: int = rest,
            radix: int = radix,
            size: int = size,
            following: int = following,
        ) -> Expr:
            *where, block, t, s, q, c = index
            q = s * (rest // following) + q
            y = butterfly_of((*where, block, q))
            if rest > 1:
                y = [y[0]] + [cx.mul(y[k], tables.twiddle(size, radix, k, q)) for k in range(1, radix)]
            else:
                y = [finish(tuple(where), block, k, y[k]) for k in range(radix)]
            return cx.part(c, cx.choose(t, y))

        result = cx.compute((*lead, blocks, radix, following, rest // following, 2), stage, f"{name}{number}")
        blocks *= radix
    return result


def inverse(name: str, radices: tuple[int, ...], lead: Sequence[Expr], tables: Tables, load: LoadInverse) -> te.Tensor:
    """Return unscaled inverse transforms of spectra in digit order; blocks are named `<name><stage>`.

    Stage k has shape `lead + [blocks, radix, rest, 2]`; in the last one blocks is 1 and the element (s, q) is output
    s * (P / radix) + q in natural order.
    """
    result: te.Tensor = None
    blocks, rank = math.prod(radices), len(lead)
    for number, (size, radix) in enumerate(reversed(stage_sizes(radices))):
        rest = size // radix
        blocks //= radix

        def load_stage(
            index: Index, t: int, previous: te.Tensor = result, radix: int = radix, size: int = size
        ) -> Complex:
            where, (block, q) = index[:rank], index[rank:]
            if previous is None:
                return load(where, block, t)
            before = int(previous.shape[rank + 2])
            value = cx.load(previous, *where, block * radix + t, q // before, q % before)
            return value if t == 0 else cx.mul_conj(value, tables.twiddle(size, radix, t, q))

        butterfly_of = butterfly(f"{name}{number}", (*lead, blocks, rest), radix, +1, load_stage)

        def stage(*index: Expr, butterfly_of: Callable[[Index], list[Complex]] = butterfly_of) -> Expr:
            *where, block, s, q, c = index
            return cx.part(c, cx.choose(s, butterfly_of((*where, block, q))))

        result = cx.compute((*lead, blocks, radix, rest, 2), stage, f"{name}{number}")
    return result
