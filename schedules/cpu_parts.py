"""A long product by parts, each in the cache of one thread, shared by CPUs.

The first forward stage of columns cuts a product of P points into R = `outer[0]` transforms of P / R points, which the
last inverse stage joins again; nothing else does. These two stages are passes of their own over value and output.
Between them a thread makes whole parts, whose arrays between columns and rows fit into its own cache, where those of
the product do not. The array of P points lies part by part: all walks over it go on in the order of memory.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.schedules.cpu import Choices, Loop, pad_rows, place, place_rows, tiled, transform
from rpe_tvm.schedules.in_place import keep_in_parts, write_in_place


def product_in_parts(sch: Schedule, name: str, config: AttentionConfig, choices: Choices, product_loop: Loop) -> None:
    """Place all stages of `te.toeplitz.circulant_product` but its last, for all threads to work on one product.

    Parameters
    ----------
    config : AttentionConfig
        With two outer radices or more.
    product_loop : loop
        One iteration makes the product for one feature block. The last stage is already under it.
    """
    split = split_of(config)
    columns = transform(f"{name}_columns", config.outer)
    rows = transform(f"{name}_rows", config.inner)
    back_rows = transform(f"{name}_back_rows", config.inner[::-1])
    back_columns = transform(f"{name}_back_columns", config.outer[::-1])

    last_of_part = place(sch, back_columns[-2], product_loop)
    column, part = sch.get_loops(last_of_part)[-6:-4]
    sch.reorder(part, column)
    sch.parallel(part)
    for stage in reversed(back_columns[:-2]):
        place(sch, stage, column)

    last_row = place_rows(sch, rows, back_rows, part, choices)

    last_column = place(sch, columns[-1], part)
    columns_outer, _ = tiled(sch, sch.get_loops(last_column)[-6], choices.columns, choices, largest=4)
    for stage in reversed(columns[1:-1]):
        place(sch, stage, columns_outer)
    first = place(sch, columns[0], product_loop)
    sch.parallel(sch.get_loops(first)[-6])

    write_in_place(sch, last_row, columns[-1].name)
    keep_in_parts(sch, last_of_part, columns[0].name)
    if choices.pad:
        pad_rows(sch, config, last_column, split.q)
