"""Gradients of PRF and NPRF: from those of the features to that of x, and to the exponents' for the projection."""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.features import FeatureMap
from rpe_tvm.te.shapes import Sizes, feature_buffer, feature_rows


def features_backward(config: AttentionConfig, sizes: Sizes, feature_map: FeatureMap) -> list[te.Tensor]:
    """Return the arguments of the gradient of a feature map, the outputs last.

    phi is an exponential, so the gradient of the exponent is e = phi grad_phi. With a = W^T e and x' as in `features`,
    grad x = (a - x' sum e) / d^(1/4) for PRF and (a - x' (x' . a)) / |x| for NPRF, 0 for a zero vector.
    Source: Luo et al. 2021, Eq. 5 and Algorithm 1, differentiated.

    Parameters
    ----------
    config : AttentionConfig
        Gives the number of features m, the head dimension d and the layout of features.
    sizes : Sizes
        Batch, heads, `n_query` positions.
    feature_map : {"prf", "nprf"}
        Which map.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n, d]`, projection W `[m, d]`, phi and grad_phi `[B, H, m, rows, columns]`;
        grad_exponent `[B, H, rows * columns, m]`, by position, and grad_x `[B, H, n, d]`.
    """
    m, d, lanes = config.num_features, config.head_dim, config.lanes
    batch, heads, n = sizes.batch, sizes.heads, sizes.n_query
    x = te.placeholder((batch, heads, n, cx.int64(d)), cx.FLOAT, "x")
    projection = te.placeholder((cx.int64(m), cx.int64(d)), cx.FLOAT, "projection")
    phi, grad_phi = (feature_buffer(config, sizes, name) for name in ("phi", "grad_phi"))
    rows, columns = feature_rows(config, sizes)

    def exponent(b: Expr, h: Expr, position: Expr, f: Expr) -> Expr:
        if config.algorithm == "direct":
            at = (b, h, f, position // BLOCK, position % BLOCK)
        else:
            split = split_of(config)
            n2, q, s = split.packed(position)
            at = (b, h, f, n2, q * split.s + s)
        return phi[at] * grad_phi[at]

    grad_exponent = cx.compute((batch, heads, rows * columns, m), exponent, "grad_exponent")
    feature, feature2 = (te.reduce_axis((cx.int64(0), cx.int64(m)), name) for name in ("feature", "feature2"))
    along = cx.compute(
        (batch, heads, n, -(-d // lanes), lanes),
        lambda b, h, i, vector, lane: te.sum(
            grad_exponent[b, h, i, feature] * projection[feature, tirx.min(vector * lanes + lane, d - 1)], axis=feature
        ),
        "along",
    )
    if feature_map == "prf":
        total = cx.compute(
            (batch, heads, n), lambda b, h, i: te.sum(grad_exponent[b, h, i, feature2], axis=feature2), "total"
        )
        scale = cx.compute((batch, heads, n), lambda b, h, i: cx.real(d**-0.25), "scale")
    else:
        total, scale = _of_direction(x, along, lanes)

    def of_x(b: Expr, h: Expr, i: Expr, ch: Expr) -> Expr:
        at = (b, h, i)
        return (along[(*at, ch // lanes, ch % lanes)] - x[(*at, ch)] * scale[at] * total[at]) * scale[at]

    grad_x = cx.compute((batch, heads, n, d), of_x, "grad_x")
    return [x, projection, phi, grad_phi, grad_exponent, grad_x]


def _of_direction(x: te.Tensor, along: te.Tensor, lanes: int) -> tuple[te.Tensor, te.Tensor]:
    """Return x' . a and 1 / |x|, 0 where |x| is, `[B, H, n]`."""
    *rows, d = x.shape
    part = te.reduce_axis((cx.int64(0), along.shape[-2]), "part")
    kind = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")

    def products(b: Expr, h: Expr, i: Expr, which: Expr, lane: Expr) -> Expr:
        channel = part * lanes + lane
        element = x[b, h, i, tirx.min(channel, d - 1)]
        other = tirx.Select(which == 0, element, along[b, h, i, part, lane])
        return te.sum(tirx.Select(channel < d, element * other, cx.real(0.0)), axis=part)

    lane_sums = cx.compute((*rows, 2, lanes), products, "lane_sums")
    sums = cx.compute((*rows, 2), lambda *at: te.sum(lane_sums[(*at, kind)], axis=kind), "sums")

    def inverse(b: Expr, h: Expr, i: Expr) -> Expr:
        square = sums[b, h, i, 0]
        return tirx.Select(square > 0, cx.real(1.0) / tirx.sqrt(square), square)

    scale = cx.compute(rows, inverse, "scale")
    return cx.compute(rows, lambda b, h, i: sums[b, h, i, 1] * scale[b, h, i], "total"), scale
