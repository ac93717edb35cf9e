"""Sums along the diagonals of a tile, of the gradients by tiles in float32, and the gradient of the bias from them.

A thread adds what lies on the same diagonal of its 4 x 4 pairs in registers, 7 sums for each half of its rows. They
meet in shared memory, where a thread for each offset of the tile adds them up in a fixed order. The next tile of
queries lies `tile` offsets further down: what both share is handed on, the rest is complete and written once.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_tiles_backward import FOUR, KEPT, WALKED, TileBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, function, let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.gpu_tile_backward_pairs import Pairs

OFFSETS = FOUR + KEPT - 1  # of a half of a thread's pairs; an eighth one stays 0
THREADS = 128


class Diagonals:
    """Sums of the pairs of a tile whose kept row lies equally far behind that of the tile.

    Parameters
    ----------
    shared
        Where in shared memory those begin that two tiles share.
    """

    def __init__(self, config: TileBackwardConfig, thread: Expr, pairs: Pairs, shared: Expr) -> None:
        self.config, self.thread, self.shared = config, thread, shared
        self.width = config.rows // KEPT  # threads along the kept rows
        self.of_thread = let("of_thread", warp.uint32(4 * (pairs.walked * self.width + pairs.kept)))
        self.start: Expr = None
        self.sums = named("diagonal_sums", warp.registers(2 * OFFSETS, "float32"))

    def clear(self) -> None:
        """Set to 0 what the first tile reads and none has written."""
        config = self.config
        for first in range(0, 2 * config.rows, config.threads):
            place = self.thread + first
            with T.If(place < 2 * config.rows), T.Then():
                warp.store_float(self.shared + warp.uint32(4 * place), 0, T.float32(0))

    def begin(self, start: Expr) -> None:
        """Begin a tile whose sums have their place at `start`."""
        self.start = let("diagonals", start)
        warp.zero(self.sums, 2 * OFFSETS)

    def add(self, i: Expr, j: Expr, value: Expr) -> None:
        """Add the number of a pair of this thread."""
        at = i // FOUR * OFFSETS + j - i % FOUR + FOUR - 1
        T.buffer_store(self.sums, self.sums[at] + value, [at])

    def store(self) -> None:
        """Write the thread's sums."""
        mine = let("mine", self.start + self.of_thread)
        for half in (0, 1):
            for offset in range(8):
                to = 4 * (half * 8 + offset) * self.config.diagonal_stride
                warp.store_float(mine, to, self.sums[half * OFFSETS + offset] if offset < OFFSETS else T.float32(0))

    def add_up(self, array: Buffer, tile: Expr, first: Expr, *at: Expr) -> None:
        """Add up what all threads have of a tile, behind a barrier.

        Offset b of the tile, of the kept row from the tile's row and `tile` more, belongs to index `first + b` of the
        last axis of the array.
        """
        config = self.config
        total, part = (named(name, warp.registers(1, "float32")) for name in ("total", "part"))
        count = config.rows + config.tile
        rows = 4 * config.rows
        before = let("before", self.shared + warp.uint32((tile + 1) % 2 * rows))
        after = let("after", self.shared + warp.uint32(tile % 2 * rows))
        for start in range(0, count, config.threads):
            b = self.thread + start
            with T.If(b < count), T.Then():
                T.buffer_store(total, T.float32(0), [0])
                with T.If(b >= config.tile), T.Then():
                    warp.load_float(total, 0, before + warp.uint32(4 * (b - config.tile)), 0)
                # a thread's number v of half s is offset tile + 4 (kept - walked) - s tile / 2 + v - 3
                shifted = let("shifted", b + FOUR - 1)
                number, kept = shifted % FOUR, let("kept_of_offset", shifted // FOUR)
                numbers = let("numbers_at", self.start + warp.uint32(4 * (number * config.diagonal_stride + kept)))
                with T.unroll(config.tile // WALKED) as walked, T.unroll(2) as half, T.unroll(2) as four:
                    column = walked + half * (config.tile // 2 // FOUR) - four - config.tile // FOUR
                    exists = T.And(kept + column >= 0, kept + column < self.width)
                    place = half * (8 * config.diagonal_stride) + four * (FOUR * config.diagonal_stride - 1)
                    place = place + walked * (self.width + 1) + half * (config.tile // 2 // FOUR)
                    with T.If(exists), T.Then():
                        warp.load_float(part, 0, numbers + warp.uint32(4 * place), -config.tile)
                        T.buffer_store(total, total[0] + part[0], [0])
                with T.If(b < config.rows):
                    with T.Then():
                        warp.store_float(after + warp.uint32(4 * b), 0, total[0])
                    with T.Else():
                        T.buffer_store(array, total[0], [*at, first + b])

    def finish(self, array: Buffer, tile: Expr, first: Expr, *at: Expr) -> None:
        """Write what the last tile would hand on, behind a barrier."""
        config = self.config
        value = named("value", warp.registers(1, "float32"))
        with T.If(self.thread < config.rows), T.Then():
            place = tile % 2 * config.rows + self.thread
            warp.load_float(value, 0, self.shared + warp.uint32(4 * place), 0)
            T.buffer_store(array, value[0], [*at, first + self.thread])


def bias_gradient(config: TileBackwardConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `grad_bias(diagonals, n_query, n_key, causal, grad_rpe_bias)` for CUDA.

    Arguments of the function: diagonals `[B, H, P / rows, P + rows]` float32, see `TileBackwardConfig.diagonals`;
    n_query, n_key; causal 0 or 1; grad_rpe_bias `[H, n_q + n_k - 1]` float32, 0 for t > 0 where causal. A sum over
    blocks in a fixed order.
    """
    with function("grad_bias") as built:
        batch, heads, offsets = (named(name, T.int64()) for name in ("batch", "heads", "offsets"))
        diagonals = argument("diagonals", (batch, heads, *map(T.int64, config.diagonals)), "float32")
        n_query, n_key, causal = (T.arg(name, T.int64()) for name in ("n_query", "n_key", "causal"))
        grad_bias = argument("grad_rpe_bias", (heads, offsets), "float32", align=4)
        with (
            T.launch_thread("blockIdx.x", (offsets + THREADS - 1) // THREADS) as block,
            T.launch_thread("blockIdx.y", heads) as h,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            place = let("place", block * THREADS + thread)
            total = named("total", warp.registers(1, "float32"))
            with T.If(place < offsets), T.Then():
                T.buffer_store(total, T.float32(0), [0])
                t = let("t", place - (n_query - 1))
                walked = let("walked", (n_query + config.tile - 1) // config.tile * config.tile)
                # blocks that have pairs so far apart: from the first that ends behind offset t to query 0, on to the
                # last that begins before offset t to the last query
                begin = let("begin", T.max(t, T.int64(0)) // config.rows)
                blocks = (n_key + config.rows - 1) // config.rows
                end = let("end", T.min(blocks, (walked + t + config.rows - 1) // config.rows))
                seen = T.Or(causal == 0, t <= 0)
                with T.If(seen), T.Then(), T.serial(batch) as b, T.serial(T.max(end - begin, T.int64(0))) as each:
                    kb = let("of_block", begin + each)
                    at = config.length + t - kb * config.rows
                    T.buffer_store(total, total[0] + diagonals[b, h, kb, at], [0])
                T.buffer_store(grad_bias, total[0], [h, place])
    return built.get()
