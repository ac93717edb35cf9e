"""The schedule of `te.panel_attention`: the loops of a matrix product with packed operands."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.cpu import (
    Choices,
    at_consumer,
    largest_divisor,
    query_tiles,
    schedule_scores,
    tiled,
    vectorize,
)

# Up to this length every task packs all keys for itself, which is faster than one more parallel loop.
PACKED_BY_TASKS = 128


def panel_attention(sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
    """Schedule `te.panel_attention`: parallel over (batch, head, query tile), one tile of keys after the other.

    A panel of values passes all rows of a tile while it lies in L1.
    """
    task = query_tiles(sch, config)
    denominator = sch.get_sblock("denominator")
    at_consumer(sch, denominator, task)
    # in the memory of sums that are over it would keep these out of registers
    sch.set_scope(denominator, 0, "local")

    sums = sch.get_sblock("sums")
    at_consumer(sch, sums, task)
    panel, row, vector, lane, block = sch.get_loops(sums)[-5:]
    score_tile, row = sch.split(row, [None, largest_divisor(config.tile[0], 64)])
    rows_outer, rows_inner = tiled(sch, row, choices.row_block, choices, largest=8)
    sch.reorder(block, score_tile, panel, rows_outer, rows_inner, vector, lane)
    for name in ("row_sum", "product"):
        at_consumer(sch, sch.get_sblock(name), rows_outer)
    schedule_scores(sch, config, choices, score_tile)

    product = sch.get_sblock("product")
    i, panel, vector, lane, j = sch.get_loops(product)[-5:]
    sch.reorder(panel, j, i, vector, lane)
    row_sum = sch.get_sblock("row_sum")
    i, _, lane, part = sch.get_loops(row_sum)[-4:]
    sch.reorder(part, i, lane)
    for reduction, loop in ((product, j), (row_sum, part), (sums, block)):
        vectorize(sch, reduction, unrolled=2)
        vectorize(sch, sch.decompose_reduction(reduction, loop), unrolled=0 if reduction is sums else 2)

    packed = [sch.get_sblock(name) for name in ("packed_keys", "packed_value")]
    for operand in packed:
        sch.vectorize(sch.split(sch.get_loops(operand)[-1], [None, config.lanes])[1])
    if config.length <= PACKED_BY_TASKS:
        for operand in packed:
            at_consumer(sch, operand, task)
    else:
        sch.merge(*(sch.get_loops(operand)[2] for operand in packed))
        sch.parallel(sch.fuse(*sch.get_loops(packed[0])[:3]))
