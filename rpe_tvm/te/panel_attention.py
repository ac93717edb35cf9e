"""Kernelized attention with RPE by tiles, keys and values packed once for all queries: for vectors of AVX2.

What `te.direct_attention` computes, with the same arguments. As in a matrix product the operands are packed in the
order in which its innermost loops read them, values in panels of a few vectors of channels, whose sums fit into
registers beside their operands.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.direct_attention import arguments, value_at, weighted_scores
from rpe_tvm.te.shapes import Sizes, at_position


def panel_attention(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the fused operator, the output last.

    Parameters
    ----------
    config : AttentionConfig
        A `direct` config with a `panel`.
    sizes : Sizes
        As of `te.direct_attention`.

    Returns
    -------
    list of te.Tensor
        As of `te.direct_attention`.
    """
    d, lanes, panel = config.head_dim, config.lanes, config.panel
    tile_q, tile_k = config.tile
    batch, heads = sizes.batch, sizes.heads
    blocks_q = -(-config.length // tile_q)
    blocks_k = (sizes.n_key + tile_k - 1) // tile_k
    panels, width = -(-d // (lanes * panel)), lanes * panel
    phi_q, phi_k, value, table, tables = arguments(config, sizes)

    packed_keys = cx.compute(
        (batch, heads, blocks_k, config.num_features, tile_k),
        lambda b, h, bj, feature, j: at_position(phi_k, b, h, feature, bj * tile_k + j),
        "packed_keys",
    )
    packed_value = cx.compute(
        (batch, heads, blocks_k, panels, tile_k, panel, lanes),
        lambda b, h, bj, p, j, vector, lane: value_at(
            value, panels * width, b, h, bj * tile_k + j, p * width + vector * lanes + lane
        ),
        "packed_value",
    )

    def key_at(b: Expr, h: Expr, feature: Expr, bj: Expr, j: Expr) -> Expr:
        return packed_keys[b, h, bj, feature, j]

    weighted = weighted_scores(config, sizes, (blocks_q, blocks_k), phi_q, key_at, table)
    j = te.reduce_axis((cx.int64(0), cx.int64(tile_k)), "j")
    product = cx.compute(
        (batch, heads, blocks_q, blocks_k, tile_q, panels, panel, lanes),
        lambda b, h, bi, bj, i, p, vector, lane: te.sum(
            weighted[b, h, bi, bj, i, j] * packed_value[b, h, bj, p, j, vector, lane], axis=j
        ),
        "product",
    )
    # A row's weights are summed beside its channels, by each panel a share of them, and stay in lanes until the end.
    vectors = tile_k // lanes
    share = -(-vectors // panels)
    part = te.reduce_axis((cx.int64(0), cx.int64(share)), "part")

    def weight(b: Expr, h: Expr, bi: Expr, bj: Expr, i: Expr, vector: Expr, lane: Expr) -> Expr:
        element = weighted[b, h, bi, bj, i, tirx.min(vector, vectors - 1) * lanes + lane]
        return element if share * panels == vectors else tirx.if_then_else(vector < vectors, element, cx.real(0.0))

    row_sum = cx.compute(
        (batch, heads, blocks_q, blocks_k, tile_q, panels, lanes),
        lambda b, h, bi, bj, i, p, lane: te.sum(weight(b, h, bi, bj, i, p * share + part, lane), axis=part),
        "row_sum",
    )
    block = te.reduce_axis((cx.int64(0), blocks_k), "block")
    sums = cx.compute(
        (batch, heads, blocks_q, panels, tile_q, panel + 1, lanes),
        lambda b, h, bi, p, i, vector, lane: te.sum(
            tirx.if_then_else(
                vector < panel,
                product[b, h, bi, block, i, p, tirx.min(vector, panel - 1), lane],
                row_sum[b, h, bi, block, i, p, lane],
            ),
            axis=block,
        ),
        "sums",
    )
    panel_axis = te.reduce_axis((cx.int64(0), cx.int64(panels)), "panel")
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    denominator = cx.compute(
        (batch, heads, blocks_q, tile_q),
        lambda b, h, bi, i: te.sum(sums[b, h, bi, panel_axis, i, panel, lane_axis], axis=(panel_axis, lane_axis)),
        "denominator",
    )

    def normalised(b: Expr, h: Expr, i: Expr, channel: Expr) -> Expr:
        tile, row = i // tile_q, i % tile_q
        at = (b, h, tile, channel // width, row, channel % width // lanes, channel % lanes)
        return sums[at] / denominator[b, h, tile, row]

    out = cx.compute((batch, heads, sizes.n_query, d), normalised, "out")
    return [phi_q, phi_k, value, table, tables, out]
