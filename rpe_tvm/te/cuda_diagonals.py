"""Sums along the diagonals of a tile, from the registers of warps to an array of offsets in global memory.

Of a 16 x 8 accumulator a lane has rows `group` and `group + 8` and columns 2 pair and 2 pair + 1, so what 8 rows
further down and 8 columns further right lies on the same diagonal belongs to the same lane: it adds those in registers.
With step s, by how many blocks of 8 x 8 the row lies further than the column, and column e of two, a lane's sum belongs
to offset 8 s + group - (2 pair + e). What is left are 8 columns: warps write theirs to shared memory, and threads add
those of each offset in a fixed order.
"""

from __future__ import annotations

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named
from rpe_tvm.te.cuda_tile import Place
from rpe_tvm.te.cuda_warp import Buffer, Expr

ZEROS = 8  # beside each column


class Diagonals:
    """Sums of a block's warps in shared memory, of two tiles in turns: one is added up while the other is written.

    Parameters
    ----------
    start
        Where they begin.
    """

    def __init__(self, config: TensorCoreBackwardConfig, thread: Expr, lane: Place, start: Expr) -> None:
        self.config, self.thread, self.start = config, thread, start
        of_warp = 4 * 8 * config.diagonal_stride
        warp_number = lane.warp_k * config.warps + lane.warp_q
        in_warp = 2 * lane.pair * config.diagonal_stride + lane.group + ZEROS
        self.mine = let("diagonals", start + warp.uint32(warp_number * of_warp + in_warp * 4))
        self.highest = 2 * config.row_blocks - 1
        self.lowest = self.highest - config.diagonals + 1
        self.sums = named("diagonal_sums", warp.registers(2 * config.diagonals, "float32"))

    def clear(self) -> None:
        """Set all of the shared memory to 0: what lies beside the columns stays 0."""
        for first in range(0, 2 * self.config.diagonal_bytes // 4, self.config.threads):
            place = self.thread + first
            with T.If(place < 2 * self.config.diagonal_bytes // 4), T.Then():
                warp.store_float(self.start + warp.uint32(place * 4), 0, T.float32(0))

        self.begun: set[int] = set()

    def add(self, step: int, column: int, value: Expr) -> None:
        """Add a number of this lane."""
        at = 2 * (step - self.lowest) + column
        T.buffer_store(self.sums, self.sums[at] + value if at in self.begun else value, [at])
        self.begun.add(at)

    def store(self, odd: Expr, steps: range) -> None:
        """Write the sums of the steps that are complete; of odd tiles in the second place."""
        to = self.mine + odd * T.uint32(self.config.diagonal_bytes)
        for step in steps:
            for column in (0, 1):
                offset = 4 * (column * self.config.diagonal_stride + 8 * (step - self.lowest))
                warp.store_float(to, offset, self.sums[2 * (step - self.lowest) + column])

    def add_to(self, array: Buffer, odd: Expr, *at: Expr) -> None:
        """Add what all warps have of a tile to the array's last axis, from the offset of row 0 and the tile's end on.

        Behind a barrier. Index i there belongs to offset i - tile.
        """
        config = self.config
        total = named("total", warp.registers(1, "float32"))
        part = named("part", warp.registers(1, "float32"))
        count = config.rows + config.tile
        for first in range(0, count, config.threads):
            index = self.thread + first
            with T.If(index < count), T.Then():
                T.buffer_store(total, T.float32(0), [0])
                begin = self.start + odd * T.uint32(config.diagonal_bytes) + warp.uint32(index * 4)
                address = let("address", begin)
                for share in range(config.shares):
                    for row_warp in range(config.warps):
                        row, column = row_warp * (config.rows // config.warps), share * config.share
                        # where the warp's sums begin, for column 0; the others have the same offset further up
                        origin = config.tile + row - column + 8 * self.lowest
                        number = share * config.warps + row_warp
                        with T.If(T.And(index > origin - 8, index < origin + 8 * config.diagonals)), T.Then():
                            for x in range(8):
                                offset = 4 * ((number * 8 + x) * config.diagonal_stride + ZEROS + x - origin)
                                warp.load_float(part, 0, address, offset)
                                T.buffer_store(total, total[0] + part[0], [0])
                warp.add_float(array.ptr_to([*at[:-1], at[-1] + index]), total[0])
