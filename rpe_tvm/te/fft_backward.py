"""Gradients of kernelized attention with RPE by FFT: both transforms of a feature serve all four gradients.

With g_i = grad_out_i / den_i and, for each feature f, y_f = C (phi_k[f] * value) and z_f = C^T (phi_q[f] * g):

    grad phi_q[f]_i = sum_e g_ie y_f,ie
    grad phi_k[f]_j = sum_e value_je z_f,je
    grad value = sum_f phi_k[f] z_f

and the gradient of c is the correlation of phi_q[f] * g with phi_k[f] * value, summed over features and channels: the
product of their spectra, one conjugated. Only the real part of its inverse transform counts, because two channels ride
in one complex lane. "Side" 0 is y, with the spectrum of C, side 1 is z, with its conjugate. The same for the
denominators is in `denominator_backward`.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.lane_sums import sums_over_lanes
from rpe_tvm.te.lanes import channel, existing, lane_groups, place, twist, untwisted_sum
from rpe_tvm.te.shapes import Sizes, feature_rows
from rpe_tvm.te.toeplitz import at_frequency, transform, transform_back


def feature_pair(config: BackwardConfig, sizes: Sizes, name: str) -> te.Tensor:
    """Return the placeholder of features of queries and keys, `[2, B, H, m, N2, N1]`."""
    rows, columns = feature_rows(config, sizes)
    shape = (cx.int64(2), sizes.batch, sizes.heads, cx.int64(config.num_features), rows, columns)
    return te.placeholder(shape, cx.FLOAT, name)


def constants(config: BackwardConfig, sizes: Sizes) -> tuple[te.Tensor, dft.Tables]:
    """Return the placeholders of the spectra of C and of C^T, `[2, H, 2, P, 2]`, and of the tables."""
    where = twiddles.layout(config)
    shape = (cx.int64(2), sizes.heads, *map(cx.int64, (2, config.length, 2)))
    spectrum = te.placeholder(shape, cx.FLOAT, "spectrum")
    return spectrum, dft.Tables(te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables"), where)


def products_of_sides(
    config: BackwardConfig, rows: te.Tensor, spectrum: te.Tensor, tables: dft.Tables, head: int, parity: int
) -> te.Tensor:
    """Return the inverse transforms of both sides, the last leading index; `head` and `parity` are leading ones."""
    rank = len(rows.shape) - 6
    split = split_of(config)

    def weighted(at: tuple[Expr, ...], k1: Expr, k2: Expr, lane: Expr) -> cx.Complex:
        factor = cx.load(spectrum, at[-1], at[head], at[parity], k1 * split.n2 + k2)
        return cx.mul(at_frequency(config, rows, at, k1, k2, lane), factor)

    return transform_back("pair", config, tuple(rows.shape[:rank]), tables, weighted)


def fft_backward(config: BackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients of the numerators, the outputs last.

    Parameters
    ----------
    config : BackwardConfig
        An `fft` config.
    sizes : Sizes
        Batch, heads and lengths, symbolic or constant.

    Returns
    -------
    list of te.Tensor
        phi `[2, B, H, m, N2, N1]` of queries and keys (zero past the length), value `[B, H, n_k, d]`,
        grad_out `[B, H, n_q, d]`, inverse `[B, H, N2, N1]` (1 / den), spectrum `[2, H, 2, P, 2]` (of C and of C^T, its
        conjugate), tables (flat);
        grad_phi `[B, H, parts, 2, m, N2, Q, S]` and correlation `[B, H, parts, 2, N1, N2 / R, R, 2]`, to be summed over
        parts, and grad_value `[B, H, n_k, d]`.
    """
    m, d, lanes = config.num_features, config.head_dim, config.lanes
    batch, heads = sizes.batch, sizes.heads
    split = split_of(config)
    phi = feature_pair(config, sizes, "phi")
    value = te.placeholder((batch, heads, sizes.n_key, cx.int64(d)), cx.FLOAT, "value")
    grad_out = te.placeholder((batch, heads, sizes.n_query, cx.int64(d)), cx.FLOAT, "grad_out")
    inverse = te.placeholder((batch, heads, *phi.shape[-2:]), cx.FLOAT, "inverse")
    spectrum, tables = constants(config, sizes)
    parts = config.parts
    groups = lane_groups(d, lanes) // parts
    radix = config.inner[-1]

    def pack(
        b: Expr, h: Expr, part: Expr, g: Expr, p: Expr, side: Expr, n2: Expr, q: Expr, s: Expr, c: Expr, lane: Expr
    ) -> Expr:
        position = split.position(n2, q, s)

        def element(half: int) -> Expr:
            ch = channel(part * groups + g, half, lane, lanes)
            # past the end the last position again, whose features are zero: a bound instead of a branch
            of_value = value[b, h, tirx.min(position, sizes.n_key - 1), ch]
            of_grad = grad_out[b, h, tirx.min(position, sizes.n_query - 1), ch] * inverse[b, h, n2, q * split.s + s]
            return existing(ch, d, lanes, tirx.if_then_else(side == 0, of_value, of_grad))

        return cx.part(c, twist(tables, p, position, (element(0), element(1))))

    points = (split.n2, split.q, split.s)
    packed = cx.compute((batch, heads, parts, groups, 2, 2, *points, 2, lanes), pack, "packed")

    def load(at: tuple[Expr, ...], n2: Expr, q: Expr, s: int, lane: Expr) -> cx.Complex:
        b, h, part, g, p, feature, side = at
        weight = phi[1 - side, b, h, feature, n2, q * split.s + s]
        return cx.scale(cx.load_lanes(packed, (b, h, part, g, p, side, n2, q, s), lane), weight)

    lead = (batch, heads, parts, groups, 2, m, 2)
    rows = transform("pair", config, lead, tables, load, lambda where, k1, k2, x: x)
    products = products_of_sides(config, rows, spectrum, tables, head=1, parity=4)

    # grad phi: twisted products times twisted channels of the other side, whose twists cancel
    def dot(
        b: Expr, h: Expr, t: Expr, g: Expr, p: Expr, f: Expr, side: Expr, n2: Expr, q: Expr, s: Expr, lane: Expr
    ) -> Expr:
        product = cx.load_lanes(products, (b, h, t, g, p, f, side, n2, 0, q, s), lane)
        other = cx.load_lanes(packed, (b, h, t, g, p, 1 - side, n2, q, s), lane)
        return product[0] * other[0] + product[1] * other[1]

    dots = sums_over_lanes("dots", cx.compute((*lead, *points, lanes), dot, "dots"))
    group, parity, feature = (
        te.reduce_axis((cx.int64(0), cx.int64(n)), name) for n, name in ((groups, "g"), (2, "p"), (m, "f"))
    )

    def dot_of(b: Expr, h: Expr, t: Expr, side: Expr, f: Expr, n2: Expr, q: Expr, s: Expr) -> Expr:
        return te.sum(dots(b, h, t, group, parity, f, side, n2, q, s), axis=[group, parity])

    grad_phi = cx.compute((batch, heads, parts, 2, m, *points), dot_of, "grad_phi")

    sums = cx.compute(
        (batch, heads, parts, groups, 2, *points, 2, lanes),
        lambda b, h, t, g, p, n2, q, s, c, lane: te.sum(
            phi[1, b, h, feature, n2, q * split.s + s] * products[b, h, t, g, p, feature, 1, n2, 0, q, s, c, lane],
            axis=feature,
        ),
        "sums",
    )

    def grad_of_value(b: Expr, h: Expr, j: Expr, ch: Expr) -> Expr:
        position = j % config.length
        g, c, lane = place(ch, lanes)
        at = (g // groups, g % groups)
        both = [cx.load_lanes(sums, (b, h, *at, p, *split.packed(position)), lane) for p in (0, 1)]
        return cx.part(c, untwisted_sum(tables, position, both))

    grad_value = cx.compute((batch, heads, sizes.n_key, d), grad_of_value, "grad_value")

    # correlation: conj(spectrum of side 1) * spectrum of side 0
    group2, feature2 = (te.reduce_axis((cx.int64(0), cx.int64(n)), name) for n, name in ((groups, "g"), (m, "f")))

    frequencies = (split.n1, split.n2 // radix, radix, 2)

    def multiply(
        b: Expr, h: Expr, t: Expr, g: Expr, p: Expr, f: Expr, k1: Expr, block: Expr, k: Expr, lane: Expr
    ) -> Expr:
        at = (b, h, t, g, p, f)
        first, second = (cx.load_lanes(rows, (*at, side, k1, block, 0, k // 2), lane) for side in (0, 1))
        return cx.part(k % 2, cx.mul_conj(first, second))

    parts_of = (split.n1, split.n2 // radix, 2 * radix)  # real and imaginary parts in turns
    crossed = sums_over_lanes("crossed", cx.compute((*lead[:-1], *parts_of, lanes), multiply, "crossed"))

    def correlate(b: Expr, h: Expr, t: Expr, p: Expr, k1: Expr, block: Expr, k: Expr, c: Expr) -> Expr:
        return te.sum(crossed(b, h, t, group2, p, feature2, k1, block, 2 * k + c), axis=[group2, feature2])

    correlation = cx.compute((batch, heads, parts, 2, *frequencies), correlate, "correlation")
    return [phi, value, grad_out, inverse, spectrum, tables.tensor, grad_phi, correlation, grad_value]
