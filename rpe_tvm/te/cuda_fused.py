"""Attention with RPE on tensor cores in one launch: a block makes the features and weights that it needs itself.

Every block repeats the features of all keys, and nothing waits for a launch before: of few queries that is the less.
While a tile of keys is used, the features of the next are made, each warp those of 16 keys at a time. The weights are
c[t] = exp(b[t] - max b) with the largest b of the block's own offsets: it cancels in each of its rows.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, WARP, TensorCoreConfig, round_up
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_sixteen import Projection, load_projection, sixteen_rows, store_projection
from rpe_tvm.te.cuda_tile import CHUNK, Lane, Sums, add_partial_sums, add_tile, share, write
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.features import FeatureMap


def fused_attention(config: TensorCoreConfig, feature_map: FeatureMap) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `fused_<map>(query, key, value, rpe_bias, projection, causal, out)` for CUDA.

    Arguments of the function: query `[B, H, n_q, d]`, key and value `[B, H, n_k, d]` with n_k up to the config's length
    and out `[B, H, n_q, d]` with any strides that are multiples of 8, at addresses that are multiples of 16 bytes, the
    last axis contiguous; rpe_bias `[H, n_q + n_k - 1]` and projection `[m, d]` float32; causal 0 or 1.
    """
    with function(f"fused_{feature_map}") as built:
        _build(config, feature_map)
    return built.get()


@dataclass(frozen=True)
class Arguments:
    query: Buffer
    key: Buffer
    value: Buffer
    rpe_bias: Buffer
    projection: Buffer
    out: Buffer
    n_query: Expr
    n_key: Expr
    causal: Expr


def arguments(config: TensorCoreConfig) -> tuple[Arguments, Expr, Expr]:
    batch, heads, n_query, n_key = (named(name, T.int64()) for name in ("batch", "heads", "n_query", "n_key"))
    channels, dtype = T.int64(config.head_dim), config.dtype
    query = argument("query", (batch, heads, n_query, channels), dtype, strided=True)
    key = argument("key", (batch, heads, n_key, channels), dtype, strided=True)
    value = argument("value", (batch, heads, n_key, channels), dtype, strided=True)
    rpe_bias = argument("rpe_bias", (heads, n_query + n_key - 1), "float32", align=4)
    projection = argument("projection", (T.int64(config.num_features), channels), "float32", align=4)
    causal = T.arg("causal", T.int64())
    out = argument("out", (batch, heads, n_query, channels), dtype, strided=True)
    return Arguments(query, key, value, rpe_bias, projection, out, n_query, n_key, causal), batch, heads


def _build(config: TensorCoreConfig, feature_map: FeatureMap) -> None:
    args, batch, heads = arguments(config)
    too_long = f"Too many keys: expected at most {config.length}; take the operator of a longer bucket."
    warps = config.threads // WARP
    blocks_q = (args.n_query + config.tile_q - 1) // config.tile_q
    with (
        T.Assert(args.n_key <= config.length, too_long),
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

        phi_bytes, query_bytes, projection_bytes, _ = config.fused_bytes
        phi_k = base + T.uint32(config.stages * config.stage_bytes)
        queries = phi_k + T.uint32(phi_bytes)
        projection = queries + T.uint32(query_bytes)
        strip = projection + T.uint32(projection_bytes)
        lane = Lane(config, thread, phi_k, base + T.uint32(config.stage_bytes // 2), strip)

        weights = Weights(config, args, thread, h, first_q)
        load_rows(config, args.query, args.n_query, queries, thread, b, h, first_q, config.tile_q)
        for stage in range(config.stages - 1):
            with T.If(stage < tiles), T.Then():
                _load_tile(config, args, base + T.uint32(stage * config.stage_bytes), thread, b, h, stage)
            warp.commit()
        store_projection(config, args.projection, projection, thread)
        weights.store(strip)
        warp.wait(config.stages - 2)
        warp.barrier()

        rows = (lane.lane % 16) * config.value_row_bytes + lane.lane // 16 * CHUNK_BYTES
        w = load_projection(config, feature_map, projection, lane.lane)
        phi_q = query_features(config, w, let("queries", queries + warp.uint32(rows)), lane)
        keys = let("rows_of_keys", base + warp.uint32(thread // WARP * (ROWS * config.value_row_bytes) + rows))
        target = thread // WARP * ROWS + lane.group
        phi = let("phi", phi_k + warp.uint32(target * config.key_row_bytes + 4 * lane.pair))

        def make_features(stage: Expr, odd: Expr, tile: Expr) -> None:
            """Make the features of a tile's keys; where `odd` is 1, in the second place."""
            for first in range(0, config.tile_k, ROWS * warps):
                key = let("key", T.Cast("int64", tile) * config.tile_k + first + target)
                exists = [key < args.n_key, key + 8 < args.n_key]
                packed = sixteen_rows(config, w, keys + stage + T.uint32(first * config.value_row_bytes), exists)
                to = let("to", phi + odd * T.uint32(config.tile_k * config.key_row_bytes))
                for lower in (0, 1):
                    row = (first + lower * 8) * config.key_row_bytes
                    for tile_of_8 in range(config.padded_features // 8):
                        warp.store_shared_pair(to, row + tile_of_8 * 16, packed[2 * tile_of_8 + lower])

        sums = Sums(config)
        make_features(T.uint32(0), T.uint32(0), T.int32(0))
        # where the stages in use and next lie: registers, see cuda_walk
        used = named("used", warp.registers(2, "uint32"))
        size = T.uint32(config.stage_bytes)
        last = T.uint32((config.stages - 1) * config.stage_bytes)
        T.buffer_store(used, T.uint32(0), [0])
        T.buffer_store(used, size, [1])
        with T.serial(tiles) as tile:
            warp.wait(config.stages - 3)
            warp.barrier()
            ahead = tile + (config.stages - 1)
            with T.If(ahead < tiles), T.Then():
                free = let("free", base + T.Select(used[0] == 0, last, used[0] - size))
                _load_tile(config, args, free, thread, b, h, ahead)
            warp.commit()
            odd = let("odd", warp.uint32(tile % 2))
            with T.If(tile + 1 < tiles), T.Then():
                make_features(used[1], T.uint32(1) - odd, tile + 1)
            add_tile(
                config,
                phi_q,
                sums,
                let("key_address", lane.keys + odd * T.uint32(config.tile_k * config.key_row_bytes)),
                let("value_address", lane.values + used[0]),
                let("weight_address", lane.weights + warp.uint32(tile * (4 * config.tile_k))),
            )
            T.buffer_store(used, used[1], [0])
            T.buffer_store(used, T.Select(used[1] == last, T.uint32(0), used[1] + size), [1])
        if config.warps_k > 1:
            add_partial_sums(config.warps_q, config.warps_k, base, lane, sums.all)
        with T.If(lane.warp_k == 0), T.Then():
            write(config, args.out, args.n_query, lane, sums, b, h, first_q)


def load_rows(
    config: TensorCoreConfig,
    x: Buffer,
    n: Expr,
    target: Expr,
    thread: Expr,
    b: Expr,
    h: Expr,
    first: Expr,
    count: int,
) -> None:
    """Start the copies of `count` rows, with zeros for those past n."""
    chunks = config.head_dim // CHUNK

    def copy(chunk: Expr) -> None:
        row, column = chunk // chunks, chunk % chunks
        pointer = x.ptr_to([b, h, first + row, column * CHUNK])
        to = target + warp.uint32(row * config.value_row_bytes + column * CHUNK_BYTES)
        warp.copy_async(to, pointer, ignore=row >= T.Cast("int32", n - first))

    share(config.threads, thread, count * chunks, copy)


def _load_tile(
    config: TensorCoreConfig, args: Arguments, stage: Expr, thread: Expr, b: Expr, h: Expr, tile: Expr
) -> None:
    """Start the copies of a tile of key and of value."""
    first = let("first_k", T.Cast("int64", tile) * config.tile_k)
    load_rows(config, args.key, args.n_key, stage, thread, b, h, first, config.tile_k)
    values = stage + T.uint32(config.stage_bytes // 2)
    load_rows(config, args.value, args.n_key, values, thread, b, h, first, config.tile_k)


class Weights:
    """The weights of all offsets from a block's queries to the keys, on their way into shared memory."""

    def __init__(self, config: TensorCoreConfig, args: Arguments, thread: Expr, h: Expr, first_q: Expr) -> None:
        self.config, self.args, self.thread = config, args, thread
        self.width = config.tile_q + round_up(config.length, config.tile_k)
        self.turns = range(-(-self.width // config.threads))
        self.offsets = [thread + turn * config.threads - config.tile_q - first_q for turn in self.turns]
        self.values = named("biases", warp.registers(len(self.turns), "float32"))
        for turn, t in enumerate(self.offsets):
            with T.If(self._is_seen(t)), T.Then():
                T.buffer_store(self.values, args.rpe_bias[h, t + args.n_query - 1], [turn])

    def _is_seen(self, t: Expr) -> Expr:
        is_pair = T.And(t > -self.args.n_query, t < self.args.n_key)
        return T.And(is_pair, T.Or(self.args.causal == 0, t <= 0))

    def store(self, strip: Expr) -> None:
        """Store c[t] at index t - first_q + tile_q; with two barriers inside."""
        warps = self.config.threads // WARP
        largest = named("largest", warp.registers(1, "float32"))
        T.buffer_store(largest, T.float32(-math.inf), [0])
        for turn, t in enumerate(self.offsets):
            # NaN is left to exp(): the maximum drops it
            T.buffer_store(largest, T.Select(self._is_seen(t), T.max(largest[0], self.values[turn]), largest[0]), [0])
        warp.warp_max(largest, 0)
        warp.store_float(strip + warp.uint32(self.thread // WARP * 4), 0, largest[0])
        warp.barrier()
        warp.load_float(largest, 0, strip + warp.uint32(self.thread % warps * 4), 0)
        warp.warp_max(largest, 0)
        warp.barrier()
        for turn, t in enumerate(self.offsets):
            weight = T.Select(self._is_seen(t), T.exp(self.values[turn] - largest[0]), T.float32(0))
            with T.If(self.thread + turn * self.config.threads < self.width), T.Then():
                place = strip + warp.uint32(self.thread * 4)
                warp.store_float(place, turn * self.config.threads * 4, weight)


def query_features(config: TensorCoreConfig, w: Projection, queries: Expr, lane: Lane) -> Buffer:
    """Return the fragments of phi_q of a warp's queries: they stay in registers."""
    depth = config.padded_features // ROWS
    fragments = named("phi_q_fragments", warp.registers(config.row_blocks * depth * 4, "uint32"))
    first = let("first_rows", queries + warp.uint32(lane.row * config.value_row_bytes))
    for block in range(config.row_blocks):
        packed = sixteen_rows(config, w, first + T.uint32(block * ROWS * config.value_row_bytes), None)
        for i in range(depth * 4):
            T.buffer_store(fragments, packed[i], [block * depth * 4 + i])
    return fragments
