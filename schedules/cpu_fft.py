"""Schedules of attention by FFT, shared by CPUs."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.schedules.cpu import Choices, Loop, at_consumer, pad_rows, place, place_rows, tiled, transform, vectorize
from rpe_tvm.schedules.cpu_parts import product_in_parts
from rpe_tvm.schedules.in_place import write_in_place


def _circulant_product(
    sch: Schedule, name: str, config: AttentionConfig, choices: Choices, product_loop: Loop, column_loop: Loop
) -> None:
    """Place all stages of `te.toeplitz.circulant_product` but its last.

    The array of P points between the halves of the split lives under `product_loop`; all other stages work on a few
    columns or rows that stay in L1.

    Parameters
    ----------
    product_loop : loop
        One iteration makes the product for one feature block.
    column_loop : loop
        One iteration finishes a few columns of the last half; the last stage is already under it.
    """
    split = split_of(config)
    columns = transform(f"{name}_columns", config.outer)
    rows = transform(f"{name}_rows", config.inner)
    back_rows = transform(f"{name}_back_rows", config.inner[::-1])
    back_columns = transform(f"{name}_back_columns", config.outer[::-1])

    for stage in reversed(back_columns[:-1]):
        place(sch, stage, column_loop)

    last_row = place_rows(sch, rows, back_rows, product_loop, choices)

    last_column = place(sch, columns[-1], product_loop)
    feature, column = sch.get_loops(last_column)[-7:-5]
    columns_outer, columns_inner = tiled(sch, column, choices.columns, choices, largest=4)
    sch.reorder(columns_outer, feature, columns_inner)
    for stage in reversed(columns[:-1]):
        place(sch, stage, feature)

    write_in_place(sch, last_row, columns[-1].name)  # one array in place of two
    if choices.pad:
        pad_rows(sch, config, last_column, split.n1)


def fft_denominator(sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
    """Schedule `te.denominator`: parallel over (batch, head, feature group)."""
    denominator = sch.get_sblock("denominator")
    b, h, g, *_ = sch.get_loops(denominator)
    head = sch.fuse(b, h, g)
    sch.parallel(head)
    last_stage = transform("key_back_columns", config.outer[::-1])[-1]
    last = place(sch, last_stage, head)
    parity, column = sch.get_loops(last)[-7:-5]
    _circulant_product(sch, "key", config, Choices(pad=choices.pad), parity, column)
    at_consumer(sch, sch.get_sblock("packed_key"), parity)
    sch.decompose_reduction(denominator, sch.get_loops(denominator)[-2])


def fft_attention(sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
    """Schedule `te.fft_attention`: parallel over (batch, head, channel group), a feature block after the other."""
    fft_denominator(sch, config, choices)
    out = sch.get_sblock("out")
    b, h, i, channel = sch.get_loops(out)
    # an outer loop of one iteration, so that the inner one has a constant extent where n_q is symbolic
    bucket, position = sch.split(i, [None, config.length])
    vector, lane = sch.split(channel, [None, config.lanes])
    group, part = sch.split(vector, [None, 2])
    sch.reorder(b, h, bucket, group, position, part, lane)
    task = sch.fuse(b, h, bucket, group)
    sch.parallel(position if choices.cooperative else task)
    sch.vectorize(lane)
    at_consumer(sch, sch.get_sblock("inverse_denominator"), task)
    numerator = sch.get_sblock("numerator")
    at_consumer(sch, numerator, task)
    parity, column, q, s, part, lane, feature = sch.get_loops(numerator)[-7:]
    features_outer, features_inner = tiled(sch, feature, choices.feature_block, choices, largest=4)
    columns_outer, columns_inner = tiled(sch, column, choices.columns, choices, largest=4)
    sch.reorder(parity, features_outer, columns_outer, features_inner, columns_inner, q, s, part, lane)
    # the last stage stays in registers and is added to the output at once
    place(sch, transform("value_back_columns", config.outer[::-1])[-1], q)
    if choices.cooperative:
        product_in_parts(sch, "value", config, choices, features_outer)
    else:
        _circulant_product(sch, "value", config, choices, features_outer, features_inner)
    packed = sch.get_sblock("packed_value")
    at_consumer(sch, packed, parity)
    vectorize(sch, packed, unrolled=1)
    if choices.cooperative:
        sch.parallel(columns_outer)
        sch.parallel(sch.get_loops(packed)[-5])
    sch.vectorize(lane)
    sch.unroll(part)
    sch.unroll(s)
    init = sch.decompose_reduction(numerator, features_outer)
    sch.vectorize(sch.get_loops(init)[-1])
