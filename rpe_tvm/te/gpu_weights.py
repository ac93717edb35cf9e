"""From rpe_bias to the spectrum of the Toeplitz weights on GPUs.

c[t] = exp(b[t] - max b), t = j - i, for -(n_q - 1) <= t <= n_k - 1; zero elsewhere and, where causal, for t > 0.
Subtracting the largest allowed b of a head cancels between numerator and denominator.
Source: Luo et al. 2021, Eqs. 11-13.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import te, tirx

from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables
from rpe_tvm.te.shapes import Sizes

# threads that look for the largest bias of a head
LANES = 256


def weight_inputs(sizes: Sizes) -> tuple[te.Tensor, te.Tensor, Expr]:
    """Return the placeholders of rpe_bias, its largest entries, and whether queries see no later keys."""
    bias = te.placeholder((sizes.heads, sizes.n_query + sizes.n_key - 1), cx.FLOAT, "rpe_bias")
    return bias, te.placeholder((sizes.heads,), cx.FLOAT, "largest"), te.var("causal", "int64")


def folded_weight(
    config: GpuAttentionConfig,
    sizes: Sizes,
    tables: gpu_dft.Tables,
    bias: te.Tensor,
    largest: te.Tensor,
    causal: Expr,
    h: Expr,
    residue: Expr,
    position: Expr,
    part: Expr,
) -> Expr:
    """Return the real or imaginary part of what is transformed to a remainder of the spectrum, at a position."""

    def weight(t: Expr) -> Expr:
        valid = tirx.all(t > -sizes.n_query, t < sizes.n_key, tirx.any(causal == 0, t <= 0))
        found = tirx.exp(bias[h, t + sizes.n_query - 1] - largest[h])
        return tirx.if_then_else(valid, found * cx.real(0.5 / config.length), cx.real(0.0))

    return folded(config, tables, weight, residue, position, part)


def folded(
    config: GpuAttentionConfig,
    tables: gpu_dft.Tables,
    weight: Callable[[Expr], Expr],
    residue: Expr,
    position: Expr,
    part: Expr,
) -> Expr:
    """Return `folded_weight` of the function from an offset t = j - i to its weight over 2 P, 0 where there is none."""
    # the half of the 2 P points that starts at P differs by P turns of half a circle for each remainder
    same, wrapped = weight(-position), weight(config.length - position)
    sign = tirx.Select(residue % 2 == 0, cx.real(1.0), cx.real(-1.0))
    return cx.part(part, tables.twist(residue, position, (same + sign * wrapped, cx.real(0.0))))


def largest_bias(sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the largest bias that counts: rpe_bias `[H, n_q + n_k - 1]`, n_q, n_k, causal (0 or 1),
    largest `[H]`.
    """
    bias, _, causal = weight_inputs(sizes)
    count = sizes.n_query + sizes.n_key - 1
    chunks = te.reduce_axis((cx.int64(0), (count + LANES - 1) // LANES), "chunk")
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(LANES)), "lane")

    def candidate(h: Expr, offset: Expr) -> Expr:
        allowed = tirx.all(offset < count, tirx.any(causal == 0, offset < sizes.n_query))
        # NaN is left to exp(): a maximum would drop it
        return tirx.if_then_else(allowed, bias[h, offset], cx.real(-math.inf))

    lanes = te.compute(
        (sizes.heads, cx.int64(LANES)),
        lambda h, lane: te.max(candidate(h, chunks * LANES + lane), axis=chunks),
        name="lanes",
    )
    largest = te.compute((sizes.heads,), lambda h: te.max(lanes[h, lane_axis], axis=lane_axis), name="largest")
    return [bias, sizes.n_query, sizes.n_key, causal, largest]


def spectrum(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the spectrum of C by remainders.

    With g[s] = c[-s] over 2 P points, remainder r of R is the transform of sum_l g[s + l L] exp(-i pi r (s + l L) /
    P), with L = 2 P / R points, divided by 2 P.

    Returns
    -------
    list
        rpe_bias `[H, n_q + n_k - 1]`, largest `[H]`, n_q, n_k, causal (0 or 1), tables (flat), spectrum
        `[H, residues, R, row / R, 2]` with R the last radix: position block * R + t in digit order is element (t,
        block).
    """
    bias, largest, causal = weight_inputs(sizes)
    row, rest = config.row, config.row // config.radices[0]
    tables = make_tables(config)

    def fold(h: Expr, r: Expr, s: Expr, q: Expr, c: Expr) -> Expr:
        positions = [part * row + s * rest + q for part in range(config.folds)]
        return sum(folded_weight(config, sizes, tables, bias, largest, causal, h, r, x, c) for x in positions)

    result = spectrum_of(config, sizes, tables, fold)
    return [bias, largest, sizes.n_query, sizes.n_key, causal, tables.tensor, result]


def spectrum_of(
    config: GpuAttentionConfig,
    sizes: Sizes,
    tables: gpu_dft.Tables,
    fold: Callable[[Expr, Expr, Expr, Expr, Expr], Expr],
) -> te.Tensor:
    """Return the transforms of `fold(h, residue, s, q, part)`, `[H, residues, R, row / R, 2]`."""
    row, radices = config.row, config.radices
    rest, last = row // radices[0], radices[-1]
    packed = cx.compute((sizes.heads, config.residues, radices[0], rest, 2), fold, "packed")

    def load(at: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        return cx.load(packed, *at, s, q)

    ahead = gpu_dft.forward(
        "ahead", radices, (sizes.heads, config.residues), tables, load, lambda at, block, t, value: value
    )
    return cx.compute(
        (sizes.heads, config.residues, last, row // last, 2),
        lambda h, p, t, block, c: ahead[h, p, block, t, 0, 0, c],
        "spectrum",
    )
