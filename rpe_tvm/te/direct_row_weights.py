"""What the gradients by tiles need of each row before their first tile: its denominator and w.

Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.lane_sums import sums_over_lanes
from rpe_tvm.te.shapes import Sizes, at_position, feature_buffer


def direct_row_weights(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the denominators, by tiles of 64 x 64 scores, and of the rows' w, the outputs last.

    Returns
    -------
    list
        phi_q and phi_k `[B, H, m, blocks, 64]` (zero past the length), n_q, n_k, table `[H, 2 * 64 * blocks]` (entry
        `64 * blocks + j - i`), grad_out and out `[B, H, n_q, d]`; denominator (zero past the length) and
        w_i = -(grad_out_i . out_i), `[B, H, ceil(n_q / 64), 64]`.
    """
    m, lanes = config.num_features, config.lanes
    padded = sizes.blocks * BLOCK
    phi_q, phi_k = (feature_buffer(config, sizes, name) for name in ("phi_q", "phi_k"))
    table = te.placeholder((sizes.heads, 2 * padded), cx.FLOAT, "table")
    rows, columns = ((n + BLOCK - 1) // BLOCK for n in (sizes.n_query, sizes.n_key))
    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    tiles = (sizes.batch, sizes.heads, rows, columns, BLOCK, BLOCK)
    scores = cx.compute(
        tiles,
        lambda b, h, bi, bj, i, j: te.sum(
            at_position(phi_q, b, h, feature, bi * BLOCK + i) * at_position(phi_k, b, h, feature, bj * BLOCK + j),
            axis=feature,
        ),
        "scores",
    )
    weighted = cx.compute(
        tiles,
        lambda b, h, bi, bj, i, j: scores[b, h, bi, bj, i, j] * table[h, padded + (bj * BLOCK + j) - (bi * BLOCK + i)],
        "weighted",
    )
    block = te.reduce_axis((cx.int64(0), columns), "block")
    part = te.reduce_axis((cx.int64(0), cx.int64(BLOCK // lanes)), "part")
    row_sums = cx.compute(
        (sizes.batch, sizes.heads, rows, BLOCK, lanes),
        lambda b, h, bi, i, lane: te.sum(weighted[b, h, bi, block, i, part * lanes + lane], axis=[block, part]),
        "row_sums",
    )
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    denominator = cx.compute(
        (sizes.batch, sizes.heads, rows, BLOCK),
        lambda b, h, bi, i: te.sum(row_sums[b, h, bi, i, lane_axis], axis=lane_axis),
        "denominator",
    )
    shape = (sizes.batch, sizes.heads, sizes.n_query, cx.int64(config.head_dim))
    grad_out, out = (te.placeholder(shape, cx.FLOAT, name) for name in ("grad_out", "out"))
    piece = te.reduce_axis((cx.int64(0), cx.int64(-(-config.head_dim // lanes))), "piece")

    def products(b: Expr, h: Expr, bi: Expr, i: Expr, lane: Expr) -> Expr:
        channel = piece * lanes + lane
        # past the end the last position again: a bound instead of a branch
        at = (b, h, tirx.min(bi * BLOCK + i, sizes.n_query - 1), tirx.min(channel, config.head_dim - 1))
        return te.sum(tirx.Select(channel < config.head_dim, grad_out[at] * out[at], cx.real(0.0)), axis=piece)

    of_rows = sums_over_lanes("products", cx.compute((*denominator.shape, lanes), products, "products"))
    weight = cx.compute(denominator.shape, lambda *at: -of_rows(*at), "w")
    return [phi_q, phi_k, sizes.n_query, sizes.n_key, table, grad_out, out, denominator, weight]
