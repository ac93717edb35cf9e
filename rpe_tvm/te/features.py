"""Feature maps of query and key: projection and exp with features as lanes, then a row of positions per feature."""

from __future__ import annotations

from typing import Literal

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.elementary import exp
from rpe_tvm.te.shapes import Sizes

FeatureMap = Literal["prf", "nprf"]
FEATURE_MAPS: tuple[FeatureMap, ...] = ("prf", "nprf")


def features(config: AttentionConfig, sizes: Sizes, feature_map: FeatureMap) -> list[te.Tensor]:
    """Return the arguments of a feature map, the output last.

    PRF: phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m) with x' = x / d^(1/4). NPRF: the same with x' = x / |x|, where
    |x'|^2 / 2 = 1/2; a zero vector stays zero. Source: Luo et al. 2021, Eq. 5 and Algorithm 1.

    Parameters
    ----------
    config : AttentionConfig
        Gives the number of features m and the head dimension d.
    sizes : Sizes
        Batch, heads, `n_query` positions, blocks of 64 positions of the output.
    feature_map : {"prf", "nprf"}
        Which map.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n, d]`, projection W `[m, d]`, phi `[B, H, m, blocks, 64]`, zero from position n on.
    """
    m, d, lanes = config.num_features, config.head_dim, config.lanes
    vectors = -(-m // lanes)
    batch, heads, n = sizes.batch, sizes.heads, sizes.n_query
    x = te.placeholder((batch, heads, n, cx.int64(d)), cx.FLOAT, "x")
    projection = te.placeholder((cx.int64(m), cx.int64(d)), cx.FLOAT, "projection")
    blocks = sizes.blocks

    def row(b: Expr, h: Expr, block: Expr, i: Expr, k: Expr) -> Expr:
        # past the end the last position again: a bound instead of a branch; `phi` has zeros there
        return x[b, h, tirx.min(block * BLOCK + i, n - 1), k]

    # rows past m are not used, so any row may stand there
    weights = cx.compute(
        (d, vectors, lanes),
        lambda k, vector, lane: projection[tirx.min(vector * lanes + lane, m - 1), k],
        "projection_lanes",
    )
    k = te.reduce_axis((cx.int64(0), cx.int64(d)), "k")
    logits = cx.compute(
        (batch, heads, blocks, BLOCK, vectors, lanes),
        lambda b, h, block, i, vector, lane: te.sum(row(b, h, block, i, k) * weights[k, vector, lane], axis=k),
        "logits",
    )
    part = te.reduce_axis((cx.int64(0), cx.int64(-(-d // lanes))), "part")

    def square_term(b: Expr, h: Expr, block: Expr, i: Expr, lane: Expr) -> Expr:
        channel = part * lanes + lane
        entry = row(b, h, block, i, channel if d % lanes == 0 else tirx.min(channel, d - 1))
        return entry * entry if d % lanes == 0 else tirx.Select(channel < d, entry * entry, cx.real(0.0))

    squares = cx.compute(
        (batch, heads, blocks, BLOCK, lanes), lambda *at: te.sum(square_term(*at), axis=part), "squares"
    )
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    norm = cx.compute(
        (batch, heads, blocks, BLOCK), lambda *at: te.sum(squares[(*at, lane_axis)], axis=lane_axis), "norm"
    )
    if feature_map == "prf":
        scale = cx.compute(norm.shape, lambda *at: norm[at] * cx.real(-0.5 * d**-0.5), "scale")
    else:
        scale = cx.compute(
            norm.shape, lambda *at: tirx.Select(norm[at] > 0, cx.real(1.0) / tirx.sqrt(norm[at]), norm[at]), "scale"
        )

    def activate(b: Expr, h: Expr, block: Expr, i: Expr, vector: Expr, lane: Expr) -> Expr:
        at = (b, h, block, i)
        logit = logits[(*at, vector, lane)]
        if feature_map == "prf":
            exponent = logit * cx.real(d**-0.25) + scale[at]
        else:
            exponent = logit * scale[at] - cx.real(0.5)
        return exp(exponent) * cx.real(m**-0.5)

    activated = cx.compute((batch, heads, blocks, BLOCK, vectors, lanes), activate, "activated")

    def transpose(b: Expr, h: Expr, f: Expr, block: Expr, i: Expr) -> Expr:
        entry = activated[b, h, block, i, f // lanes, f % lanes]
        return tirx.Select(block * BLOCK + i < n, entry, cx.real(0.0))

    phi = cx.compute((batch, heads, m, blocks, BLOCK), transpose, "phi")
    return [x, projection, phi]
