"""Kernelized attention with RPE in float32, without tensor cores: ((phi_q phi_k^T) * C) value, normalised.

A block walks over the keys and keeps the sums of its queries in registers. Scores and sums are sums of outer products:
a lane has 4 or 8 queries, 4 or 8 keys and every eighth piece of 4 channels. Scores of a warp pass through shared memory
that is its own, so warps meet once a tile.
Under a causal mask keys after a query take no part, whatever their features and values are: not even as 0 times NaN.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, WARP
from rpe_tvm.plan.gpu_tiles import COLUMNS, FLOAT_BYTES, PIECE, ROWS, TileConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named, only_if
from rpe_tvm.te.cuda_walk import walk
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.gpu_tile import (
    COLUMN_BITS,
    Lane,
    column_of,
    columns,
    copy_features,
    copy_rows,
    copy_strip,
    in_pieces,
    outer_products,
    row_of,
    rows,
    sum_of_products,
)


def tile_attention(config: TileConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `attention(phi_q, phi_k, value, table, causal, denominators, out)` for CUDA.

    Arguments of the function, all float32: phi_q and phi_k `[B, H, m, P]`, zero past n; value `[B, H, n_k, d]` and out
    `[B, H, n_q, d]` with any strides, the last axis contiguous; table `[H, width]`, c[t] at index
    t + round_up(n_q, tile_q), of at least as many entries plus round_up(n_k, tile_k); causal 0 or 1: whether keys after
    a query take no part; denominators `[B, H, n_q]`: become sum_j (phi_q_i . phi_k_j) c[j-i], which gradients take. All
    sizes but m, d and P are read from the arguments.
    """
    with function("attention") as built:
        _build(config)
    return built.get()


@dataclass(frozen=True)
class _Arguments:
    """The function's arguments and sizes."""

    phi_q: Buffer
    phi_k: Buffer
    value: Buffer
    table: Buffer
    denominators: Buffer
    out: Buffer
    n_query: Expr
    n_key: Expr
    causal: Expr


def _arguments(config: TileConfig) -> tuple[_Arguments, Expr, Expr]:
    names = ("batch", "heads", "n_query", "n_key", "width")
    batch, heads, n_query, n_key, width = (named(name, T.int64()) for name in names)
    features, length, channels = (T.int64(x) for x in (config.num_features, config.length, config.head_dim))
    phi_q = argument("phi_q", (batch, heads, features, length), "float32")
    phi_k = argument("phi_k", (batch, heads, features, length), "float32")
    value = argument("value", (batch, heads, n_key, channels), "float32", strided=True, align=FLOAT_BYTES)
    table = argument("table", (heads, width), "float32")
    causal = T.arg("causal", T.int64())
    denominators = argument("denominators", (batch, heads, n_query), "float32", align=FLOAT_BYTES)
    out = argument("out", (batch, heads, n_query, channels), "float32", strided=True, align=FLOAT_BYTES)
    return _Arguments(phi_q, phi_k, value, table, denominators, out, n_query, n_key, causal), batch, heads


class _Sums:
    """The accumulators of a lane: numerators of its rows and channels, and denominators over its keys."""

    def __init__(self, config: TileConfig, rows: int) -> None:
        self.rows, self.channels = rows, PIECE * config.channel_pieces
        self.numerator = named("numerator", warp.registers(self.rows * self.channels, "float32"))
        self.denominator = named("denominator", warp.registers(self.rows, "float32"))
        warp.zero(self.numerator, self.rows * self.channels)
        warp.zero(self.denominator, self.rows)


def _build(config: TileConfig) -> None:
    args, batch, heads = _arguments(config)
    blocks_q = (args.n_query + config.tile_q - 1) // config.tile_q
    with (
        T.launch_thread("blockIdx.x", blocks_q) as block,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
    ):
        # with a causal mask the last rows have most to do: they start first
        first_q = let("first_q", (blocks_q - 1 - block) * config.tile_q)
        shared = T.alloc_buffer((config.shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        # a pointer to all of it: of a pointer to an element TVM would keep that element only
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        seen = T.Select(args.causal != 0, T.min(args.n_key, first_q + config.tile_q), args.n_key)
        tiles = let("tiles", T.Cast("int32", (seen + config.tile_k - 1) // config.tile_k))
        lane = Lane(config.warps_q, config.row_pieces, thread)
        queries = base + T.uint32(config.stages * config.stage_bytes)
        copy_features(config.threads, thread, args.phi_q, b, h, first_q, config.tile_q, queries)
        tile = _Tile(config, args, lane, base, first_q)
        sums = _Sums(config, PIECE * config.row_pieces)

        def load(stage: Expr, tile: Expr) -> None:
            _load_tile(config, args, stage, thread, b, h, first_q, tile)

        walk(config, base, tiles, load, lambda used, at: tile.add(sums, used, at))
        first_row: Expr = T.int32(0)
        if config.warps_k > 1:
            sums, first_row = _add_shares(config, lane, base, sums)
        _write(config, args, lane, first_row, sums, b, h, first_q)


def _load_tile(
    config: TileConfig, args: _Arguments, stage: Expr, thread: Expr, b: Expr, h: Expr, first_q: Expr, tile: Expr
) -> None:
    """Start the copies of a tile of phi_k, of value, and of the weights from the block's queries to the tile's keys."""
    first_k = let("first_k", T.Cast("int64", tile) * config.tile_k)
    origin = (args.n_query + config.tile_q - 1) // config.tile_q * config.tile_q
    values = config.num_features * config.tile_k * FLOAT_BYTES
    strip = values + config.tile_k * config.value_row_bytes
    copy_features(config.threads, thread, args.phi_k, b, h, first_k, config.tile_k, stage)
    first, count = first_k - first_q + origin - config.tile_q, config.tile_q + config.tile_k
    copy_strip(config.threads, thread, args.table, h, first, count, stage + T.uint32(strip))
    value_bytes = config.value_row_bytes
    copy_rows(config.threads, thread, args.value, b, h, first_k, config.tile_k, stage + T.uint32(values), value_bytes)


class _Tile:
    """What a lane does with a tile of keys."""

    def __init__(self, config: TileConfig, args: _Arguments, lane: Lane, base: Expr, first_q: Expr) -> None:
        self.config, self.causal = config, args.causal
        tiles = config.stages * config.stage_bytes
        queries = config.num_features * config.tile_q * FLOAT_BYTES
        values = config.num_features * config.tile_k * FLOAT_BYTES
        strip = values + config.tile_k * config.value_row_bytes
        of_warp = (lane.warp_k * config.warps_q + lane.warp_q) * (config.keys * config.score_row_bytes)
        row, key, channel = lane.row + lane.of_rows * PIECE, lane.warp_k * config.keys, lane.of_columns * PIECE
        self.queries = let("queries", base + T.uint32(tiles) + warp.uint32(row * FLOAT_BYTES))
        self.keys = let("keys", base + warp.uint32((key + channel) * FLOAT_BYTES))
        values_of_lane = key * config.value_row_bytes + channel * FLOAT_BYTES
        self.values = let("values", base + T.uint32(values) + warp.uint32(values_of_lane))
        # the weight of the lane's first key and the row after its last, of a piece: a multiple of 16 bytes
        offset = config.tile_q + key + channel - row - PIECE
        self.weights = let("weights", base + T.uint32(strip) + warp.uint32(offset * FLOAT_BYTES))
        scores = base + T.uint32(tiles + queries) + warp.uint32(of_warp)
        self.scores = let("scores", scores)
        self.of_columns, self.of_rows = lane.of_columns, lane.of_rows
        self.first_row_bytes = let("first_row_bytes", lane.of_rows * (PIECE * FLOAT_BYTES))
        self.first_row = let("first_row", T.Cast("int32", first_q) + lane.row)
        self.key = key
        n_key = T.Cast("int32", args.n_key)
        seen = T.Select(args.causal != 0, T.min(n_key, self.first_row + config.rows), n_key)
        self.seen = let("seen", seen)

    def add(self, sums: _Sums, used: Expr, tile: Expr) -> None:
        """Add the contribution of a warp's keys of one tile."""
        config = self.config
        first = let("first_key", tile * config.tile_k + self.key)
        is_whole = T.Or(self.causal == 0, first + (config.keys - 1) <= self.first_row)
        with T.If(first < self.seen), T.Then(), T.If(is_whole):
            with T.Then():
                self._add(sums, used, None)
            with T.Else():
                self._add(sums, used, let("ahead", first - self.first_row))

    def _add(self, sums: _Sums, used: Expr, ahead: Expr | None) -> None:
        """Add the warp's keys; `ahead` is its first key less its first row where a mask cuts through them."""
        config = self.config
        height, width = PIECE * config.row_pieces, PIECE * config.key_pieces
        scores = named("scores", warp.registers(height * width, "float32"))
        warp.zero(scores, height * width)
        phi_q = rows(self.queries, config.row_pieces, config.tile_q * FLOAT_BYTES)
        phi_k = columns(self.keys + used, config.key_pieces, config.tile_k * FLOAT_BYTES)
        sum_of_products(scores, phi_q, phi_k, config.num_features)
        self._weigh(sums, scores, used, ahead)
        # what the lanes had to read of the scores before, they have read
        warp.warp_barrier()
        self._store(scores)
        warp.warp_barrier()
        # the terms of a turn are one key of each piece: `_store` put them side by side
        pieces, row_bytes = 8 * config.key_pieces, config.value_row_bytes
        weighted = rows(self.scores + warp.uint32(self.first_row_bytes), config.row_pieces, config.score_row_bytes)
        value = columns(self.values + used, config.channel_pieces, PIECE * row_bytes, row_bytes)

        def keeps(turn: Expr, term: Expr, row: Expr) -> Expr:
            return ahead + term * PIECE + turn <= self.of_rows * PIECE + row_of(row)

        outer_products(sums.numerator, weighted, value, pieces, PIECE, None if ahead is None else keeps)

    def _weigh(self, sums: _Sums, scores: Buffer, used: Expr, ahead: Expr | None) -> None:
        """Multiply scores by their weights, and add them to the denominators."""
        config = self.config
        width = PIECE * config.key_pieces
        weights = warp.registers(2 * PIECE, "float32")  # from offset -4, of a piece of keys and a piece of rows
        address = let("address", self.weights + used)
        for row_piece in range(config.row_pieces):
            for key_piece in range(config.key_pieces):
                # rows further on lie in front: the address is that of the first piece
                offset = key_piece * COLUMNS - row_piece * ROWS
                for half in (0, 1):
                    warp.load_four(weights, half * PIECE, address, (offset + half * PIECE) * FLOAT_BYTES)
                with T.unroll(PIECE) as i, T.unroll(PIECE) as j:
                    row, key = row_piece * PIECE + i, key_piece * PIECE + j
                    weighted = scores[row * width + key] * weights[PIECE + j - i]
                    if ahead is not None:
                        row_of_warp = self.of_rows * PIECE + row_of(row)
                        is_seen = ahead + self.of_columns * PIECE + column_of(key) <= row_of_warp
                        weighted = T.Select(is_seen, weighted, T.float32(0))
                    T.buffer_store(scores, weighted, [row * width + key])
                    T.buffer_store(sums.denominator, sums.denominator[row] + scores[row * width + key], [row])

    def _store(self, scores: Buffer) -> None:
        """Store the warp's scores, a key's rows side by side; first the first keys of all pieces, then the second."""
        config = self.config
        in_warp = self.of_columns * config.score_row_bytes + self.first_row_bytes
        to = let("to", self.scores + warp.uint32(in_warp))
        width = PIECE * config.key_pieces
        for row_piece in range(config.row_pieces):
            for key_piece in range(config.key_pieces):
                for j in range(PIECE):
                    first = row_piece * PIECE * width + key_piece * PIECE + j
                    slot = (j * config.key_pieces + key_piece) * 8
                    offset = slot * config.score_row_bytes + row_piece * ROWS * FLOAT_BYTES
                    warp.store_four(to, offset, [scores[first + i * width] for i in range(PIECE)])


def _add_shares(config: TileConfig, lane: Lane, base: Expr, sums: _Sums) -> tuple[_Sums, Expr]:
    """Add up what the warps along the keys have, each for its share of the rows; return that, and its first row."""
    warp.wait(0)
    warp.barrier()
    pieces, warps = config.channel_pieces, config.warps_q * config.warps_k
    row_bytes = pieces * WARP * CHUNK_BYTES  # numerators of a row of all lanes, piece by piece; then the denominators
    numerators = let("numerators", base + warp.uint32(lane.lane * CHUNK_BYTES))
    denominators = base + T.uint32(warps * sums.rows * row_bytes)
    denominators = let("denominators", denominators + warp.uint32(lane.lane * FLOAT_BYTES))

    def place(warp_k: Expr, row: Expr, piece: int) -> tuple[Expr, Expr]:
        at = (warp_k * config.warps_q + lane.warp_q) * sums.rows + row
        numerator = numerators + warp.uint32(at * row_bytes + piece * (WARP * CHUNK_BYTES))
        return numerator, denominators + warp.uint32(at * (WARP * FLOAT_BYTES))

    for row in range(sums.rows):
        for piece in range(pieces):
            numbers = [sums.numerator[row * sums.channels + piece * PIECE + i] for i in range(PIECE)]
            warp.store_four(place(lane.warp_k, row, piece)[0], 0, numbers)
        warp.store_float(place(lane.warp_k, row, 0)[1], 0, sums.denominator[row])
    warp.barrier()
    share = _Sums(config, sums.rows // config.warps_k)
    first = let("first_of_share", lane.warp_k * share.rows)
    part = warp.registers(PIECE + 1, "float32")
    with T.unroll(config.warps_k) as other, T.unroll(share.rows) as row:
        for piece in range(pieces):
            warp.load_four(part, 0, place(other, first + row, piece)[0], 0)
            with T.unroll(PIECE) as i:
                at = row * sums.channels + piece * PIECE + i
                T.buffer_store(share.numerator, share.numerator[at] + part[i], [at])
        warp.load_float(part, PIECE, place(other, first + row, 0)[1], 0)
        T.buffer_store(share.denominator, share.denominator[row] + part[PIECE], [row])
    return share, first


def _write(
    config: TileConfig, args: _Arguments, lane: Lane, first: Expr, sums: _Sums, b: Expr, h: Expr, first_q: Expr
) -> None:
    """Write the quotients and denominators of a lane's rows from `first` on, those that exist."""
    whole = in_pieces(args.out)
    for at in range(sums.rows):
        warp.sum_over_lanes(sums.denominator, at, COLUMN_BITS)
        row = let("row", first_q + lane.row + lane.of_rows * PIECE + row_of(first + at))
        with T.If(row < args.n_query), T.Then():
            with only_if(lane.of_columns == 0):
                T.buffer_store(args.denominators, sums.denominator[at], [b, h, row])
            for piece in range(config.channel_pieces):
                number = at * sums.channels + piece * PIECE
                for i in range(PIECE):
                    quotient = sums.numerator[number + i] / sums.denominator[at]
                    T.buffer_store(sums.numerator, quotient, [number + i])
                channel = lane.of_columns * PIECE + piece * COLUMNS
                quotients = [sums.numerator[number + i] for i in range(PIECE)]
                _write_piece(args.out, whole, quotients, [b, h, row, channel])


def _write_piece(out: Buffer, whole: Expr | None, numbers: list[Expr], at: list[Expr]) -> None:
    """Write four neighbouring numbers of a row, those of them that exist."""

    def one_by_one() -> None:
        for i, number in enumerate(numbers):
            with T.If(at[3] + i < out.shape[3]), T.Then():
                T.buffer_store(out, number, [*at[:3], at[3] + i])

    if whole is None:
        one_by_one()
        return
    with T.If(whole):
        with T.Then(), T.If(at[3] < out.shape[3]), T.Then():
            warp.store_four_global(out.ptr_to(at), numbers)
        with T.Else():
            one_by_one()
