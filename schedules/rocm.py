"""What schedules of AMD GPUs differ in from `schedules.gpu`: local memory of a fixed size, and no rows in registers.

TVM's generator knows no barrier for shared memory whose size a launch gives, and a fixed size is what code objects say.
Threads and radices are in the config, see `plan.rocm`.
"""

from __future__ import annotations

from collections.abc import Iterator

import tvm
from tvm.s_tir import Schedule

from rpe_tvm.schedules.gpu import Block

# Channels of a row that a thread of the feature map keeps in registers. Where that loop is unrolled, LLVM moves all
# loads to its beginning: with 64 channels 446 registers on gfx90a, and 28 spilled on gfx1100, in place of 84 and 42.
WIDEST_ROW = 0


def with_fixed_shared_memory(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return a scheduled function with all its shared memory of a size that is known when it is compiled."""
    sch = Schedule(function)
    for block in _blocks(sch, sch.get_sblock("root")):
        for index, write in enumerate(sch.get(block).writes):
            if write.source.scope() == "shared.dyn":
                sch.set_scope(block, index, "shared")
    return sch.mod["main"]


def _blocks(sch: Schedule, block: Block) -> Iterator[Block]:
    for child in sch.get_child_blocks(block):
        yield child
        yield from _blocks(sch, child)
