"""Feature maps of query and key: projection and exp with features as lanes, then a row of positions per feature."""

from __future__ import annotations

from typing import Literal

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.elementary import exp
from rpe_tvm.te.shapes import Sizes, feature_rows

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
        Batch, heads, `n_query` positions; for `direct` the blocks of 64 positions of the output.
    feature_map : {"prf", "nprf"}
        Which map.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n, d]`, projection W `[m, d]`, phi `[B, H, m, rows, columns]` as `plan.twiddles.feature_shape` says,
        zero from position n on.
    """
    m, d, lanes = config.num_features, config.head_dim, config.lanes
    vectors = -(-m // lanes)
    batch, heads, n = sizes.batch, sizes.heads, sizes.n_query
    x = te.placeholder((batch, heads, n, cx.int64(d)), cx.FLOAT, "x")
    projection = te.placeholder((cx.int64(m), cx.int64(d)), cx.FLOAT, "projection")
    rows, columns = feature_rows(config, sizes)

    def position(row: Expr, column: Expr) -> Expr:
        if config.algorithm == "direct":
            return row * BLOCK + column
        split = split_of(config)
        return split.position(row, column // split.s, column % split.s)

    def entry(b: Expr, h: Expr, row: Expr, column: Expr, k: Expr) -> Expr:
        # past the end the last position again: a bound instead of a branch; `phi` has zeros there
        return x[b, h, tirx.min(position(row, column), n - 1), k]

    # rows past m are not used, so any row may stand there
    projection_lanes = cx.compute(
        (d, vectors, lanes),
        lambda k, vector, lane: projection[tirx.min(vector * lanes + lane, m - 1), k],
        "projection_lanes",
    )
    k = te.reduce_axis((cx.int64(0), cx.int64(d)), "k")
    logits = cx.compute(
        (batch, heads, rows, columns, vectors, lanes),
        lambda b, h, row, column, vector, lane: te.sum(
            entry(b, h, row, column, k) * projection_lanes[k, vector, lane], axis=k
        ),
        "logits",
    )
    part = te.reduce_axis((cx.int64(0), cx.int64(-(-d // lanes))), "part")

    def square_term(b: Expr, h: Expr, row: Expr, column: Expr, lane: Expr) -> Expr:
        channel = part * lanes + lane
        element = entry(b, h, row, column, tirx.min(channel, d - 1))
        return tirx.Select(channel < d, element * element, cx.real(0.0))

    squares = cx.compute(
        (batch, heads, rows, columns, lanes), lambda *at: te.sum(square_term(*at), axis=part), "squares"
    )
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    norm = cx.compute(
        (batch, heads, rows, columns), lambda *at: te.sum(squares[(*at, lane_axis)], axis=lane_axis), "norm"
    )
    if feature_map == "prf":
        scale = cx.compute(norm.shape, lambda *at: norm[at] * cx.real(-0.5 * d**-0.5), "scale")
    else:
        scale = cx.compute(
            norm.shape, lambda *at: tirx.Select(norm[at] > 0, cx.real(1.0) / tirx.sqrt(norm[at]), norm[at]), "scale"
        )

    def activate(b: Expr, h: Expr, row: Expr, column: Expr, vector: Expr, lane: Expr) -> Expr:
        at = (b, h, row, column)
        logit = logits[(*at, vector, lane)]
        if feature_map == "prf":
            exponent = logit * cx.real(d**-0.25) + scale[at]
        else:
            exponent = logit * scale[at] - cx.real(0.5)
        return exp(exponent) * cx.real(m**-0.5)

    activated = cx.compute((batch, heads, rows, columns, vectors, lanes), activate, "activated")

    def transpose(b: Expr, h: Expr, f: Expr, row: Expr, column: Expr) -> Expr:
        feature = activated[b, h, row, column, f // lanes, f % lanes]
        return tirx.Select(position(row, column) < n, feature, cx.real(0.0))

    phi = cx.compute((batch, heads, m, rows, columns), transpose, "phi")
    return [x, projection, phi]
