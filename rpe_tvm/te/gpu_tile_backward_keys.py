"""Gradients of the keys' features, the values and the bias by tiles in float32: a block keeps keys and walks over the
queries.

With G = grad_out, w_i = -G_i . out_i, r_i = 1 / den_i and C the Toeplitz weights, for each pair (i, j):

    P_ij = (phi_q_i . phi_k_j) c[j-i] r_i        T_ij = G_i . value_j + w_i        D_ij = T_ij c[j-i] r_i

    grad value_j = sum_i P_ij G_i        grad phi_k_j = sum_i D_ij phi_q_i        grad b[t] = sum_(j-i=t) P_ij T_ij

2 (m + d) multiplications for each pair. P and D take turns in the same place in shared memory.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES
from rpe_tvm.plan.gpu_tiles_backward import FOUR, KEPT, WALKED, TileBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, loops_for_nvcc, named
from rpe_tvm.te.cuda_walk import walk
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.gpu_tile_backward_copies import copy_channels, copy_features, copy_floats
from rpe_tvm.te.gpu_tile_backward_pairs import PAIRS, Allows, Meet, Pairs
from rpe_tvm.te.gpu_tile_backward_sums import Sums
from rpe_tvm.te.gpu_tile_diagonals import Diagonals


def key_gradients(config: TileBackwardConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `grad_keys(value, grad_out, phi_q, phi_k, table, causal, terms, diagonals,
    grad_phi_k, grad_value)` for CUDA.

    Arguments of the function: as of `te.gpu_tile_backward_queries`; grad_value `[B, H, n_k, d]` like value; grad_phi_k
    `[B, H, m, 1, P]`: written in the blocks that hold keys; diagonals `[B, H, P / rows, P + rows]` float32: the sums of
    a block of keys over offsets from its first key, written where its keys meet queries.
    """
    with function("grad_keys") as built:
        _build(config)
    return built.get()


@dataclass(frozen=True)
class _Arguments:
    value: Buffer
    grad_out: Buffer
    phi_q: Buffer
    phi_k: Buffer
    table: Buffer
    causal: Expr
    terms: Buffer
    diagonals: Buffer
    grad_phi: Buffer
    grad_value: Buffer
    n_query: Expr
    n_key: Expr


def _arguments(config: TileBackwardConfig) -> tuple[_Arguments, Expr, Expr]:
    batch, heads, n_query, n_key = (named(name, T.int64()) for name in ("batch", "heads", "n_query", "n_key"))
    m, d, length = (T.int64(size) for size in (config.num_features, config.head_dim, config.length))

    def rows(name: str, n: Expr) -> Buffer:
        return argument(name, (batch, heads, n, d), "float32", strided=True, align=4)

    value, grad_out = rows("value", n_key), rows("grad_out", n_query)
    phi_q, phi_k = (argument(f"phi_{name}", (batch, heads, m, length), "float32") for name in "qk")
    table = argument("table", (heads, 2 * length), "float32")
    causal = T.arg("causal", T.int64())
    terms = argument("terms", (T.int64(2), batch, heads, length), "float32")
    diagonals = argument("diagonals", (batch, heads, *map(T.int64, config.diagonals)), "float32")
    grad_phi = argument("grad_phi_k", (batch, heads, m, T.int64(1), length), "float32")
    arrays = value, grad_out, phi_q, phi_k, table, causal, terms, diagonals, grad_phi, rows("grad_value", n_key)
    return _Arguments(*arrays, n_query, n_key), batch, heads


def _build(config: TileBackwardConfig) -> None:
    args, batch, heads = _arguments(config)
    with (
        T.launch_thread("blockIdx.x", (args.n_key + config.rows - 1) // config.rows) as block,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
        loops_for_nvcc(),
    ):
        first_k = let("first_k", T.Cast("int64", block) * config.rows)
        shared = T.alloc_buffer((config.shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        features, channels, _, shared_offsets, _ = config.places
        first_tile = let("first_tile", T.Select(args.causal != 0, first_k // config.tile, T.int64(0)))
        last_tile = (args.n_query + config.tile - 1) // config.tile
        tiles = let("tiles", T.Cast("int32", T.max(last_tile - first_tile, T.int64(0))))

        copy_features(config, thread, args.phi_k, config.rows, base + T.uint32(features), b, h, first_k)
        copy_channels(config, thread, args.value, config.rows, base + T.uint32(channels), b, h, first_k)
        pairs = Pairs(config, thread, base)
        of_features = Sums("grad_phi_sums", config, config.features, thread, base)
        of_channels = Sums("grad_value_sums", config, config.channels, thread, base)
        diagonals = Diagonals(config, thread, pairs, base + T.uint32(shared_offsets))
        diagonals.clear()

        def first_query(tile: Expr) -> Expr:
            return (first_tile + T.Cast("int64", tile)) * config.tile

        def load(stage: Expr, tile: Expr) -> None:
            first_q = let("first_q", first_query(tile))
            channels, weights, terms, _ = config.stage_places
            copy_features(config, thread, args.phi_q, config.tile, stage, b, h, first_q)
            copy_channels(config, thread, args.grad_out, config.tile, stage + T.uint32(4 * channels), b, h, first_q)
            offset = first_k - first_q + (config.length - config.tile)
            copy_floats(config, thread, args.table, config.rows + config.tile, stage + T.uint32(4 * weights), h, offset)
            for which in (0, 1):
                to = stage + T.uint32(4 * (terms + which * config.tile))
                copy_floats(config, thread, args.terms, config.tile, to, T.int64(which), b, h, first_q)

        def add(used: Expr, tile: Expr) -> None:
            first_q = let("first_q", first_query(tile))
            left = let("left", T.Cast("int32", args.n_query - first_q))
            # from itself on, or all
            from_row = T.Select(args.causal != 0, T.Cast("int32", first_k - first_q), T.int32(-config.rows))
            from_row = let("from_row", from_row)

            def allows(walked: Expr, kept: Expr) -> Expr:
                return T.And(walked < left, walked >= from_row + kept)

            is_partial = let("is_partial", T.Or(left < config.tile, from_row + (config.rows - 1) > 0))
            _add_tile(config, pairs, of_features, of_channels, diagonals, used, is_partial, allows)
            offset = config.length - config.tile - first_q
            diagonals.add_up(args.diagonals, tile, offset, b, h, T.Cast("int64", block))

        walk(config, base, tiles, load, add)
        warp.wait(0)  # for what is kept: there may have been no tile
        warp.barrier()
        with T.If(tiles > 0), T.Then():
            offset = config.length - config.tile - first_query(tiles - 1)
            diagonals.finish(args.diagonals, tiles - 1, offset, b, h, T.Cast("int64", block))
        of_channels.add_groups()
        of_features.add_groups()

        def store_channel(i: Expr, row: Expr, column: Expr, total: Expr) -> None:
            exists = first_k + row < args.n_key
            with T.If(T.And(exists, column < config.head_dim)), T.Then():
                T.buffer_store(args.grad_value, total, [b, h, first_k + row, column])

        def store_feature(i: Expr, row: Expr, column: Expr, total: Expr) -> None:
            with T.If(column < config.num_features), T.Then():
                T.buffer_store(args.grad_phi, total, [b, h, column, 0, first_k + row])

        of_channels.write(store_channel)
        of_features.write(store_feature)


def _add_tile(
    config: TileBackwardConfig,
    pairs: Pairs,
    of_features: Sums,
    of_channels: Sums,
    diagonals: Diagonals,
    used: Expr,
    is_partial: Expr,
    allows: Allows,
) -> None:
    """Add the contribution of a tile of queries."""
    numbers = named("numbers", warp.registers(PAIRS, "float32"))
    terms, inverses = (named(name, warp.registers(WALKED, "float32")) for name in ("terms", "inverses"))
    probabilities = named("probabilities", warp.registers(KEPT, "float32"))
    terms_at = let("terms_at", pairs.base + used + warp.uint32(4 * (config.stage_places[2] + pairs.walked * FOUR)))

    def load_terms(target: Buffer, which: int) -> None:
        for half in (0, 1):
            warp.load_four(target, half * FOUR, terms_at, 4 * (which * config.tile + half * (config.tile // 2)))

    def add(sums: Sums) -> None:
        """Add the products of what is in the pairs' place and the tile's rows."""
        warp.barrier()
        action = sums.add_channels if sums is of_channels else sums.add_features
        with T.If(is_partial):
            with T.Then():
                action(used, allows)
            with T.Else():
                action(used)

    def to_probabilities(meet: Meet) -> None:
        with T.unroll(WALKED) as i, T.unroll(KEPT) as j:
            at = i * KEPT + j
            T.buffer_store(numbers, meet(i, j, numbers[at] * weight(i, j) * inverses[i]), [at])

    def to_pulls(meet: Meet) -> None:
        with T.unroll(WALKED) as i:
            pairs.load(probabilities, i)
            with T.unroll(KEPT) as j:
                at = i * KEPT + j
                T.buffer_store(numbers, numbers[at] + terms[i], [at])
                diagonals.add(i, j, meet(i, j, probabilities[j] * numbers[at]))
                T.buffer_store(numbers, meet(i, j, numbers[at] * weight(i, j) * inverses[i]), [at])

    pairs.of_features(used, numbers)
    weight = pairs.load_weights(used, -1)
    load_terms(inverses, 1)
    pairs.where_they_meet(is_partial, allows, to_probabilities)
    pairs.store(numbers)
    add(of_channels)
    pairs.of_channels(used, numbers)
    weight = pairs.load_weights(used, -1)
    load_terms(inverses, 1)
    load_terms(terms, 0)
    warp.barrier()
    # the tile's channels have been read
    diagonals.begin(pairs.base + used + T.uint32(4 * config.stage_places[0]))
    pairs.where_they_meet(is_partial, allows, to_pulls)
    pairs.store(numbers)
    diagonals.store()
    add(of_features)
