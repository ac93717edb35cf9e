"""Schedules of the gradients by FFT, shared by CPUs.

Both transforms of a feature are needed by several results. Their loop nests are merged, and everything that they need
is computed inside, so that each transform is computed once.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.schedules.cpu import Block, Choices, Loop, at_consumer, pad_rows, place, tiled, transform, vectorize
from rpe_tvm.schedules.in_place import write_in_place
from rpe_tvm.te.lane_sums import step_names, summed_at_once


def _sum_lanes(sch: Schedule, name: str, of_sums: Block, loop: Loop, vectors: int, lanes: int) -> None:
    """Compute `te.lane_sums.sums_over_lanes` under `loop`; the innermost loop of `of_sums` becomes vectors of them."""
    for each in reversed([name, *step_names(name, lanes)]):
        block = sch.get_sblock(each)
        at_consumer(sch, block, loop)
        vectorize(sch, block, unrolled=1 if each == name else 2)
    outer, inner = sch.split(sch.get_loops(of_sums)[-1], [None, summed_at_once(vectors, lanes)])
    sch.unroll(outer)
    sch.vectorize(inner)


def fft_backward(sch: Schedule, config: BackwardConfig, choices: Choices) -> None:
    """Schedule `te.fft_backward`: parallel over (batch, head, part), one feature after the other.

    Of the choices `sampled`, `pad`, `columns` and `rows` count.
    """
    split = split_of(config)
    columns, rows = transform("pair_columns", config.outer), transform("pair_rows", config.inner)
    back_rows = transform("pair_back_rows", config.inner[::-1])
    back_columns = transform("pair_back_columns", config.outer[::-1])
    grad_phi, sums, correlation = (sch.get_sblock(name) for name in ("grad_phi", "sums", "correlation"))

    # one nest over (batch, head, part, group, parity, feature) for all results, in it one over columns, one over rows
    b, h, part, side, feature, column, q, s, group, parity = sch.get_loops(grad_phi)
    sch.reorder(b, h, part, group, parity, feature, column, q, side, s)
    b, h, part, group, parity, column2, q, s, c, lane, feature2 = sch.get_loops(sums)
    sch.reorder(b, h, part, group, parity, feature2, column2, q, s, c, lane)
    b, h, part, parity, row, *inner, group, feature3 = sch.get_loops(correlation)
    sch.reorder(b, h, part, group, parity, feature3, row, *inner)
    sch.merge(feature, feature3, feature2)  # where the last one stands: after all that they need
    sch.merge(sch.get_loops(grad_phi)[7], sch.get_loops(sums)[7])
    b, h, part, group, parity, feature, column, q = sch.get_loops(grad_phi)[:8]
    task = sch.fuse(b, h, part)

    _sum_lanes(sch, "dots", grad_phi, sch.get_loops(grad_phi)[-2], split.s, config.lanes)
    columns_outer, _ = tiled(sch, column, choices.columns, choices, largest=4)
    place(sch, back_columns[-1], q)
    for stage in reversed(back_columns[:-1]):
        place(sch, stage, columns_outer)

    # the last inverse stage of a row and the correlation share the rows' spectra
    last_row = place(sch, back_rows[-1], feature, preserve_unit_loops=False)
    before = len(sch.get_loops(correlation)) - 4
    side, of_back = sch.get_loops(last_row)[before : before + 2]
    sch.reorder(of_back, side)
    row = sch.merge(sch.get_loops(correlation)[before], of_back)
    *_, block, frequency, part = sch.get_loops(correlation)
    sch.fuse(frequency, part)
    _sum_lanes(sch, "crossed", correlation, block, 2 * config.inner[-1], config.lanes)
    rows_outer, _ = tiled(sch, row, choices.rows, choices, largest=4)
    for stage in (*reversed(back_rows[:-1]), *reversed(rows)):
        place(sch, stage, rows_outer)
    last_column = place(sch, columns[-1], feature)
    side, column_before = sch.get_loops(last_column)[-7:-5]
    columns_before, column_before = tiled(sch, column_before, choices.columns, choices, largest=4)
    sch.reorder(columns_before, column_before, side)
    for stage in reversed(columns[:-1]):
        place(sch, stage, columns_before)
    at_consumer(sch, sch.get_sblock("packed"), parity)
    sch.parallel(task)
    write_in_place(sch, last_row, columns[-1].name)  # one array in place of two, half the walks across its rows

    for block in (sch.get_sblock("packed"), sums):
        vectorize(sch, block, unrolled=1)
    vectorize(sch, sch.decompose_reduction(sums, feature), unrolled=0)
    sch.decompose_reduction(correlation, group)
    sch.decompose_reduction(grad_phi, group)

    if choices.pad:
        pad_rows(sch, config, last_column, split.n1)
    b, h, j, channel = sch.get_loops(sch.get_sblock("grad_value"))
    outer, _ = sch.split(j, [None, 64])
    sch.parallel(sch.fuse(b, h, outer))
    sch.vectorize(sch.split(channel, [None, config.lanes])[1])
