"""Gradients of kernelized attention with RPE by tiles: five products of a tile share its scores, no n x n array.

With den_i the sum of row i of S_ij c[j-i], G = grad_out and w_i = -sum_e G_ie out_ie, for each pair (i, j):

    S_ij = phi_q_i . phi_k_j      P_ij = S_ij c[j-i] / den_i      T_ij = G_i . value_j + w_i      D_ij = T_ij c[j-i]

    grad value_j = sum_i P_ij G_i            grad phi_k_j = sum_i D_ij phi_q_i / den_i
    grad phi_q_i = sum_j D_ij phi_k_j / den_i            grad b[t] = sum_(j-i=t) P_ij T_ij

The weighted scores S_ij c[j-i] of a tile of rows are computed before the rest, for all keys: their sums are den.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.lane_sums import sums_over_lanes
from rpe_tvm.te.shapes import Sizes


def direct_backward(config: BackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients, the outputs last.

    Parameters
    ----------
    config : BackwardConfig
        A `direct` config.
    sizes : Sizes
        Batch, heads and lengths; `blocks * 64` positions hold whole tiles of queries and of keys.

    Returns
    -------
    list of te.Tensor
        phi `[2, B, H, m, blocks, 64]` of queries and keys (zero past the length), value `[B, H, n_k, d]`,
        grad and out `[B, H, n_q, d]` (a row whose denominator is 0 passes no gradient),
        table `[H, 2 * 64 * blocks]` (entry `64 * blocks + j - i`);
        offset_sums `[B, H, 2 * 64 * blocks / lanes, lanes]` in the order of the table, grad_value `[B, H, n_k, d]`,
        grad_phi `[2, B, H, m, blocks, 64]` and grad_bias `[H, n_q + n_k - 1]`, the sum of offset_sums over the batch.
    """
    m, d, lanes, parts = config.num_features, config.head_dim, config.lanes, config.parts
    tile_q, tile_k = config.tile[0] // parts, config.tile[1]
    batch, heads, n_query, n_key, blocks = sizes.batch, sizes.heads, sizes.n_query, sizes.n_key, sizes.blocks
    padded = blocks * BLOCK
    features = (cx.int64(2), batch, heads, cx.int64(m), blocks, cx.int64(BLOCK))
    phi = te.placeholder(features, cx.FLOAT, "phi")
    value = te.placeholder((batch, heads, n_key, cx.int64(d)), cx.FLOAT, "value")
    grad, out = (te.placeholder((batch, heads, n_query, cx.int64(d)), cx.FLOAT, name) for name in ("grad", "out"))
    table = te.placeholder((heads, 2 * padded), cx.FLOAT, "table")
    blocks_q = (n_query + config.tile[0] - 1) // config.tile[0]  # of each part
    blocks_k = (n_key + tile_k - 1) // tile_k
    rows = (batch, heads, parts, blocks_q)
    tiles = (*rows, blocks_k)
    width, feature_width = (-(-columns // lanes) * lanes for columns in (d, m))  # whole vectors

    def row(p: Expr, bi: Expr, i: Expr) -> Expr:
        return (bi * parts + p) * tile_q + i

    def column(bj: Expr, j: Expr) -> Expr:
        return bj * tile_k + j

    def factor(h: Expr, p: Expr, bi: Expr, bj: Expr, i: Expr, j: Expr) -> Expr:
        return table[h, padded + column(bj, j) - row(p, bi, i)]

    def features_at(side: int, b: Expr, h: Expr, f: Expr, position: Expr) -> Expr:
        return phi[side, b, h, f, position // BLOCK, position % BLOCK]

    # past the end the last position again, whose features are zero: a bound instead of a branch
    def of_row(x: te.Tensor, b: Expr, h: Expr, p: Expr, bi: Expr, i: Expr, channel: Expr) -> Expr:
        element = x[b, h, tirx.min(row(p, bi, i), n_query - 1), tirx.min(channel, d - 1)]
        return element if width == d else tirx.if_then_else(channel < d, element, cx.real(0.0))

    packed_key = cx.compute(
        (batch, heads, blocks_k, m, tile_k), lambda b, h, bj, f, j: features_at(1, b, h, f, column(bj, j)), "packed_key"
    )
    key_rows = cx.compute(
        (batch, heads, blocks_k, tile_k, feature_width),
        lambda b, h, bj, j, f: features_at(1, b, h, tirx.min(f, m - 1), column(bj, j)),
        "key_rows",
    )
    value_columns = cx.compute(
        (batch, heads, blocks_k, d, tile_k),
        lambda b, h, bj, channel, j: value[b, h, tirx.min(column(bj, j), n_key - 1), channel],
        "value_columns",
    )
    packed_query = cx.compute(
        (*rows, m, tile_q), lambda b, h, p, bi, f, i: features_at(0, b, h, f, row(p, bi, i)), "packed_query"
    )
    packed_grad = cx.compute((*rows, tile_q, width), lambda *at: of_row(grad, *at), "packed_grad")

    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    scores = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bi, bj, i, j: te.sum(
            packed_query[b, h, p, bi, feature, i] * packed_key[b, h, bj, feature, j], axis=feature
        ),
        "scores",
    )
    weighted = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bi, bj, i, j: scores[b, h, p, bi, bj, i, j] * factor(h, p, bi, bj, i, j),
        "weighted",
    )
    inverse = _inverse_denominators(weighted, lanes)
    weight = _weights_of_rows(packed_grad, lambda *at: of_row(out, *at), lanes)

    shares = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bi, bj, i, j: weighted[b, h, p, bi, bj, i, j] * inverse[b, h, p, bi, i],
        "shares",
    )
    scaled_query = cx.compute(
        (*rows, m, tile_q),
        lambda b, h, p, bi, f, i: packed_query[b, h, p, bi, f, i] * inverse[b, h, p, bi, i],
        "scaled_query",
    )
    channel_axis = te.reduce_axis((cx.int64(0), cx.int64(d)), "channel")
    pulls = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bi, bj, i, j: te.sum(
            packed_grad[b, h, p, bi, i, channel_axis] * value_columns[b, h, bj, channel_axis, j], axis=channel_axis
        ),
        "pulls",
    )
    centred = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bi, bj, i, j: pulls[b, h, p, bi, bj, i, j] + weight[b, h, p, bi, i],
        "centred",
    )
    grad_scores = cx.compute(
        (*tiles, tile_q, tile_k),
        lambda b, h, p, bi, bj, i, j: centred[b, h, p, bi, bj, i, j] * factor(h, p, bi, bj, i, j),
        "grad_scores",
    )

    # Diagonals of `lanes` rows: each row between vectors of zeros, read with a shift of one more lane for each row.
    across, chunks = tile_k // lanes, tile_q // lanes

    def bias_term(b: Expr, h: Expr, p: Expr, bi: Expr, bj: Expr, ic: Expr, i: Expr, place: Expr) -> Expr:
        at = (b, h, p, bi, bj, ic * lanes + i, tirx.max(tirx.min(place - lanes, tile_k - 1), 0))
        vector = place // lanes
        return tirx.if_then_else(tirx.all(vector >= 1, vector <= across), shares[at] * centred[at], cx.real(0.0))

    bias_terms = cx.compute((*tiles, chunks, lanes, tile_k + 2 * lanes), bias_term, "bias_terms")
    row_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "row")

    def diagonal(b: Expr, h: Expr, p: Expr, bi: Expr, bj: Expr, ic: Expr, vector: Expr, lane: Expr) -> Expr:
        return te.sum(bias_terms[b, h, p, bi, bj, ic, row_axis, vector * lanes + lane + row_axis], axis=row_axis)

    chunk_diagonals = cx.compute((*tiles, chunks, across + 1, lanes), diagonal, "chunk_diagonals")

    # the next chunk's diagonals lie one vector further to the left
    def of_tile(b: Expr, h: Expr, p: Expr, bi: Expr, bj: Expr, vector: Expr, lane: Expr) -> Expr:
        total = cx.real(0.0)
        for ic in range(chunks):
            within = vector - (chunks - 1 - ic)
            term = chunk_diagonals[b, h, p, bi, bj, ic, tirx.max(tirx.min(within, across), 0), lane]
            total += tirx.if_then_else(tirx.all(within >= 0, within <= across), term, cx.real(0.0))
        return total

    diagonals = cx.compute((*tiles, across + chunks, lanes), of_tile, "diagonals")

    # products of a tile, in registers, and their sums
    i = te.reduce_axis((cx.int64(0), cx.int64(tile_q)), "i")
    of_value = cx.compute(
        (*tiles, tile_k, width),
        lambda b, h, p, bi, bj, j, channel: te.sum(
            shares[b, h, p, bi, bj, i, j] * packed_grad[b, h, p, bi, i, channel], axis=i
        ),
        "of_value",
    )
    i2 = te.reduce_axis((cx.int64(0), cx.int64(tile_q)), "i")
    of_key = cx.compute(
        (*tiles, m, tile_k),
        lambda b, h, p, bi, bj, f, j: te.sum(
            scaled_query[b, h, p, bi, f, i2] * grad_scores[b, h, p, bi, bj, i2, j], axis=i2
        ),
        "of_key",
    )
    j = te.reduce_axis((cx.int64(0), cx.int64(tile_k)), "j")
    of_query = cx.compute(
        (*tiles, tile_q, feature_width),
        lambda b, h, p, bi, bj, i, f: te.sum(grad_scores[b, h, p, bi, bj, i, j] * key_rows[b, h, bj, j, f], axis=j),
        "of_query",
    )
    query_block, query_block2 = (te.reduce_axis((cx.int64(0), blocks_q), "bi") for _ in range(2))
    key_block = te.reduce_axis((cx.int64(0), blocks_k), "bj")
    value_sums = cx.compute(
        (batch, heads, parts, blocks_k, tile_k, width),
        lambda b, h, p, bj, *at: te.sum(of_value[(b, h, p, query_block, bj, *at)], axis=query_block),
        "value_sums",
    )
    key_sums = cx.compute(
        (batch, heads, parts, blocks_k, m, tile_k),
        lambda b, h, p, bj, *at: te.sum(of_key[(b, h, p, query_block2, bj, *at)], axis=query_block2),
        "key_sums",
    )
    query_sums = cx.compute(
        (*rows, tile_q, feature_width),
        lambda b, h, p, bi, i, f: te.sum(
            of_query[b, h, p, bi, key_block, i, f] * inverse[b, h, p, bi, i], axis=key_block
        ),
        "query_sums",
    )

    # Diagonals of a tile start at the offset of its first column less that of its last row, less 1: whole vectors.
    tile_row, part = (te.reduce_axis((cx.int64(0), count), "rows") for count in (blocks_q, cx.int64(parts)))

    def offset_sum(b: Expr, h: Expr, vector: Expr, lane: Expr) -> Expr:
        # vectors from the first key's tile
        from_first = vector - padded // lanes + (tile_row * parts + part + 1) * chunks
        total = cx.real(0.0)
        for back in range(1 + -(-chunks // across)):
            tile, within = from_first // across - back, from_first % across + back * across
            there = tirx.max(tirx.min(tile, blocks_k - 1), 0)
            at = (b, h, part, tile_row, there, tirx.min(within, across + chunks - 1), lane)
            exists = tirx.all(tile >= 0, tile < blocks_k, within < across + chunks)
            total += tirx.if_then_else(exists, diagonals[at], cx.real(0.0))
        return te.sum(total, axis=[tile_row, part])

    offset_sums = cx.compute((batch, heads, 2 * padded // lanes, lanes), offset_sum, "offset_sums")

    def over_parts(sums: te.Tensor, b: Expr, h: Expr, position: Expr, *at: Expr) -> Expr:
        # never more: TVM could not prove that the tile exists
        tile = tirx.min(position // tile_k, blocks_k - 1)
        terms = [sums[(b, h, p, tile, *at)] for p in range(parts)]
        return sum(terms[1:], terms[0])

    def value_gradient(b: Expr, h: Expr, position: Expr, channel: Expr) -> Expr:
        return over_parts(value_sums, b, h, position, position % tile_k, channel)

    grad_value = cx.compute((batch, heads, n_key, d), value_gradient, "grad_value")

    def phi_gradient(side: Expr, b: Expr, h: Expr, f: Expr, block: Expr, i: Expr) -> Expr:
        position = block * BLOCK + i
        tile = tirx.min(position // tile_q, blocks_q * parts - 1)
        of_queries = query_sums[b, h, tile % parts, tile // parts, position % tile_q, f]
        of_keys = over_parts(key_sums, b, h, position, f, position % tile_k)
        return tirx.if_then_else(
            side == 0,
            tirx.if_then_else(position < n_query, of_queries, cx.real(0.0)),
            tirx.if_then_else(position < n_key, of_keys, cx.real(0.0)),
        )

    grad_phi = cx.compute(features, phi_gradient, "grad_phi")
    sequence = te.reduce_axis((cx.int64(0), batch), "sequence")

    def bias_gradient(h: Expr, offset: Expr) -> Expr:
        entry = padded - (n_query - 1) + offset
        return te.sum(offset_sums[sequence, h, entry // lanes, entry % lanes], axis=sequence)

    grad_bias = cx.compute((heads, n_query + n_key - 1), bias_gradient, "grad_bias")
    # offset_sums are an output, the first one: a schedule puts loops that it merges in the place of the last of them
    return [phi, value, grad, out, table, offset_sums, grad_value, grad_phi, grad_bias]


def _inverse_denominators(weighted: te.Tensor, lanes: int) -> te.Tensor:
    """Return 1 over the sums of the rows of weighted scores `[..., tiles of keys, rows, keys]`, 0 where that is 0."""
    *rows, tiles, tile_q, tile_k = weighted.shape
    tile, part = te.reduce_axis((cx.int64(0), tiles), "tile"), te.reduce_axis((cx.int64(0), tile_k // lanes), "part")

    def row_sum(*index: Expr) -> Expr:
        *at, i, lane = index
        return te.sum(weighted[(*at, tile, i, part * lanes + lane)], axis=[tile, part])

    row_sums = cx.compute((*rows, tile_q, lanes), row_sum, "row_sums")
    total = sums_over_lanes("denominators", row_sums)

    def inverse(*at: Expr) -> Expr:
        return tirx.Select(total(*at) == 0, cx.real(0.0), cx.real(1.0) / total(*at))

    return cx.compute((*rows, tile_q), inverse, "inverse")


def _weights_of_rows(packed_grad: te.Tensor, out_at: Callable[..., Expr], lanes: int) -> te.Tensor:
    """Return w of the rows of packed_grad `[..., rows, channels]`; `out_at` gives the elements of out."""
    *rows, tile_q, width = packed_grad.shape
    piece = te.reduce_axis((cx.int64(0), width // lanes), "piece")

    def product(*index: Expr) -> Expr:
        *at, lane = index
        channel = piece * lanes + lane
        return te.sum(packed_grad[(*at, channel)] * out_at(*at, channel), axis=piece)

    of_rows = sums_over_lanes("products", cx.compute((*rows, tile_q, lanes), product, "products"))
    return cx.compute((*rows, tile_q), lambda *at: -of_rows(*at), "w")
