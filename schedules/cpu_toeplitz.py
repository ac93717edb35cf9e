"""Schedule of the Toeplitz product, shared by CPUs: both halves of the split in L1, the arrays between them in L2."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.schedules.cpu import Block, Loop, at_consumer, place, transform, vectorize


def toeplitz_matmul(sch: Schedule, config: ToeplitzConfig, cooperative: bool) -> None:
    """Schedule `te.toeplitz_matmul`: parallel over (batch, head, channel group).

    Parameters
    ----------
    cooperative : bool
        All threads work on one product, where one for each would not fit into a shared cache.
    """
    out = sch.get_sblock("out")
    b, h, i, channel = sch.get_loops(out)
    # an outer loop of one iteration, so that the inner one has a constant extent where n_out is symbolic
    bucket, position = sch.split(i, [None, config.length])
    vector, lane = sch.split(channel, [None, config.lanes])
    group, part = sch.split(vector, [None, 2])
    sch.reorder(b, h, bucket, group, position, part, lane)
    task = sch.fuse(b, h, bucket, group)
    sch.parallel(position if cooperative else task)
    sch.vectorize(lane)
    sch.unroll(part)

    packed = sch.get_sblock("packed_out")
    at_consumer(sch, packed, task)
    column, q, *_ = sch.get_loops(packed)[-5:]
    vectorize(sch, packed, unrolled=2)
    back_columns = transform("product_back_columns", config.outer[::-1])
    place(sch, back_columns[-1], q)  # stays in registers until both parities are added
    for stage in reversed(back_columns[:-1]):
        place(sch, stage, column)
    if cooperative:
        sch.parallel(column)

    back_rows = transform("product_back_rows", config.inner[::-1])
    last_row = place(sch, back_rows[-1], task)
    parity, row = sch.get_loops(last_row)[-7:-5]
    for stage in reversed(back_rows[:-1]):
        place(sch, stage, row)
    # the last forward and the first inverse stage of a row work on the same points: both stay in registers
    rows = transform("product_rows", config.inner)
    place(sch, rows[-1], sch.get_loops(sch.get_sblock(back_rows[0].name))[-5])
    for stage in reversed(rows[:-1]):
        place(sch, stage, row)
    if cooperative:
        sch.parallel(row)

    last_column = forward_columns(sch, "product", config, parity, cooperative)
    split = split_of(config)
    for block, points in ((last_column, split.n1), (last_row, split.n2)):
        pad_rows(sch, config, block, points)


def toeplitz_correlation(sch: Schedule, config: ToeplitzConfig) -> None:
    """Schedule `te.toeplitz_correlation`: parallel over (batch, head, parity), one channel group after the other."""
    sums = sch.get_sblock("sums")
    b, h, parity, *_ = sch.get_loops(sums)
    task = sch.fuse(b, h, parity)
    sch.parallel(task)
    by_lane = sch.get_sblock("by_lane")
    at_consumer(sch, by_lane, task)
    row, block, t, part, lane, group = sch.get_loops(by_lane)[-6:]
    sch.reorder(group, row, block, t, part, lane)
    vectorize(sch, by_lane, unrolled=2)
    for name in ("grad", "x"):
        rows = transform(f"{name}_rows", config.inner)
        place(sch, rows[-1], block)  # the last stages of both stay in registers
        for stage in reversed(rows[:-1]):
            place(sch, stage, row)
        last_column = forward_columns(sch, name, config, group, cooperative=False)
        pad_rows(sch, config, last_column, split_of(config).n1)
    vectorize(sch, sch.decompose_reduction(by_lane, group), unrolled=0)


def forward_columns(sch: Schedule, name: str, config: ToeplitzConfig, loop: Loop, cooperative: bool) -> Block:
    """Place the forward columns of a product under `loop`, one column after the other; return the last stage."""
    columns = transform(f"{name}_columns", config.outer)
    last_column = place(sch, columns[-1], loop)
    column = sch.get_loops(last_column)[-6]
    for stage in reversed(columns[:-1]):
        place(sch, stage, column)
    if cooperative:
        sch.parallel(column)
    return last_column


def pad_rows(sch: Schedule, config: ToeplitzConfig, block: Block, points: int) -> None:
    """Pad the rows of an array between the halves, so that a walk along a column does not fall on one cache set."""
    line = 2 * config.lanes
    axis = len(sch.get(block).writes[0].region) - 6
    sch.storage_align(block, 0, axis, points * line, line)
