"""Sums over a tile's rows, of the gradients by tiles in float32: a thread has 8 kept rows x 4 columns, once or more."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, WARP
from rpe_tvm.plan.gpu_tiles_backward import COLUMNS, FOUR, PAIR_PADDING, ROWS, TileBackwardConfig, in_fours
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named, only_if
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.gpu_tile_backward_pairs import Allows, repeat, spread


class Sums:
    """Sums of products of pairs and of a tile's rows: of their features, or of their channels.

    A thread has kept rows 4 h + i and rows / 2 + 4 h + i, and of each of its panels 4 columns. Groups of warps take
    each their part of a tile's rows.

    Parameters
    ----------
    name
        Of the registers.
    columns
        Features or channels.
    base
        Where shared memory begins.
    """

    def __init__(self, name: str, config: TileBackwardConfig, columns: int, thread: Expr, base: Expr) -> None:
        self.config, self.columns, self.base = config, columns, base
        self.share = share = config.share(columns)
        self.registers = named(name, warp.registers(share.sums, "float32"))
        warp.zero(self.registers, share.sums)
        threads = WARP * share.warps
        self.group = let("group", thread // threads)
        self.thread = let("thread_of_group", thread % threads)
        places = [spread(self.thread + panel * threads, config.rows // ROWS) for panel in range(share.panels)]
        self.kept = let("kept_of_sums", places[0][0])
        # past the last columns the last ones again: a bound in place of a branch
        last = share.columns // COLUMNS - 1
        self.column = [let("column", T.min(across, last)) for _, across in places]
        self.is_column = [across <= last for _, across in places]
        self.is_all = share.groups * threads == config.threads
        self.walked = config.tile // share.groups
        of_group = self.group * in_fours(self.walked, config.rows, PAIR_PADDING)
        self.pairs_at = let("pairs_at", base + warp.uint32(config.places[2] + self.kept * CHUNK_BYTES + 4 * of_group))

    def add_channels(self, used: Expr, allows: Allows | None = None) -> None:
        """Add the products of pairs and of the channels of a tile's rows; only of those that meet."""
        config = self.config
        place = 4 * config.stage_places[0] + 4 * self.group * in_fours(self.walked, config.channels)
        columns_at = [
            let("columns_at", self.base + used + warp.uint32(place + column * CHUNK_BYTES)) for column in self.column
        ]
        stride = 4 * in_fours(FOUR, config.channels)

        def load(y: Buffer, four: Expr) -> None:
            pass

        def load_row(y: Buffer, four: Expr, row: Expr) -> None:
            for panel, at in enumerate(columns_at):
                warp.load_four(y, panel * COLUMNS, at + warp.uint32(four * stride + 4 * row * config.channels), 0)

        self._add(load, load_row, 1, allows)

    def add_features(self, used: Expr, allows: Allows | None = None) -> None:
        """Add the products of pairs and of the features of a tile's rows; only of those that meet."""
        config = self.config
        place = 4 * self.group * self.walked
        stride = 4 * in_fours(COLUMNS, config.tile)
        columns_at = [
            let("columns_at", self.base + used + warp.uint32(place + column * stride)) for column in self.column
        ]

        def load(y: Buffer, four: Expr) -> None:
            for panel, at in enumerate(columns_at):
                with T.unroll(COLUMNS) as column:
                    to = (panel * COLUMNS + column) * FOUR
                    warp.load_four(y, to, at + warp.uint32(four * CHUNK_BYTES + 4 * column * config.tile), 0)

        self._add(load, None, FOUR, allows)

    def _add(
        self,
        load: Callable[[Buffer, Expr], None],
        load_row: Callable[[Buffer, Expr, Expr], None] | None,
        rows_at_once: int,
        allows: Allows | None,
    ) -> None:
        """Walk over the group's rows, four at a time; y has `rows_at_once` of them, column by column."""
        config = self.config
        x = named("x", warp.registers(ROWS, "float32"))
        y = named("y", warp.registers(len(self.column) * COLUMNS * rows_at_once, "float32"))
        stride = 4 * in_fours(FOUR, config.rows, PAIR_PADDING)

        def add_four(four: Expr) -> None:
            pairs_at = let("pairs_at", self.pairs_at + warp.uint32(four * stride))
            load(y, four)
            with T.unroll(FOUR) as row:
                if load_row is not None:
                    load_row(y, four, row)
                with T.unroll(2) as half:
                    offset = 4 * (row * config.rows + half * (config.rows // 2))
                    warp.load_four(x, half * FOUR, pairs_at + warp.uint32(offset), 0)
                with T.unroll(ROWS) as i:
                    meet = None
                    if allows is not None:
                        walked = self.group * self.walked + (four * FOUR + row)
                        meet = let("meet", allows(walked, self.kept_row(i)))
                    with T.unroll(len(self.column) * COLUMNS) as j:
                        at = i * (len(self.column) * COLUMNS) + j
                        old = self.registers[at]
                        new = old + x[i] * y[j * rows_at_once + row % rows_at_once]
                        T.buffer_store(self.registers, new if meet is None else T.Select(meet, new, old), [at])

        with only_if(None if self.is_all else self.group < self.share.groups):
            # tiles that a mask cuts are few: their code stays short
            repeat(self.walked // FOUR, add_four, config.at_once if allows is None else 1)

    def kept_row(self, i: Expr) -> Expr:
        """Return the i-th of the thread's kept rows."""
        return self.kept * FOUR + (i % FOUR + i // FOUR * (self.config.rows // 2))

    def add_groups(self) -> None:
        """Add up what the groups have, in the first one, where the tiles were before."""
        share = self.share
        warp.barrier()
        if share.groups == 1:
            return
        threads = WARP * share.warps
        stride = 4 * threads * (share.groups - 1)
        place = let("place", self.base + warp.uint32(4 * self.thread))
        with T.If(T.And(self.group > 0, self.group < share.groups)), T.Then():
            # the subtraction in unsigned numbers: TVM would make one of -4 * threads
            mine = let("mine", place + warp.uint32(self.group * (4 * threads)) - T.uint32(4 * threads))
            with T.unroll(share.sums) as register:
                warp.store_float(mine + warp.uint32(register * stride), 0, self.registers[register])
        warp.barrier()
        part = named("part", warp.registers(1, "float32"))
        with only_if(self.group == 0), T.unroll(share.sums) as register, T.unroll(share.groups - 1) as other:
            warp.load_float(part, 0, place + warp.uint32(register * stride + other * (4 * threads)), 0)
            T.buffer_store(self.registers, self.registers[register] + part[0], [register])
        warp.barrier()

    def write(self, store: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Call `store(i, row, column, sum)` for all sums: the i-th row of the thread."""
        panels = len(self.column)
        for panel in range(panels):
            mine = T.And(self.group == 0, self.is_column[panel])
            with only_if(mine), T.unroll(ROWS) as i, T.unroll(COLUMNS) as j:
                at = (i * panels + panel) * COLUMNS + j
                store(i, self.kept_row(i), self.column[panel] * COLUMNS + j, self.registers[at])
