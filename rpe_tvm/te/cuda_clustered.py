"""Attention with RPE on tensor cores in one launch, where the blocks of a cluster share the features of the keys.

Each block makes the features of its part of the keys and stores them into the shared memory of all blocks of its
cluster. What is left for every tile of keys are scores and sums. sm_90 and later.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, WARP, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import blocks_at_once, function, let, named
from rpe_tvm.te.cuda_fused import Arguments, Weights, arguments, load_rows, query_features
from rpe_tvm.te.cuda_sixteen import load_projection, sixteen_rows, store_projection
from rpe_tvm.te.cuda_tile import CHUNK, Lane, Sums, add_partial_sums, add_tile, share, write
from rpe_tvm.te.cuda_warp import Expr
from rpe_tvm.te.features import FeatureMap


def clustered_attention(config: TensorCoreConfig, feature_map: FeatureMap) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `clustered_<map>(query, key, value, rpe_bias, projection, causal, out)` for CUDA.

    Arguments of the function: as `fused_attention`.
    """
    with function(f"clustered_{feature_map}") as built:
        _build(config, feature_map)
    return built.get()


def _build(config: TensorCoreConfig, feature_map: FeatureMap) -> None:
    args, batch, heads = arguments(config)
    too_long = f"Too many keys: expected at most {config.length}; take the operator of a longer bucket."
    warps, size = config.threads // WARP, config.cluster
    queries_of_cluster = config.tile_q * size
    blocks = (args.n_query + queries_of_cluster - 1) // queries_of_cluster * size
    with (
        T.Assert(args.n_key <= config.length, too_long),
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("clusterCtaIdx.x", size) as cluster_rank,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
    ):
        warp.let_next_kernel_begin()
        rank = let("rank", cluster_rank)
        # with a causal mask the last rows have most to do: they start first. Blocks past the last query help only
        first_q = let("first_q", (blocks - 1 - block) * config.tile_q)
        shared = T.alloc_buffer((config.shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        # a pointer to all of it: of a pointer to an element TVM would keep that element only
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        seen = T.Select(args.causal != 0, T.min(args.n_key, first_q + config.tile_q), args.n_key)
        needed = T.Select(first_q < args.n_query, (seen + config.tile_k - 1) // config.tile_k, T.int64(0))
        tiles = let("tiles", T.Cast("int32", needed))

        phi_bytes, query_bytes, projection_bytes, weight_bytes = config.fused_bytes
        phi_k = base + T.uint32(config.stages * config.stage_bytes)
        queries = phi_k + T.uint32(phi_bytes)
        projection = queries + T.uint32(query_bytes)
        strip = projection + T.uint32(projection_bytes)
        keys = strip + T.uint32(weight_bytes)
        arrivals = let("arrivals", keys + T.uint32(config.clustered_bytes[0]))
        lane = Lane(config, thread, phi_k, base, strip)

        def in_turns(action: Callable[[int], None]) -> None:
            for turn in range(config.key_turns):
                with T.If(turn * config.keys_of_turn < args.n_key), T.Then():
                    action(turn)

        with T.If(thread == 0), T.Then():
            received = T.uint32((size - 1) * warps * ROWS * config.key_row_bytes)
            in_turns(lambda turn: warp.expect(arrivals, 8 * turn, received))
        warp.cluster_arrive()
        # until here nothing was read that a kernel before may have written
        warp.wait_for_kernels_before()
        weights = Weights(config, args, thread, h, first_q)
        _load_keys(config, args, keys, thread, b, h, rank)
        load_rows(config, args.query, args.n_query, queries, thread, b, h, first_q, config.tile_q)
        warp.commit()
        for stage in range(config.stages - 1):
            with T.If(stage < tiles), T.Then():
                _load_values(config, args, base + T.uint32(stage * config.stage_bytes), thread, b, h, stage)
            warp.commit()
        store_projection(config, args.projection, projection, thread)
        warp.wait(config.stages - 1)
        warp.barrier()

        rows = (lane.lane % 16) * config.value_row_bytes + lane.lane // 16 * CHUNK_BYTES
        of_warp = let("of_warp", keys + warp.uint32(thread // WARP * (ROWS * config.value_row_bytes) + rows))
        # a block's warp has 16 keys, after them come those of the other blocks' warps
        first = let("first_of_keys", (thread // WARP * size + rank) * ROWS)
        sent = let("sent", phi_k + warp.uint32(first * config.key_row_bytes))
        words = config.padded_features // 8
        stored = let("stored", sent + warp.uint32(lane.group * config.key_row_bytes + lane.pair * (4 * words)))
        w = load_projection(config, feature_map, projection, lane.lane, interleaved=True)
        # the blocks of the cluster run, and their arrivals are made
        warp.cluster_wait()
        remote = named("remote", warp.registers(2, "uint32"))
        other = let("other", warp.uint32((rank + 1 + lane.lane) % size))
        warp.address_in_block(remote[0], sent, other)
        warp.address_in_block(remote[1], arrivals, other)

        def make_features(turn: int) -> None:
            key = let("key", T.Cast("int64", first + lane.group) + turn * config.keys_of_turn)
            exists = [key < args.n_key, key + 8 < args.n_key]
            packed = sixteen_rows(config, w, of_warp + T.uint32(turn * warps * ROWS * config.value_row_bytes), exists)
            at = turn * config.keys_of_turn * config.key_row_bytes
            for lower in (0, 1):
                neighbours = [packed[2 * tile + lower] for tile in range(words)]
                warp.store_words(stored, at + lower * 8 * config.key_row_bytes, neighbours)
            warp.before_send()
            with T.If(lane.lane < size - 1), T.Then():
                to, arrival = remote[0] + T.uint32(at), remote[1] + T.uint32(8 * turn)
                warp.send(to, sent + T.uint32(at), ROWS * config.key_row_bytes, arrival)

        in_turns(make_features)
        w = load_projection(config, feature_map, projection, lane.lane)
        phi_q = query_features(config, w, let("queries", queries + warp.uint32(rows)), lane)
        weights.store(strip)

        sums = Sums(config)
        # where the stage in use lies: a register, see cuda_walk
        used = named("used", warp.registers(1, "uint32"))
        stage_bytes = T.uint32(config.stage_bytes)
        last = T.uint32((config.stages - 1) * config.stage_bytes)
        T.buffer_store(used, T.uint32(0), [0])
        tiles_of_turn = config.keys_of_turn // config.tile_k
        with T.serial(tiles) as tile:
            with T.If(tile % tiles_of_turn == 0), T.Then():
                warp.wait_for(arrivals + warp.uint32(tile // tiles_of_turn * 8))
            warp.wait(config.stages - 2)
            warp.barrier()
            ahead = tile + (config.stages - 1)
            with T.If(ahead < tiles), T.Then():
                free = let("free", base + T.Select(used[0] == 0, last, used[0] - stage_bytes))
                _load_values(config, args, free, thread, b, h, ahead)
            warp.commit()
            add_tile(
                config,
                phi_q,
                sums,
                let("key_address", lane.keys + warp.uint32(tile * (config.tile_k * config.key_row_bytes))),
                let("value_address", lane.values + used[0]),
                let("weight_address", lane.weights + warp.uint32(tile * (4 * config.tile_k))),
            )
            T.buffer_store(used, T.Select(used[0] == last, T.uint32(0), used[0] + stage_bytes), [0])
        # a block may end when it has all that is sent to it, and the others all that it sent
        in_turns(lambda turn: warp.wait_for(arrivals + T.uint32(8 * turn)))
        warp.cluster_arrive()
        if config.warps_k > 1:
            add_partial_sums(config.warps_q, config.warps_k, base, lane, sums.all)
        with T.If(lane.warp_k == 0), T.Then():
            write(config, args.out, args.n_query, lane, sums, b, h, first_q)
        warp.cluster_wait()


def _load_keys(
    config: TensorCoreConfig, args: Arguments, target: Expr, thread: Expr, b: Expr, h: Expr, rank: Expr
) -> None:
    """Start the copies of the block's part of the keys: of every `cluster` times 16 keys, 16."""
    chunks = config.head_dim // CHUNK
    n = T.Cast("int32", args.n_key)

    def copy(chunk: Expr) -> None:
        row, column = chunk // chunks, chunk % chunks
        key = (row // ROWS * config.cluster + rank) * ROWS + row % ROWS
        pointer = args.key.ptr_to([b, h, T.Cast("int64", key), column * CHUNK])
        to = target + warp.uint32(row * config.value_row_bytes + column * CHUNK_BYTES)
        warp.copy_async(to, pointer, ignore=key >= n)

    share(config.threads, thread, config.key_turns * config.keys_of_turn // config.cluster * chunks, copy)


def _load_values(
    config: TensorCoreConfig, args: Arguments, stage: Expr, thread: Expr, b: Expr, h: Expr, tile: Expr
) -> None:
    """Start the copies of a tile of value."""
    first = let("first_k", T.Cast("int64", tile) * config.tile_k)
    load_rows(config, args.value, args.n_key, stage, thread, b, h, first, config.tile_k)
