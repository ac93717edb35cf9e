"""From rpe_bias to the table of Toeplitz weights that an attention operator reads.

c[t] = exp(b[t] - max b), t = j - i, for -(n_q - 1) <= t <= n_k - 1; zero elsewhere and, where causal, for t > 0.
Subtracting the largest allowed b of a head cancels between numerator and denominator.
Source: Luo et al. 2021, Eqs. 11-13.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import te, tirx

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import Factorised, split_of
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.elementary import exp
from rpe_tvm.te.shapes import Sizes


def _exp_bias(sizes: Sizes, bias: te.Tensor, causal: Expr) -> Callable[[Expr, Expr], Expr]:
    """Return the function (head, offset t) -> c[t]."""
    count = sizes.n_query + sizes.n_key - 1
    offset = te.reduce_axis((cx.int64(0), count), "offset")
    allowed = tirx.any(causal == 0, offset < sizes.n_query)

    def candidate(h: Expr) -> Expr:
        # NaN is left to exp(): a maximum would drop it
        return tirx.Select(allowed, bias[h, offset], cx.real(-math.inf))

    largest = te.compute((sizes.heads,), lambda h: te.max(candidate(h), axis=offset), name="largest")

    def weight(h: Expr, t: Expr) -> Expr:
        valid = tirx.all(t > -sizes.n_query, t < sizes.n_key, tirx.any(causal == 0, t <= 0))
        return tirx.if_then_else(valid, exp(bias[h, t + sizes.n_query - 1] - largest[h]), cx.real(0.0))

    return weight


def _inputs(sizes: Sizes) -> tuple[te.Tensor, Expr]:
    bias = te.placeholder((sizes.heads, sizes.n_query + sizes.n_key - 1), cx.FLOAT, "rpe_bias")
    return bias, te.var("causal", "int64")


def direct_weights(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the weight table of `direct`: entry `t + width / 2` of the table is c[t].

    Entry 0, an offset that no pair of positions has, is `causal`: tiles of keys after all of their queries have no
    weight, and `build.tile_ends` skips them.

    Returns
    -------
    list
        rpe_bias `[H, n_q + n_k - 1]`, n_q, n_k, causal (0 or 1), tables (unused), table `[H, width]`.
    """
    bias, causal = _inputs(sizes)
    weight = _exp_bias(sizes, bias, causal)
    tables = te.placeholder((cx.int64(1),), cx.FLOAT, "tables")
    width = te.var("width", "int64") if sizes.is_symbolic else 2 * BLOCK * sizes.blocks
    table = te.compute(
        (sizes.heads, width),
        lambda h, u: tirx.Select(u == 0, causal.astype(cx.FLOAT), weight(h, u - width // 2)),
        name="table",
    )
    return [bias, sizes.n_query, sizes.n_key, causal, tables, table]


def fft_weights(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the spectrum of exp(b).

    Returns
    -------
    list
        rpe_bias `[H, n_q + n_k - 1]`, n_q, n_k, causal (0 or 1), tables, spectrum `[H, 2, P, 2]` as of `_spectrum`.
    """
    bias, causal = _inputs(sizes)
    return [bias, sizes.n_query, sizes.n_key, causal, *_spectrum(config, sizes, _exp_bias(sizes, bias, causal))]


def plain_weights(config: Factorised, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the spectrum of weights that are taken as they are.

    Returns
    -------
    list
        weights `[H, n_out + n_in - 1]`, n_out, n_in, tables, spectrum `[H, 2, P, 2]` as of `_spectrum`.
    """
    weights = te.placeholder((sizes.heads, sizes.n_query + sizes.n_key - 1), cx.FLOAT, "weights")

    def weight(h: Expr, t: Expr) -> Expr:
        valid = tirx.all(t > -sizes.n_query, t < sizes.n_key)
        return tirx.if_then_else(valid, weights[h, t + sizes.n_query - 1], cx.real(0.0))

    return [weights, sizes.n_query, sizes.n_key, *_spectrum(config, sizes, weight)]


def _spectrum(config: Factorised, sizes: Sizes, weight: Callable[[Expr, Expr], Expr]) -> tuple[te.Tensor, te.Tensor]:
    """Return the tables and the transforms `[H, 2, P, 2]` of the circulant and the skew-circulant part, in digit order.

    With g[s] = c[-s], the part of parity p is FFT_P of (g[s] +- g[s - P]) exp(-i pi p s / P), divided by 2 P.
    Positions are lanes: the columns of the four-step split first, then its rows.
    """
    split = split_of(config)
    length = config.length
    where = twiddles.layout(config)
    constants = te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables")
    tables = dft.Tables(constants, where)
    folded = cx.compute(
        (sizes.heads, 2, length),
        lambda h, sign, s: tirx.Select(sign == 0, weight(h, -s), weight(h, length - s)) * cx.real(0.5 / length),
        "folded",
    )

    def load(at: tuple[Expr, ...], _: Expr, q: Expr, s: int, n2: Expr) -> Complex:
        h, p = at
        position = split.position(n2, q, s)
        same, wrapped = folded[h, 0, position], folded[h, 1, position]
        turned = cx.scale(tables.parity(position), same - wrapped)
        return (
            tirx.Select(p == 0, same + wrapped, turned[0]),
            tirx.Select(p == 0, cx.real(0.0), turned[1]),
        )

    lead = (sizes.heads, 2)
    columns = dft.forward(
        "spectrum_columns", config.outer, lead, 1, split.n2, tables, load, lambda at, b, k1, value: value
    )

    def load_row(at: tuple[Expr, ...], _: Expr, q: Expr, s: int, k1: Expr) -> Complex:
        n2 = s * (split.n2 // config.inner[0]) + q
        radix = config.outer[-1]
        value = cx.load_lanes(columns, (*at, 0, k1 // radix, 0, k1 % radix), n2)
        return cx.mul(value, tables.split(n2, k1, split.n1))

    rows = dft.forward(
        "spectrum_rows", config.inner, lead, 1, split.n1, tables, load_row, lambda at, b, k2, value: value
    )
    radix = config.inner[-1]

    def ordered(h: Expr, p: Expr, position: Expr, c: Expr) -> Expr:
        k1, k2 = position // split.n2, position % split.n2
        return rows[h, p, 0, k2 // radix, 0, k2 % radix, c, k1]

    spectrum = cx.compute((sizes.heads, 2, length, 2), ordered, "spectrum")
    return constants, spectrum
