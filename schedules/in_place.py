"""Arrays that are one: declarations, which `build.shared_arrays` carries out.

TVM's schedules have no such step, and its own reuse of memory finds only operands that die element by element.
"""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.schedules.cpu import Block

# Annotations of a block with the name of the one to whose array it writes.
IN_PLACE = "rpe_tvm.in_place"
IN_PARTS = "rpe_tvm.in_parts"


def write_in_place(sch: Schedule, last_row: Block, last_column: str) -> None:
    """Declare that the last inverse stage of rows writes to the array of the last forward stage of columns.

    It is right where a loop reads all of its rows before it writes them, and the same rows only.
    """
    sch.annotate(last_row, IN_PLACE, last_column)


def keep_in_parts(sch: Schedule, last_of_part: Block, first_column: str) -> None:
    """Declare that the first forward stage of columns writes part by part, and the last inverse stage of a part there.

    It is right where a loop reads all of a part before it writes it, and the same part only.
    """
    sch.annotate(last_of_part, IN_PARTS, first_column)
