"""Gradients of kernelized attention with RPE by tiles: five products of a tile share its scores, no n x n array.

With phi_q divided by the denominators, G = grad_out and w_i = -sum_e G_ie out_ie, for each pair (i, j):

    S_ij = phi_q_i . phi_k_j        P_ij = S_ij c[j-i]        T_ij = G_i . value_j + w_i        D_ij = T_ij c[j-i]

    grad value_j = sum_i P_ij G_i            grad phi_k_j = sum_i D_ij phi_q_i
    grad phi_q_i = sum_j D_ij phi_k_j / den_i            grad b[t] = sum_(j-i=t) P_ij T_ij

Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.shapes import Sizes


def direct_backward(config: BackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients, the outputs last.

    Parameters
    ----------
    config : BackwardConfig
        A `direct` config.
    sizes : Sizes
        Batch, heads and lengths; `blocks * 64` is a multiple of both sides of the tile.

    Returns
    -------
    list of te.Tensor
        phi `[2, B, H, m, blocks, 64]` of queries and keys (zero past the length), value `[B, H, n_k, d]`,
        grad `[B, H, n_q, d]`, w and denominator `[B, H, ceil(n_q / 64), 64]` (a row where it is 0 passes no
        gradient), table `[H, 2 * 64 * blocks]` (entry `64 * blocks + j - i`);
        grad_bias `[B, H, 2 * 64 * blocks / lanes, lanes]` in the order of the table, grad_value `[B, H, n_k, d]` and
        grad_phi `[2, B, H, m, blocks, 64]`.
    """
    m, d, lanes, parts = config.num_features, config.head_dim, config.lanes, config.parts
    tile_q, tile_k = config.tile[0], config.tile[1] // parts
    batch, heads, n_query, n_key, blocks = sizes.batch, sizes.heads, sizes.n_query, sizes.n_key, sizes.blocks
    padded = blocks * BLOCK
    features = (cx.int64(2), batch, heads, cx.int64(m), blocks, cx.int64(BLOCK))
    phi = te.placeholder(features, cx.FLOAT, "phi")
    value = te.placeholder((batch, heads, n_key, cx.int64(d)), cx.FLOAT, "value")
    grad = te.placeholder((batch, heads, n_query, cx.int64(d)), cx.FLOAT, "grad")
    rows = (batch, heads, (n_query + BLOCK - 1) // BLOCK, cx.int64(BLOCK))
    weight, denominator = (te.placeholder(rows, cx.FLOAT, name) for name in ("w", "denominator"))
    table = te.placeholder((heads, 2 * padded), cx.FLOAT, "table")
    blocks_q = (n_query + tile_q - 1) // tile_q
    blocks_k = (n_key + config.tile[1] - 1) // config.tile[1]  # of each part
    tiles = (batch, heads, parts, blocks_k, blocks_q)
    width, feature_width = (-(-columns // lanes) * lanes for columns in (d, m))  # whole vectors

    def row(bi: Expr, i: Expr) -> Expr:
        return bi * tile_q + i

    def column(p: Expr, bj: Expr, j: Expr) -> Expr:
        return (bj * parts + p) * tile_k + j

    def factor(h: Expr, p: Expr, bj: Expr, bi: Expr, i: Expr, j: Expr) -> Expr:
        return table[h, padded + column(p, bj, j) - row(bi, i)]

    def features_at(side: int, b: Expr, h: Expr, f: Expr, position: Expr) -> Expr:
        return phi[side, b, h, f, position // BLOCK, position % BLOCK]

    # past the end the last position again, whose features are zero: a bound instead of a branch
    def query_at(position: Expr) -> Expr:
        return tirx.min(position, n_query - 1)

    def of_row(numbers: te.Tensor, b: Expr, h: Expr, position: Expr) -> Expr:
        at = query_at(position)
        return numbers[b, h, at // BLOCK, at % BLOCK]

    def inverse(b: Expr, h: Expr, position: Expr) -> Expr:
        found = of_row(denominator, b, h, position)
        return tirx.Select(found == 0, cx.real(0.0), cx.real(1.0) / found)

    def grad_element(b: Expr, h: Expr, bi: Expr, i: Expr, channel: Expr) -> Expr:
        position = query_at(row(bi, i))
        if width == d:
            return grad[b, h, position, channel]
        return tirx.if_then_else(channel < d, grad[b, h, position, channel], cx.real(0.0))

    packed_grad = cx.compute((batch, heads, blocks_q, tile_q, width), grad_element, "packed_grad")
    packed_query = cx.compute(
        (batch, heads, blocks_q, m, tile_q),
        lambda b, h, bi, f, i: features_at(0, b, h, f, row(bi, i)) * inverse(b, h, row(bi, i)),
        "packed_query",
    )
    packed_key = cx.compute(
        (*tiles[:4], m, tile_k), lambda b, h, p, bj, f, j: features_at(1, b, h, f, column(p, bj, j)), "packed_key"
    )
    key_rows = cx.compute(
        (*tiles[:4], tile_k, feature_width),
        lambda b, h, p, bj, j, f: features_at(1, b, h, tirx.min(f, m - 1), column(p, bj, j)),
        "key_rows",
    )
    value_columns = cx.compute(
        (*tiles[:4], d, tile_k),
        lambda b, h, p, bj, channel, j: value[b, h, tirx.min(column(p, bj, j), n_key - 1), channel],
        "value_columns",
    )

    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    scores = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bj, bi, i, j: te.sum(
            packed_query[b, h, bi, feature, i] * packed_key[b, h, p, bj, feature, j], axis=feature
        ),
        "scores",
    )
    weighted = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bj, bi, i, j: scores[b, h, p, bj, bi, i, j] * factor(h, p, bj, bi, i, j),
        "weighted",
    )
    channel_axis = te.reduce_axis((cx.int64(0), cx.int64(d)), "channel")
    pulls = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bj, bi, i, j: te.sum(
            packed_grad[b, h, bi, i, channel_axis] * value_columns[b, h, p, bj, channel_axis, j],
            axis=channel_axis,
        ),
        "pulls",
    )
    centred = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bj, bi, i, j: pulls[b, h, p, bj, bi, i, j] + of_row(weight, b, h, row(bi, i)),
        "centred",
    )
    grad_scores = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bj, bi, i, j: centred[b, h, p, bj, bi, i, j] * factor(h, p, bj, bi, i, j),
        "grad_scores",
    )

    # Diagonals of `lanes` rows: each row between vectors of zeros, read with a shift of one more lane for each row.
    across, chunks = tile_k // lanes, tile_q // lanes

    def bias_term(b: Expr, h: Expr, p: Expr, bj: Expr, bi: Expr, ic: Expr, i: Expr, place: Expr) -> Expr:
        at = (b, h, p, bj, bi, ic * lanes + i, tirx.max(tirx.min(place - lanes, tile_k - 1), 0))
        vector = place // lanes
        return tirx.if_then_else(tirx.all(vector >= 1, vector <= across), weighted[at] * centred[at], cx.real(0.0))

    bias_terms = cx.compute((*tiles, chunks, lanes, tile_k + 2 * lanes), bias_term, "bias_terms")
    row_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "row")

    def diagonal(b: Expr, h: Expr, p: Expr, bj: Expr, bi: Expr, ic: Expr, vector: Expr, lane: Expr) -> Expr:
        return te.sum(bias_terms[b, h, p, bj, bi, ic, row_axis, vector * lanes + lane + row_axis], axis=row_axis)

    chunk_diagonals = cx.compute((*tiles, chunks, across + 1, lanes), diagonal, "chunk_diagonals")

    # the next chunk's diagonals lie one vector further to the left
    def of_tile(b: Expr, h: Expr, p: Expr, bj: Expr, bi: Expr, vector: Expr, lane: Expr) -> Expr:
        total = cx.real(0.0)
        for ic in range(chunks):
            within = vector - (chunks - 1 - ic)
            term = chunk_diagonals[b, h, p, bj, bi, ic, tirx.max(tirx.min(within, across), 0), lane]
            total += tirx.if_then_else(tirx.all(within >= 0, within <= across), term, cx.real(0.0))
        return total

    diagonals = cx.compute((*tiles, across + chunks, lanes), of_tile, "diagonals")

    # products of a tile, in registers, and their sums
    i = te.reduce_axis((cx.int64(0), cx.int64(tile_q)), "i")
    of_value = cx.compute(
        (*tiles, tile_k, width),
        lambda b, h, p, bj, bi, j, channel: te.sum(
            weighted[b, h, p, bj, bi, i, j] * packed_grad[b, h, bi, i, channel], axis=i
        ),
        "of_value",
    )
    i2 = te.reduce_axis((cx.int64(0), cx.int64(tile_q)), "i")
    of_key = cx.compute(
        (*tiles, m, tile_k),
        lambda b, h, p, bj, bi, f, j: te.sum(
            packed_query[b, h, bi, f, i2] * grad_scores[b, h, p, bj, bi, i2, j], axis=i2
        ),
        "of_key",
    )
    j = te.reduce_axis((cx.int64(0), cx.int64(tile_k)), "j")
    of_query = cx.compute(
        (*tiles, tile_q, feature_width),
        lambda b, h, p, bj, bi, i, f: te.sum(grad_scores[b, h, p, bj, bi, i, j] * key_rows[b, h, p, bj, j, f], axis=j),
        "of_query",
    )
    query_block, query_block2 = (te.reduce_axis((cx.int64(0), blocks_q), "bi") for _ in range(2))
    key_block = te.reduce_axis((cx.int64(0), blocks_k), "bj")
    value_sums = cx.compute(
        (*tiles[:4], tile_k, width),
        lambda b, h, p, bj, *at: te.sum(of_value[(b, h, p, bj, query_block, *at)], axis=query_block),
        "value_sums",
    )
    key_sums = cx.compute(
        (*tiles[:4], m, tile_k),
        lambda b, h, p, bj, *at: te.sum(of_key[(b, h, p, bj, query_block2, *at)], axis=query_block2),
        "key_sums",
    )
    query_sums = cx.compute(
        (batch, heads, parts, blocks_q, tile_q, feature_width),
        lambda b, h, p, bi, *at: te.sum(of_query[(b, h, p, key_block, bi, *at)], axis=key_block),
        "query_sums",
    )

    def key_tile(tile: Expr) -> Expr:
        return tirx.min(tile, blocks_k * parts - 1)  # never more: TVM could not prove that the tile exists

    # Diagonals of a tile start at the offset of its first column less that of its last row, less 1: whole vectors.
    tile_row = te.reduce_axis((cx.int64(0), blocks_q), "bi")

    def offset_sum(b: Expr, h: Expr, vector: Expr, lane: Expr) -> Expr:
        from_first = vector - padded // lanes + (tile_row + 1) * chunks  # vectors from the first key's tile
        total = cx.real(0.0)
        for back in range(1 + -(-chunks // across)):
            tile, within = from_first // across - back, from_first % across + back * across
            there = tirx.max(key_tile(tile), 0)
            at = (b, h, there % parts, there // parts, tile_row, tirx.min(within, across + chunks - 1), lane)
            exists = tirx.all(tile >= 0, tile < blocks_k * parts, within < across + chunks)
            total += tirx.if_then_else(exists, diagonals[at], cx.real(0.0))
        return te.sum(total, axis=tile_row)

    grad_bias = cx.compute((batch, heads, 2 * padded // lanes, lanes), offset_sum, "grad_bias")

    def value_gradient(b: Expr, h: Expr, position: Expr, channel: Expr) -> Expr:
        tile = key_tile(position // tile_k)
        return value_sums[b, h, tile % parts, tile // parts, position % tile_k, channel]

    grad_value = cx.compute((batch, heads, n_key, d), value_gradient, "grad_value")

    def phi_gradient(side: Expr, b: Expr, h: Expr, f: Expr, block: Expr, i: Expr) -> Expr:
        position = block * BLOCK + i
        at_query = (tirx.min(position // tile_q, blocks_q - 1), position % tile_q, f)
        of_queries = sum((query_sums[(b, h, p, *at_query)] for p in range(1, parts)), query_sums[(b, h, 0, *at_query)])
        tile = key_tile(position // tile_k)
        of_keys = key_sums[b, h, tile % parts, tile // parts, f, position % tile_k]
        return tirx.if_then_else(
            side == 0,
            tirx.if_then_else(position < n_query, of_queries * inverse(b, h, position), cx.real(0.0)),
            tirx.if_then_else(position < n_key, of_keys, cx.real(0.0)),
        )

    grad_phi = cx.compute(features, phi_gradient, "grad_phi")
    return [phi, value, grad, weight, denominator, table, grad_bias, grad_value, grad_phi]
