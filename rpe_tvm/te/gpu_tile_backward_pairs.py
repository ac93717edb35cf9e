"""Numbers for pairs of a tile's rows and kept ones, of the gradients by tiles in float32: 8 x 4 of a thread.

A block keeps rows, queries or keys, and walks over tiles of the others. Features lie as they do in global memory, a row
of positions each, channels, too, a row for each position: of the former a thread loads 8 and 4 neighbouring positions
of a feature, of the latter four channels of 8 and 4 positions. Rows lie in fours with a gap behind them
(`plan.gpu_tiles_backward.in_fours`) and the lanes of a warp are spread 8 x 4, so that loads, of 16 bytes each, meet no
bank twice.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, WARP
from rpe_tvm.plan.gpu_tiles_backward import FOUR, KEPT, PAIR_PADDING, WALKED, TileBackwardConfig, in_fours
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr

PAIRS = WALKED * KEPT

Allows = Callable[[Expr, Expr], Expr]  # row of a tile, kept row -> whether they meet
Meet = Callable[[Expr, Expr, Expr], Expr]  # numbers of a thread's pair, and what it is where it meets


def spread(thread: Expr, kept: int) -> tuple[Expr, Expr]:
    """Return the number of a thread along the kept rows and across them, 8 x 4 in a warp: neighbours in both."""
    span = min(8, kept)
    lane, number = thread % WARP, thread // WARP
    along = lane % 2 + lane // 4 % (span // 2) * 2
    across = lane // 2 % 2 + lane // (2 * span) * 2
    if kept == span:
        return along, across + number * (WARP // span)
    return along + number % (kept // span) * span, across + number // (kept // span) * (WARP // span)


def repeat(count: int, action: Callable[[Expr], None], at_once: int) -> None:
    """Call `action(i)` for i < count in a loop that makes `at_once` calls in a turn, and the rest behind it."""
    turns, rest = divmod(count, at_once)
    if turns:
        with T.serial(turns) as turn, T.unroll(at_once) as i:
            action(turn * at_once + i)
    if rest:
        with T.unroll(rest) as i:
            action(turns * at_once + i)


class Pairs:
    """A thread's pairs: rows 4 g + i and tile / 2 + 4 g + i of a tile, and kept rows 4 h + i.

    Parameters
    ----------
    base
        Where shared memory begins.
    """

    def __init__(self, config: TileBackwardConfig, thread: Expr, base: Expr) -> None:
        self.config, self.base = config, base
        kept, walked = spread(thread, config.rows // KEPT)
        self.kept, self.walked = let("kept", kept), let("walked", walked)
        features, channels, pairs, terms, _ = config.places
        rows = in_fours(FOUR, config.channels)
        self.walked_features = let("walked_features", base + warp.uint32(self.walked * CHUNK_BYTES))
        channels_of_stage = 4 * config.stage_places[0]
        self.walked_channels = let("walked_channels", base + warp.uint32(channels_of_stage + self.walked * (4 * rows)))
        self.kept_features = let("kept_features", base + warp.uint32(features + self.kept * CHUNK_BYTES))
        self.kept_channels = let("kept_channels", base + warp.uint32(channels + self.kept * (4 * rows)))
        of_four = 4 * in_fours(FOUR, config.rows, PAIR_PADDING)
        self.place = let("pairs", base + warp.uint32(pairs + self.walked * of_four + self.kept * CHUNK_BYTES))
        self.kept_terms = let("kept_terms", base + warp.uint32(terms + self.kept * CHUNK_BYTES))

    def walked_row(self, i: Expr) -> Expr:
        """Return the i-th of the thread's rows of a tile."""
        return self.walked * FOUR + (i % FOUR + i // FOUR * (self.config.tile // 2))

    def kept_row(self, i: Expr) -> Expr:
        """Return the i-th of the thread's kept rows."""
        return self.kept * FOUR + i

    def of_features(self, used: Expr, sums: Buffer) -> None:
        """Make the products over features; pair (i, j) is at i * KEPT + j."""
        config = self.config
        warp.zero(sums, PAIRS)
        x, y = (named(name, warp.registers(count, "float32")) for name, count in (("x", WALKED), ("y", KEPT)))
        walked = let("walked_at", self.walked_features + used)

        def add_four(four: Expr) -> None:
            of_walked = let("of_walked", walked + warp.uint32(four * (4 * in_fours(FOUR, config.tile))))
            of_kept = let("of_kept", self.kept_features + warp.uint32(four * (4 * in_fours(FOUR, config.rows))))
            with T.unroll(FOUR) as feature:
                with T.unroll(2) as half:
                    offset = 4 * (feature * config.tile + half * (config.tile // 2))
                    warp.load_four(x, half * FOUR, of_walked + warp.uint32(offset), 0)
                warp.load_four(y, 0, of_kept + warp.uint32(4 * feature * config.rows), 0)
                with T.unroll(WALKED) as i, T.unroll(KEPT) as j:
                    at = i * KEPT + j
                    T.buffer_store(sums, sums[at] + x[i] * y[j], [at])

        repeat(config.features // FOUR, add_four, config.at_once)

    def of_channels(self, used: Expr, sums: Buffer) -> None:
        """Make the products over channels, one channel after the other."""
        config = self.config
        warp.zero(sums, PAIRS)
        x, y = (named(name, warp.registers(count, "float32")) for name, count in (("x", FOUR), ("y", FOUR * KEPT)))
        walked = let("walked_at", self.walked_channels + used)

        def add_four(four: Expr) -> None:
            of_walked = let("of_walked", walked + warp.uint32(four * CHUNK_BYTES))
            of_kept = let("of_kept", self.kept_channels + warp.uint32(four * CHUNK_BYTES))
            with T.unroll(KEPT) as j:
                warp.load_four(y, j * FOUR, of_kept + warp.uint32(4 * j * config.channels), 0)
            with T.unroll(WALKED) as i:
                row = i % FOUR * config.channels + i // FOUR * in_fours(config.tile // 2, config.channels)
                warp.load_four(x, 0, of_walked + warp.uint32(4 * row), 0)
                with T.unroll(FOUR) as channel, T.unroll(KEPT) as j:
                    at = i * KEPT + j
                    T.buffer_store(sums, sums[at] + x[channel] * y[j * FOUR + channel], [at])

        repeat(config.channels // FOUR, add_four, config.at_once)

    def load_weights(self, used: Expr, sign: int) -> Callable[[Expr, Expr], Expr]:
        """Load the weights of the thread's pairs; returns that of a pair.

        `sign` says whether offsets grow with the row of the tile (1) or with the kept one (-1): in the strip, offset 0
        from the first row to the other first row is at `rows` or at `tile`.
        """
        config = self.config
        weights = named("weights", warp.registers(2 * WALKED, "float32"))
        origin = config.rows if sign > 0 else config.tile
        place = config.stage_places[1] + origin - FOUR + sign * FOUR * (self.walked - self.kept)
        address = let("weights_at", self.base + used + warp.uint32(4 * place))
        for half in (0, 1):
            for four in (0, 1):
                offset = sign * half * (config.tile // 2) + four * FOUR
                warp.load_four(weights, half * WALKED + four * FOUR, address, 4 * offset)

        def weight(i: Expr, j: Expr) -> Expr:
            return weights[i // FOUR * WALKED + FOUR + sign * (i % FOUR - j)]

        return weight

    def where_they_meet(self, is_partial: Expr, allows: Allows, action: Callable[[Meet], None]) -> None:
        """Call `action`: where not all pairs of a tile meet, what it hands over is 0 for those that do not."""
        with T.If(is_partial):
            with T.Then():

                def select(i: Expr, j: Expr, x: Expr) -> Expr:
                    return T.Select(allows(self.walked_row(i), self.kept_row(j)), x, T.float32(0))

                action(select)
            with T.Else():
                action(lambda i, j, x: x)

    def store(self, pairs: Buffer) -> None:
        """Write the thread's pairs, a row of kept ones for each row of the tile."""
        with T.unroll(WALKED) as i:
            warp.store_four(self._row(i), 0, [pairs[i * KEPT + j] for j in range(KEPT)])

    def load(self, pairs: Buffer, i: Expr) -> None:
        """Read what this thread has written of a row of the tile."""
        warp.load_four(pairs, 0, self._row(i), 0)

    def _row(self, i: Expr) -> Expr:
        half = in_fours(self.config.tile // 2, self.config.rows, PAIR_PADDING)
        return self.place + warp.uint32(4 * (i % FOUR * self.config.rows + i // FOUR * half))
