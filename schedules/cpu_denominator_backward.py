"""Schedules of the denominators of the gradients by FFT, shared by CPUs."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.schedules import cpu_fft
from rpe_tvm.schedules.cpu import (
    Block,
    Choices,
    Loop,
    Stage,
    at_consumer,
    largest_divisor,
    pad_rows,
    place,
    transform,
    vectorize,
)
from rpe_tvm.te.dft import COMPOSITE


def fft_row_weights(sch: Schedule, config: BackwardConfig) -> None:
    """Schedule `te.fft_row_weights`: the denominators, then rows of neighbouring columns."""
    cpu_fft.fft_denominator(sch, config, Choices())
    split = split_of(config)
    inverse, weight = sch.get_sblock("inverse"), sch.get_sblock("w")
    for block in (inverse, weight):
        b, h, row, column = sch.get_loops(block)
        # a column's rows are neighbouring positions; 16 columns fill a cache line of the result
        column_outer, column = sch.split(column, [None, largest_divisor(split.n1, 16)])
        sch.reorder(b, h, column_outer, column, row)
        sch.parallel(sch.fuse(b, h, column_outer))
    row = sch.get_loops(weight)[-1]
    for name in ("sums", "lane_sums"):
        at_consumer(sch, sch.get_sblock(name), row)
    lane_sums = sch.get_sblock("lane_sums")
    lane, part = sch.get_loops(lane_sums)[-2:]
    sch.reorder(part, lane)
    vectorize(sch, lane_sums, unrolled=1)
    vectorize(sch, sch.decompose_reduction(lane_sums, part), unrolled=0)


def fft_denominator_backward(sch: Schedule, config: BackwardConfig) -> None:
    """Schedule `te.fft_denominator_backward`: parallel over (batch, head, feature group)."""
    split = split_of(config)
    columns, rows = transform("pair_columns", config.outer), transform("pair_rows", config.inner)
    back_rows = transform("pair_back_rows", config.inner[::-1])
    back_columns = transform("pair_back_columns", config.outer[::-1])

    correlation, last = sch.get_sblock("correlation"), sch.get_sblock(back_columns[-1].name)
    sch.merge(sch.get_loops(correlation)[3], sch.get_loops(last)[3])
    b, h, group, parity, _, column, *_ = sch.get_loops(last)
    if back_columns[-1].radix in COMPOSITE:
        first = sch.get_sblock(f"{back_columns[-1].name}_first")
        at_consumer(sch, first, sch.get_loops(last)[-4])
        vectorize(sch, first, unrolled=3)
    vectorize(sch, last, unrolled=2)
    for stage in reversed(back_columns[:-1]):
        place(sch, stage, column)
    last_row = _half(sch, back_rows, parity)
    _half(sch, rows, parity)
    last_column = _half(sch, columns, parity)
    packed = sch.get_sblock("packed")
    at_consumer(sch, packed, parity)
    vectorize(sch, packed, unrolled=1)
    pad_rows(sch, config, last_column, split.n1)
    pad_rows(sch, config, last_row, split.n2)
    sch.parallel(sch.fuse(b, h, group))

    # whole rows, whose products, features as lanes, are transposed in L1
    side, b, h, feature, row, column = sch.get_loops(sch.get_sblock("total"))
    outer, row = sch.split(row, [None, largest_divisor(split.n2, max(1, 128 // split.n1))])
    sch.reorder(side, b, h, outer, feature, row, column)
    task = sch.fuse(side, b, h, outer)
    sch.parallel(task)
    products = sch.get_sblock("products")
    at_consumer(sch, products, task)
    vectorize(sch, products, unrolled=1)


def _half(sch: Schedule, stages: list[Stage], loop: Loop) -> Block:
    """Place all stages of columns or rows under `loop`, those before the last one column or row after the other."""
    last = place(sch, stages[-1], loop)
    column = sch.get_loops(last)[-6]
    for stage in reversed(stages[:-1]):
        place(sch, stage, column)
    return last
