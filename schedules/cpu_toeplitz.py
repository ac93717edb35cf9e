"""Schedule of the Toeplitz product, shared by CPUs: both halves of the split in L1, what lies between them in L2."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.s_tir import Schedule

from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.schedules.cpu import _at, _place, _transform, _vectorize


def toeplitz_matmul(sch: Schedule, config: ToeplitzConfig, cooperative: bool) -> None:
    """Schedule `te.toeplitz_matmul`: parallel over (batch, head, channel group), one column after the other."""
    split = split_of(config)
    columns = _transform("product_columns", config.outer)
    rows = _transform("product_rows", config.inner)
    back_rows = _transform("product_back_rows", config.inner[::-1])
    back_columns = _transform("product_back_columns", config.outer[::-1])

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
    _at(sch, packed, task)
    column, q, s, part, lane = sch.get_loops(packed)[-5:]
    if cooperative:
        sch.parallel(column)
    _vectorize(sch, packed, unrolled=2)
    _place(sch, back_columns[-1], q)
    for stage in reversed(back_columns[:-1]):
        _place(sch, stage, column)

    last_row = _place(sch, back_rows[-1], task)
    parity, row = sch.get_loops(last_row)[-7:-5]
    if cooperative:
        sch.parallel(row)
    for stage in reversed(back_rows[:-1]):
        _place(sch, stage, row)
    first_back = sch.get_sblock(back_rows[0].name)
    _place(sch, rows[-1], sch.get_loops(first_back)[-5])
    for stage in reversed(rows[:-1]):
        _place(sch, stage, row)

    last_column = _place(sch, columns[-1], parity)
    column = sch.get_loops(last_column)[-6]
    if cooperative:
        sch.parallel(column)
    for stage in reversed(columns[:-1]):
        _place(sch, stage, column)

    line = 2 * config.lanes
    for block, points in ((last_column, split.n1), (last_row, split.n2)):
        axis = len(sch.get(block).writes[0].region) - 6
        sch.storage_align(block, 0, axis, points * line, line)
