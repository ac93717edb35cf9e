"""Kernelized attention with RPE by tiles: ((phi_q phi_k^T) * C) value, normalised, without any n x n array.

No maximum is tracked as in softmax attention: features are positive numbers of moderate size and the weights are at
most 1.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.shapes import Sizes, at_position, feature_buffer


def direct_attention(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the fused operator, the output last.

    Parameters
    ----------
    config : AttentionConfig
        A `direct` config.
    sizes : Sizes
        Batch, heads and lengths; `blocks * 64` is a multiple of both sides of the tile.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, blocks, 64]` (both zero past the length), value `[B, H, n_k, d]`,
        table `[H, 2 * 64 * blocks]` (entry `64 * blocks + j - i`), tables (unused), out `[B, H, n_q, d]`.
    """
    m, d, lanes = config.num_features, config.head_dim, config.lanes
    tile_q, tile_k = config.tile
    batch, heads, n_key, padded = sizes.batch, sizes.heads, sizes.n_key, sizes.blocks * BLOCK
    phi_q = feature_buffer(config, sizes, "phi_q")
    phi_k = feature_buffer(config, sizes, "phi_k")
    value = te.placeholder((batch, heads, n_key, cx.int64(d)), cx.FLOAT, "value")
    table = te.placeholder((heads, 2 * padded), cx.FLOAT, "table")
    tables = te.placeholder((cx.int64(1),), cx.FLOAT, "tables")
    blocks_q = -(-config.length // tile_q)
    blocks_k = (n_key + tile_k - 1) // tile_k
    vectors = -(-d // lanes)

    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    scores = cx.compute(
        (batch, heads, blocks_q, blocks_k, tile_q, tile_k),
        lambda b, h, bi, bj, i, j: te.sum(
            at_position(phi_q, b, h, feature, bi * tile_q + i) * at_position(phi_k, b, h, feature, bj * tile_k + j),
            axis=feature,
        ),
        "scores",
    )
    weighted = cx.compute(
        (batch, heads, blocks_q, blocks_k, tile_q, tile_k),
        lambda b, h, bi, bj, i, j: (
            scores[b, h, bi, bj, i, j] * table[h, padded + (bj * tile_k + j) - (bi * tile_q + i)]
        ),
        "weighted",
    )

    def pack(b: Expr, h: Expr, bj: Expr, j: Expr, vector: Expr, lane: Expr) -> Expr:
        # past the end the last position again, whose weight is zero: a bound instead of a branch
        position, channel = tirx.min(bj * tile_k + j, n_key - 1), vector * lanes + lane
        if vectors * lanes == d:
            return value[b, h, position, channel]
        return tirx.if_then_else(channel < d, value[b, h, position, channel], cx.real(0.0))

    packed = cx.compute((batch, heads, blocks_k, tile_k, vectors, lanes), pack, "packed_value")

    j = te.reduce_axis((cx.int64(0), cx.int64(tile_k)), "j")
    product = cx.compute(
        (batch, heads, blocks_q, blocks_k, tile_q, vectors, lanes),
        lambda b, h, bi, bj, i, vector, lane: te.sum(
            weighted[b, h, bi, bj, i, j] * packed[b, h, bj, j, vector, lane], axis=j
        ),
        "product",
    )
    # The sum over a row's weights stays in lanes until the end: another vector of channels beside the value's.
    part = te.reduce_axis((cx.int64(0), cx.int64(tile_k // lanes)), "part")
    row_sum = cx.compute(
        (batch, heads, blocks_q, blocks_k, tile_q, lanes),
        lambda b, h, bi, bj, i, lane: te.sum(weighted[b, h, bi, bj, i, part * lanes + lane], axis=part),
        "row_sum",
    )
    block = te.reduce_axis((cx.int64(0), blocks_k), "block")
    sums = cx.compute(
        (batch, heads, blocks_q, tile_q, vectors + 1, lanes),
        lambda b, h, bi, i, vector, lane: te.sum(
            tirx.if_then_else(
                vector < vectors,
                product[b, h, bi, block, i, tirx.min(vector, vectors - 1), lane],
                row_sum[b, h, bi, block, i, lane],
            ),
            axis=block,
        ),
        "sums",
    )
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    denominator = cx.compute(
        (batch, heads, blocks_q, tile_q),
        lambda b, h, bi, i: te.sum(sums[b, h, bi, i, vectors, lane_axis], axis=lane_axis),
        "denominator",
    )

    def normalised(b: Expr, h: Expr, i: Expr, channel: Expr) -> Expr:
        # n_q never exceeds the bucket; the remainder tells TVM so, which could not prove that tile i // tile_q exists
        at = (b, h, i // tile_q % blocks_q, i % tile_q)
        return sums[(*at, channel // lanes, channel % lanes)] / denominator[at]

    out = cx.compute((batch, heads, sizes.n_query, d), normalised, "out")
    return [phi_q, phi_k, value, table, tables, out]
