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


def direct_row_weights(sch: Schedule, config: BackwardConfig, choices: Choices) -> None:
    """Schedule `te.direct_row_weights`: parallel over (batch, head, tile of queries)."""
    denominator, row_sums, weighted = (sch.get_sblock(name) for name in ("denominator", "row_sums", "weighted"))
    b, h, tile, *_ = sch.get_loops(denominator)
    task = sch.fuse(b, h, tile)
    sch.parallel(task)
    at_consumer(sch, row_sums, task)
    row, lane, block, part = sch.get_loops(row_sums)[-4:]
    row_outer, row_inner = sch.split(row, [None, choices.score_rows])
    sch.reorder(block, row_outer, part, row_inner, lane)
    at_consumer(sch, weighted, row_outer)
    outer = _tiled(sch, weighted, choices.score_rows, choices.score_vectors, config.lanes)
    _in_registers(sch, "scores", outer, config.lanes)
    vectorize(sch, weighted, unrolled=2)
    vectorize(sch, row_sums, unrolled=2)
    vectorize(sch, sch.decompose_reduction(row_sums, block), unrolled=0)

    weight, products = sch.get_sblock("w"), sch.get_sblock("products")
    b, h, tile, row = sch.get_loops(weight)
    sch.parallel(sch.fuse(b, h, tile))
    rows, row = sch.split(row, [None, summed_at_once(BLOCK, config.lanes)])
    sch.vectorize(row)
    for name in reversed(step_names("products", config.lanes)):
        block = sch.get_sblock(name)
        at_consumer(sch, block, rows)
        vectorize(sch, block, unrolled=2)
    at_consumer(sch, products, rows)
    row, lane, piece = sch.get_loops(products)[-3:]
    sch.reorder(row, piece, lane)
    vectorize(sch, products, unrolled=2)
    vectorize(sch, sch.decompose_reduction(products, piece), unrolled=0)


def direct_backward(sch: Schedule, config: BackwardConfig, choices: Choices) -> None:
    """Schedule `te.direct_backward`: parallel over (batch, head, part), one tile of keys after the other."""
    lanes = config.lanes
    names = ("diagonals", "value_sums", "query_sums", "key_sums")
    diagonals, value_sums, query_sums, key_sums = (sch.get_sblock(name) for name in names)

    # one nest over (batch, head, part, tile of keys, tile of queries)
    for block in (value_sums, key_sums):
        *_, row, column, tile_q = sch.get_loops(block)
        sch.reorder(tile_q, row, column)
    *_, tile_q, row, column, tile_k = sch.get_loops(query_sums)
    sch.reorder(tile_k, tile_q, row, column)
    sch.merge(*(sch.get_loops(block)[4] for block in (diagonals, value_sums, query_sums, key_sums)))
    b, h, part, tile_k, tile_q = sch.get_loops(key_sums)[:5]
    sch.parallel(sch.fuse(b, h, part))

    for block, product in ((key_sums, "of_key"), (query_sums, "of_query"), (value_sums, "of_value")):
        columns = sch.get(sch.get_loops(block)[-1]).extent.value // lanes
        vectors = largest_divisor(columns, choices.score_vectors)
        rows = choices.score_rows * choices.score_vectors // vectors  # as many registers as for scores
        _in_registers(sch, product, _tiled(sch, block, rows, vectors, lanes), lanes)
        vectorize(sch, block, unrolled=2)

    vectorize(sch, diagonals, unrolled=1)
    of_chunks = sch.get_sblock("chunk_diagonals")
    at_consumer(sch, of_chunks, tile_q)
    chunk, vector, lane, row = sch.get_loops(of_chunks)[-4:]
    sch.reorder(row, vector, lane)
    terms = sch.get_sblock("bias_terms")
    at_consumer(sch, terms, chunk)
    sch.split(sch.get_loops(terms)[-1], [None, lanes])
    sch.storage_align(terms, 0, 6, lanes, 0)  # rows are written at cache lines, and read with a shift
    vectorize(sch, terms, unrolled=1)
    vectorize(sch, of_chunks, unrolled=2)
    vectorize(sch, sch.decompose_reduction(of_chunks, row), unrolled=1)

    for name, products in (("grad_scores", ()), ("centred", ("pulls",)), ("weighted", ("scores",))):
        block = sch.get_sblock(name)
        at_consumer(sch, block, tile_q)
        outer = _tiled(sch, block, choices.score_rows, choices.score_vectors, lanes)
        for product in products:
            _in_registers(sch, product, outer, lanes)
        vectorize(sch, block, unrolled=2)

    for name in ("packed_key", "key_rows", "value_columns"):
        at_consumer(sch, sch.get_sblock(name), tile_k)
    vectorize(sch, sch.decompose_reduction(value_sums, tile_q), unrolled=2)
    vectorize(sch, sch.decompose_reduction(key_sums, tile_q), unrolled=2)
    vectorize(sch, sch.decompose_reduction(query_sums, tile_k), unrolled=2)

    for name in ("packed_query", "packed_grad"):
        block = sch.get_sblock(name)
        sch.vectorize(sch.split(sch.get_loops(block)[-1], [None, lanes])[1])
        sch.parallel(sch.fuse(*sch.get_loops(block)[:3]))

    grad_bias, grad_value, grad_phi = (sch.get_sblock(name) for name in ("grad_bias", "grad_value", "grad_phi"))
    side, b, h, feature, tile, _ = sch.get_loops(grad_phi)
    sch.reorder(b, h, tile, side, feature)  # transposed tile by tile, in L1
    sch.merge(*(sch.get_loops(block)[1] for block in (grad_bias, grad_value, grad_phi)))
    b, h, *_ = sch.get_loops(grad_phi)
    sch.parallel(sch.fuse(b, h))
    *_, lane, chunk = sch.get_loops(grad_bias)
    sch.reorder(chunk, lane)
    vectorize(sch, grad_bias, unrolled=0)
    vectorize(sch, sch.decompose_reduction(grad_bias, chunk), unrolled=0)
    sch.vectorize(sch.split(sch.get_loops(grad_value)[-1], [None, lanes])[1])
