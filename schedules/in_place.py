"""Inverse rows that are written where forward rows were read: a declaration, which `build.shared_arrays` carries out.

TVM's schedules have no such step, and its own reuse of memory finds only operands that die element by element.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.schedules.cpu import Block

# Annotation of a block with the name of the one to whose array it writes.
IN_PLACE = "rpe_tvm.in_place"


def write_in_place(sch: Schedule, last_row: Block, last_column: str) -> None:
    """Declare that the last inverse stage of rows writes to the array of the last forward stage of columns.

    It is right where a loop reads all of its rows before it writes them, and the same rows only.
    """
    sch.annotate(last_row, IN_PLACE, last_column)
