"""Gradients of feature maps' arguments: the projection, transposed, of the gradients of the exponents.

With e_f = phi_f grad phi_f, a = W^T e and x' as in `te.features`: PRF: (a - x' sum_f e_f) / d^(1/4); NPRF:
(a - x' (x' . a)) / |x|, 0 for x = 0. Source: Luo et al. 2021, Eq. 5 and Algorithm 1, differentiated.
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.features import FeatureMap
from rpe_tvm.te.shapes import Sizes, feature_buffer


def feature_gradients(config: AttentionConfig, sizes: Sizes, feature_map: FeatureMap) -> list[te.Tensor]:
    """Return the arguments of the gradient of a feature map's argument, the output last.

    Parameters
    ----------
    config : AttentionConfig
        A `direct` config.
    sizes : Sizes
        Batch, heads, `n_query` positions and blocks of 64 of them.
    feature_map : {"prf", "nprf"}
        Which map.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n, d]`, projection W `[m, d]`, phi and grad_phi `[B, H, m, blocks, 64]`, grad_x `[B, H, n, d]`.
    """
    m, d, lanes = config.num_features, config.head_dim, config.lanes
    width = -(-d // lanes) * lanes
    batch, heads, n = sizes.batch, sizes.heads, sizes.n_query
    x = te.placeholder((batch, heads, n, cx.int64(d)), cx.FLOAT, "x")
    projection = te.placeholder((cx.int64(m), cx.int64(d)), cx.FLOAT, "projection")
    phi, grad_phi = (feature_buffer(config, sizes, name) for name in ("phi", "grad_phi"))
    tiles = -(-config.length // BLOCK)
    positions = (batch, heads, tiles, BLOCK)

    def existing(channel: Expr, element: Expr) -> Expr:
        return element if width == d else tirx.if_then_else(channel < d, element, cx.real(0.0))

    weights = cx.compute((m, width), lambda f, channel: existing(channel, projection[f, channel]), "weights")
    exponents = cx.compute(
        (batch, heads, tiles, m, BLOCK),
        lambda b, h, t, f, i: phi[b, h, f, t, i] * grad_phi[b, h, f, t, i],
        "exponents",
    )
    argument = cx.compute(
        (*positions, width),
        # past the end the last position again: a bound instead of a branch
        lambda b, h, t, i, channel: existing(channel, x[b, h, tirx.min(t * BLOCK + i, n - 1), channel]),
        "argument",
    )
    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    along = cx.compute(
        (*positions, width),
        lambda b, h, t, i, channel: te.sum(exponents[b, h, t, feature, i] * weights[feature, channel], axis=feature),
        "along",
    )
    if feature_map == "prf":
        feature2 = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
        total = cx.compute(
            positions, lambda b, h, t, i: te.sum(exponents[b, h, t, feature2, i], axis=feature2), "total"
        )
        scale = cx.compute(positions, lambda *at: cx.real(d**-0.25), "scale")
        inward = cx.compute(positions, lambda *at: total[at] * scale[at], "inward")
    else:
        squares, products = (_dot(argument, other, lanes, name) for other, name in ((argument, "norm"), (along, "dot")))
        # 0 for a zero vector, NaN stays NaN
        scale = cx.compute(
            positions,
            lambda *at: tirx.Select(squares[at] > 0, cx.real(1.0) / tirx.sqrt(squares[at]), squares[at]),
            "scale",
        )
        inward = cx.compute(positions, lambda *at: products[at] * scale[at] * scale[at], "inward")

    def gradient(b: Expr, h: Expr, i: Expr, channel: Expr) -> Expr:
        # n never exceeds the bucket; the remainder tells TVM so, which could not prove that the tile exists
        at = (b, h, i // BLOCK % tiles, i % BLOCK)
        return (along[(*at, channel)] - argument[(*at, channel)] * inward[at]) * scale[at]

    return [x, projection, phi, grad_phi, cx.compute((batch, heads, n, d), gradient, "grad_x")]


def _dot(a: te.Tensor, b: te.Tensor, lanes: int, name: str) -> te.Tensor:
    """Return the inner products of rows, summed in lanes first."""
    part = te.reduce_axis((cx.int64(0), a.shape[-1] // lanes), "part")
    in_lanes = cx.compute(
        (*a.shape[:-1], lanes),
        lambda *at: te.sum(a[(*at[:-1], part * lanes + at[-1])] * b[(*at[:-1], part * lanes + at[-1])], axis=part),
        f"{name}_lanes",
    )
    lane = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    return cx.compute(a.shape[:-1], lambda *at: te.sum(in_lanes[(*at, lane)], axis=lane), name)
