"""Kernelized attention with RPE by tiles: ((phi_q phi_k^T) * C) value, normalised, without any n x n array.

No maximum is tracked as in softmax attention: features are positive numbers of moderate size and the weights are at
most 1.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.shapes import Sizes, at_position, feature_buffer


def arguments(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return phi_q, phi_k, value, table and tables as `direct_attention` says."""
    batch, heads, padded = sizes.batch, sizes.heads, sizes.blocks * BLOCK
    return [
        feature_buffer(config, sizes, "phi_q"),
        feature_buffer(config, sizes, "phi_k"),
        te.placeholder((batch, heads, sizes.n_key, cx.int64(config.head_dim)), cx.FLOAT, "value"),
        te.placeholder((heads, 2 * padded), cx.FLOAT, "table"),
        te.placeholder((cx.int64(1),), cx.FLOAT, "tables"),
    ]


def weighted_scores(
    config: AttentionConfig,
    sizes: Sizes,
    tiles: tuple[Expr, Expr],
    phi_q: te.Tensor,
    key_at: Callable[..., Expr],
    table: te.Tensor,
) -> te.Tensor:
    """Return exp(b) phi_q . phi_k by tiles; `key_at(b, h, feature, bj, j)` is a feature of key j of a tile."""
    (tile_q, tile_k), padded = config.tile, sizes.blocks * BLOCK
    shape = (sizes.batch, sizes.heads, *tiles, tile_q, tile_k)
    feature = te.reduce_axis((cx.int64(0), cx.int64(config.num_features)), "feature")
    scores = cx.compute(
        shape,
        lambda b, h, bi, bj, i, j: te.sum(
            at_position(phi_q, b, h, feature, bi * tile_q + i) * key_at(b, h, feature, bj, j), axis=feature
        ),
        "scores",
    )
    return cx.compute(
        shape,
        lambda b, h, bi, bj, i, j: (
            scores[b, h, bi, bj, i, j] * table[h, padded + (bj * tile_k + j) - (bi * tile_q + i)]
        ),
        "weighted",
    )


def value_at(value: te.Tensor, channels: int, b: Expr, h: Expr, position: Expr, channel: Expr) -> Expr:
    """Return one of `channels` channels of a value `[B, H, n_k, d]`, zero past channel d."""
    _, _, n_key, d = value.shape
    # past the end the last position again, whose weight is zero: a bound instead of a branch
    element = value[b, h, tirx.min(position, n_key - 1), channel]
    return element if int(d) == channels else tirx.if_then_else(channel < d, element, cx.real(0.0))


def direct_attention(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the fused operator, the output last.

    Parameters
    ----------
    config : AttentionConfig
        A `direct` config.
    sizes : Sizes
        Batch, heads and lengths; `blocks * 64` positions hold whole tiles of queries and of keys.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, blocks, 64]` (both zero past the length), value `[B, H, n_k, d]`,
        table `[H, 2 * 64 * blocks]` (entry `64 * blocks + j - i`, see `te.weights`), tables (unused),
        out `[B, H, n_q, d]`.
    """
    d, lanes = config.head_dim, config.lanes
    tile_q, tile_k = config.tile
    batch, heads = sizes.batch, sizes.heads
    blocks_q = -(-config.length // tile_q)
    blocks_k = (sizes.n_key + tile_k - 1) // tile_k
    vectors = -(-d // lanes)
    phi_q, phi_k, value, table, tables = arguments(config, sizes)

    def key_at(b: Expr, h: Expr, feature: Expr, bj: Expr, j: Expr) -> Expr:
        return at_position(phi_k, b, h, feature, bj * tile_k + j)

    weighted = weighted_scores(config, sizes, (blocks_q, blocks_k), phi_q, key_at, table)
    packed = cx.compute(
        (batch, heads, blocks_k, tile_k, vectors, lanes),
        lambda b, h, bj, j, vector, lane: value_at(
            value, vectors * lanes, b, h, bj * tile_k + j, vector * lanes + lane
        ),
        "packed_value",
    )

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
