"""Schedules of the gradients by tiles, shared by CPUs.

A tile of scores is needed by four results. Their loop nests are merged, and everything that they need is computed
inside, so that each tile is computed once.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.schedules.cpu import Block, Choices, Loop, at_consumer, largest_divisor, vectorize
from rpe_tvm.te.lane_sums import step_names, summed_at_once


def _in_registers(sch: Schedule, name: str, loop: Loop, lanes: int) -> None:
    """Compute a product under `loop`: loops (..., row, column, reduction), all rows and columns of it in registers."""
    block = sch.get_sblock(name)
    at_consumer(sch, block, loop)
    row, column, reduction = sch.get_loops(block)[-3:]
    vector, lane = sch.split(column, [None, lanes])
    sch.reorder(reduction, row, vector, lane)
    vectorize(sch, block, unrolled=2)
    vectorize(sch, sch.decompose_reduction(block, reduction), unrolled=2)


def _tiled(sch: Schedule, block: Block, rows: int, vectors: int, lanes: int) -> Loop:
    """Walk rows and columns, the last two loops, by blocks of `rows` x `vectors`; return the loop over blocks."""
    row, column = sch.get_loops(block)[-2:]
    row_outer, row_inner = sch.split(row, [None, largest_divisor(sch.get(row).extent.value, rows)])
    vectors = largest_divisor(sch.get(column).extent.value // lanes, vectors)
    column_outer, vector, lane = sch.split(column, [None, vectors, lanes])
    sch.reorder(column_outer, row_outer, row_inner, vector, lane)
    return row_outer


def _summed_over_lanes(sch: Schedule, result: str, name: str, rows: Loop, lanes: int) -> None:
    """Compute `result`, a number of each row, and its steps of `te.lane_sums` under `rows`; `name` is their input."""
    at_consumer(sch, sch.get_sblock(result), rows)
    outer, row = sch.split(sch.get_loops(sch.get_sblock(result))[-1], [None, summed_at_once(BLOCK, lanes)])
    sch.vectorize(row)
    for step in reversed(step_names(name, lanes)):
        block = sch.get_sblock(step)
        at_consumer(sch, block, outer)
        vectorize(sch, block, unrolled=2)


def _of_rows(sch: Schedule, tile_q: Loop, lanes: int) -> None:
    """Compute what the rows of a tile of queries need before their tiles of keys: phi_q / den, w and 1 / den."""
    scaled = sch.get_sblock("scaled_query")
    at_consumer(sch, scaled, tile_q)
    sch.vectorize(sch.split(sch.get_loops(scaled)[-1], [None, lanes])[1])

    _summed_over_lanes(sch, "w", "products", tile_q, lanes)
    products = sch.get_sblock("products")
    at_consumer(sch, products, tile_q)
    row, lane, piece = sch.get_loops(products)[-3:]
    sch.reorder(row, piece, lane)
    vectorize(sch, products, unrolled=1)
    vectorize(sch, sch.decompose_reduction(products, piece), unrolled=0)

    _summed_over_lanes(sch, "inverse", "denominators", tile_q, lanes)
    row_sums = sch.get_sblock("row_sums")
    at_consumer(sch, row_sums, tile_q)
    row, lane, tile, part = sch.get_loops(row_sums)[-4:]
    sch.reorder(tile, row, part, lane)
    vectorize(sch, row_sums, unrolled=1)
    vectorize(sch, sch.decompose_reduction(row_sums, tile), unrolled=0)


def direct_backward(sch: Schedule, config: BackwardConfig, choices: Choices) -> None:
    """Schedule `te.direct_backward`: parallel over (batch, head, part), one tile of queries after the other.

    The weighted scores of a tile of queries and all keys lie in L2 between the two walks through the keys.
    """
    lanes = config.lanes
    names = ("diagonals", "value_sums", "query_sums", "key_sums")
    diagonals, value_sums, query_sums, key_sums = (sch.get_sblock(name) for name in names)

    # one nest over (batch, head, part, tile of queries, tile of keys)
    for block in (value_sums, key_sums):
        *_, tile_k, row, column, tile_q = sch.get_loops(block)
        sch.reorder(tile_q, tile_k, row, column)
    *_, row, column, tile_k = sch.get_loops(query_sums)
    sch.reorder(tile_k, row, column)
    sch.merge(*(sch.get_loops(block)[4] for block in (diagonals, value_sums, query_sums, key_sums)))
    b, h, part, tile_q, tile_k = sch.get_loops(key_sums)[:5]
    sch.parallel(sch.fuse(b, h, part))

    for block, product in ((key_sums, "of_key"), (query_sums, "of_query"), (value_sums, "of_value")):
        columns = sch.get(sch.get_loops(block)[-1]).extent.value // lanes
        vectors = largest_divisor(columns, choices.score_vectors)
        rows = choices.score_rows * choices.score_vectors // vectors  # as many registers as for scores
        _in_registers(sch, product, _tiled(sch, block, rows, vectors, lanes), lanes)
        vectorize(sch, block, unrolled=2)

    vectorize(sch, diagonals, unrolled=1)
    of_chunks = sch.get_sblock("chunk_diagonals")
    at_consumer(sch, of_chunks, tile_k)
    chunk, vector, lane, row = sch.get_loops(of_chunks)[-4:]
    sch.reorder(row, vector, lane)
    terms = sch.get_sblock("bias_terms")
    at_consumer(sch, terms, chunk)
    sch.split(sch.get_loops(terms)[-1], [None, lanes])
    sch.storage_align(terms, 0, 6, lanes, 0)  # rows are written at cache lines, and read with a shift
    vectorize(sch, terms, unrolled=1)
    vectorize(sch, of_chunks, unrolled=2)
    vectorize(sch, sch.decompose_reduction(of_chunks, row), unrolled=1)

    def tile_of_pairs(name: str, loop: Loop, *products: str) -> None:
        block = sch.get_sblock(name)
        at_consumer(sch, block, loop)
        outer = _tiled(sch, block, choices.score_rows, choices.score_vectors, lanes)
        for product in products:
            _in_registers(sch, product, outer, lanes)
        vectorize(sch, block, unrolled=2)

    tile_of_pairs("grad_scores", tile_k)
    tile_of_pairs("centred", tile_k, "pulls")
    tile_of_pairs("shares", tile_k)
    _of_rows(sch, tile_q, lanes)
    tile_of_pairs("weighted", tile_q, "scores")
    for name in ("packed_query", "packed_grad"):
        block = sch.get_sblock(name)
        at_consumer(sch, block, tile_q)
        sch.vectorize(sch.split(sch.get_loops(block)[-1], [None, lanes])[1])

    vectorize(sch, sch.decompose_reduction(value_sums, tile_q), unrolled=2)
    vectorize(sch, sch.decompose_reduction(key_sums, tile_q), unrolled=2)
    vectorize(sch, sch.decompose_reduction(query_sums, tile_k), unrolled=2)

    for name in ("packed_key", "key_rows", "value_columns"):
        sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock(name))[:3]))

    offset_sums, grad_value, grad_phi = (sch.get_sblock(name) for name in ("offset_sums", "grad_value", "grad_phi"))
    side, b, h, feature, tile, _ = sch.get_loops(grad_phi)
    sch.reorder(b, h, tile, side, feature)  # transposed tile by tile, in L1
    sch.merge(*(sch.get_loops(block)[1] for block in (offset_sums, grad_value, grad_phi)))
    b, h, *_ = sch.get_loops(grad_phi)
    sch.parallel(sch.fuse(b, h))
    lane, *sums = sch.get_loops(offset_sums)[-3:]
    sch.reorder(*sums, lane)
    vectorize(sch, offset_sums, unrolled=0)
    vectorize(sch, sch.decompose_reduction(offset_sums, sums[0]), unrolled=0)
    sch.vectorize(sch.split(sch.get_loops(grad_value)[-1], [None, lanes])[1])

    grad_bias = sch.get_sblock("grad_bias")
    h, offset, sequence = sch.get_loops(grad_bias)
    sch.reorder(h, sequence, offset)
    sch.parallel(h)
    sch.decompose_reduction(grad_bias, sequence)
