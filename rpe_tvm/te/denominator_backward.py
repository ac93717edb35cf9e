"""Denominators for the gradients by FFT, and their part in the gradients; features are lanes, 1/d of the work.

The single channel of the denominators is 1 on the side of the keys and w_i = -(grad_out_i . out_i) / den_i on that of
the queries; the rest is as in `fft_backward`.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.denominator import fft_denominator
from rpe_tvm.te.fft_backward import constants, feature_pair, products_of_sides
from rpe_tvm.te.lanes import channel, existing, lane_groups, place, twist, untwisted_sum
from rpe_tvm.te.shapes import Sizes
from rpe_tvm.te.toeplitz import transform


def fft_row_weights(config: BackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of what each row of grad_out is divided by, and of the rows' w; the outputs last.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, N2, N1]`, spectrum `[H, 2, P, 2]`, tables (flat), grad_out and out `[B, H, n_q, d]`;
        inverse (1 / den, 0 where den is 0) and w `[B, H, N2, N1]`, both 0 past the length.
    """
    d, lanes = config.head_dim, config.lanes
    split = split_of(config)
    *inputs, denominators = fft_denominator(config, sizes)
    shape = (sizes.batch, sizes.heads, sizes.n_query, cx.int64(d))
    grad_out, out = (te.placeholder(shape, cx.FLOAT, name) for name in ("grad_out", "out"))
    rows = (sizes.batch, sizes.heads, split.n2, split.n1)
    groups = lane_groups(config.num_features, lanes)

    def position(n2: Expr, n1: Expr) -> Expr:
        return split.position(n2, n1 // split.s, n1 % split.s)

    def inverse_of(b: Expr, h: Expr, n2: Expr, n1: Expr) -> Expr:
        den = sum(denominators[b, h, g, n2, n1 // split.s, n1 % split.s] for g in range(groups))
        found = tirx.Select(den == 0, cx.real(0.0), cx.real(1.0) / den)
        return tirx.Select(position(n2, n1) < sizes.n_query, found, cx.real(0.0))

    inverse = cx.compute(rows, inverse_of, "inverse")
    part = te.reduce_axis((cx.int64(0), cx.int64(-(-d // lanes))), "part")
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")

    def products(b: Expr, h: Expr, n2: Expr, n1: Expr, lane: Expr) -> Expr:
        ch = part * lanes + lane
        at = (b, h, tirx.min(position(n2, n1), sizes.n_query - 1), tirx.min(ch, d - 1))
        return te.sum(tirx.Select(ch < d, grad_out[at] * out[at], cx.real(0.0)), axis=part)

    lane_sums = cx.compute((*rows, lanes), products, "lane_sums")
    sums = cx.compute(rows, lambda *at: te.sum(lane_sums[(*at, lane_axis)], axis=lane_axis), "sums")

    def weight_of(b: Expr, h: Expr, n2: Expr, n1: Expr) -> Expr:
        weight = -sums[b, h, n2, n1] * inverse[b, h, n2, n1]
        return tirx.Select(position(n2, n1) < sizes.n_query, weight, cx.real(0.0))

    return [*inputs, grad_out, out, inverse, cx.compute(rows, weight_of, "w")]


def fft_denominator_backward(config: BackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients of the denominators, added to those of the numerators; the outputs last.

    With w_i = -sum_e g_ie out_ie: grad phi_q[f] += w (C phi_k[f]), grad phi_k[f] += C^T (w phi_q[f]), and the
    correlation of w phi_q[f] with phi_k[f].

    Returns
    -------
    list of te.Tensor
        phi `[2, B, H, m, N2, N1]` of queries and keys, w `[B, H, N2, N1]`, grad_phi as `fft_backward` returns it,
        spectrum `[2, H, 2, P, 2]` (of C and of C^T, its conjugate), tables (flat);
        total `[2, B, H, m, N2, N1]` and correlation `[B, H, groups, 2, N1, N2 / R, R, 2]`, to be summed over groups.
    """
    m, lanes = config.num_features, config.lanes
    batch, heads = sizes.batch, sizes.heads
    split = split_of(config)
    phi = feature_pair(config, sizes, "phi")
    weight = te.placeholder((batch, heads, *phi.shape[-2:]), cx.FLOAT, "w")
    sums = (batch, heads, config.parts, 2, m, split.n2, split.q, split.s)
    grad_phi = te.placeholder([cx.int64(n) if isinstance(n, int) else n for n in sums], cx.FLOAT, "grad_phi")
    spectrum, tables = constants(config, sizes)
    groups = lane_groups(m, lanes)
    radix = config.inner[-1]

    def pack(b: Expr, h: Expr, g: Expr, p: Expr, side: Expr, n2: Expr, q: Expr, s: Expr, c: Expr, lane: Expr) -> Expr:
        def element(half: int) -> Expr:
            ch = channel(g, half, lane, lanes)
            n1 = q * split.s + s
            factor = tirx.if_then_else(side == 0, cx.real(1.0), weight[b, h, n2, n1])
            return existing(ch, m, lanes, phi[1 - side, b, h, ch, n2, n1] * factor)

        return cx.part(c, twist(tables, p, split.position(n2, q, s), (element(0), element(1))))

    packed = cx.compute((batch, heads, groups, 2, 2, split.n2, split.q, split.s, 2, lanes), pack, "packed")
    rows = transform(
        "pair",
        config,
        (batch, heads, groups, 2, 2),
        tables,
        lambda at, n2, q, s, lane: cx.load_lanes(packed, (*at, n2, q, s), lane),
        lambda where, k1, k2, x: x,
    )
    weighted = products_of_sides(config, rows, spectrum, tables, head=1, parity=3)

    def of_group(b: Expr, h: Expr, g: Expr, side: Expr, n2: Expr, q: Expr, s: Expr, c: Expr, lane: Expr) -> Expr:
        both = [cx.load_lanes(weighted, (b, h, g, p, side, n2, 0, q, s), lane) for p in (0, 1)]
        factor = tirx.if_then_else(side == 0, weight[b, h, n2, q * split.s + s], cx.real(1.0))
        return cx.part(c, untwisted_sum(tables, split.position(n2, q, s), both)) * factor

    products = cx.compute((batch, heads, groups, 2, split.n2, split.q, split.s, 2, lanes), of_group, "products")

    def of_feature(side: Expr, b: Expr, h: Expr, ch: Expr, n2: Expr, n1: Expr) -> Expr:
        g, c, lane = place(ch, lanes)
        q, s = n1 // split.s, n1 % split.s
        numerators = sum(grad_phi[b, h, part, side, ch, n2, q, s] for part in range(config.parts))
        return products[b, h, g, side, n2, q, s, c, lane] + numerators

    total = cx.compute((2, batch, heads, m, split.n2, split.n1), of_feature, "total")
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")

    def correlate(b: Expr, h: Expr, g: Expr, p: Expr, k1: Expr, block: Expr, k: Expr, c: Expr) -> Expr:
        first, second = (cx.load_lanes(rows, (b, h, g, p, side, k1, block, 0, k), lane_axis) for side in (0, 1))
        return te.sum(cx.part(c, cx.mul_conj(first, second)), axis=lane_axis)

    frequencies = (split.n1, split.n2 // radix, radix, 2)
    correlation = cx.compute((batch, heads, groups, 2, *frequencies), correlate, "correlation")
    return [phi, weight, grad_phi, spectrum, tables.tensor, total, correlation]
