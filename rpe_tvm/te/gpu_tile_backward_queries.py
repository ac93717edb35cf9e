"""Gradients of the queries' features by tiles in float32: a block keeps queries and walks over the keys.

With G = grad_out, w_i = -G_i . out_i and C the Toeplitz weights, for each pair (i, j):

    S_ij = phi_q_i . phi_k_j        T_ij = G_i . value_j + w_i        den_i = sum_j S_ij c[j-i]

    grad phi_q_i = sum_j T_ij c[j-i] phi_k_j / den_i

m + d multiplications for each pair, and m more where the forward pass has not kept den. w and 1 / den are written for
the keys' gradients.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES
from rpe_tvm.plan.gpu_tiles_backward import FOUR, KEPT, ROWS, WALKED, TileBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, loops_for_nvcc, named, only_if
from rpe_tvm.te.cuda_walk import walk
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.gpu_tile_backward_copies import copy_channels, copy_features, copy_floats
from rpe_tvm.te.gpu_tile_backward_pairs import PAIRS, Allows, Meet, Pairs
from rpe_tvm.te.gpu_tile_backward_sums import Sums


def query_gradients(config: TileBackwardConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `grad_queries(value, grad_out, out, phi_q, phi_k, table, causal, denominators,
    known, terms, grad_phi_q)` for CUDA.

    Arguments of the function, all float32: value `[B, H, n_k, d]`, grad_out and out `[B, H, n_q, d]` with any strides,
    the last axis contiguous; phi_q, phi_k `[B, H, m, P]`, zero past the last position; table `[H, 2 P]`, c[t] at index
    P + t; causal 0 or 1; denominators `[B, H, n_q]` of the forward pass if known is 1, else they are computed; terms
    `[2, B, H, P]`: becomes w and 1 / den, both 0 where den is 0 or there is no query;
    grad_phi_q `[B, H, m, 1, P]`: written in the blocks that hold queries.
    """
    with function("grad_queries") as built:
        _build(config)
    return built.get()


@dataclass(frozen=True)
class _Arguments:
    value: Buffer
    grad_out: Buffer
    out: Buffer
    phi_q: Buffer
    phi_k: Buffer
    table: Buffer
    causal: Expr
    denominators: Buffer
    known: Expr
    terms: Buffer
    grad_phi: Buffer
    n_query: Expr
    n_key: Expr


def _arguments(config: TileBackwardConfig) -> tuple[_Arguments, Expr, Expr]:
    batch, heads, n_query, n_key = (named(name, T.int64()) for name in ("batch", "heads", "n_query", "n_key"))
    m, d, length = (T.int64(size) for size in (config.num_features, config.head_dim, config.length))

    def rows(name: str, n: Expr) -> Buffer:
        return argument(name, (batch, heads, n, d), "float32", strided=True, align=4)

    value, grad_out, out = rows("value", n_key), rows("grad_out", n_query), rows("out", n_query)
    phi_q, phi_k = (argument(f"phi_{name}", (batch, heads, m, length), "float32") for name in "qk")
    table = argument("table", (heads, 2 * length), "float32")
    causal = T.arg("causal", T.int64())
    denominators = argument("denominators", (batch, heads, n_query), "float32", align=4)
    known = T.arg("known", T.int64())
    terms = argument("terms", (T.int64(2), batch, heads, length), "float32")
    grad_phi = argument("grad_phi_q", (batch, heads, m, T.int64(1), length), "float32")
    arrays = value, grad_out, out, phi_q, phi_k, table, causal, denominators, known, terms, grad_phi
    return _Arguments(*arrays, n_query, n_key), batch, heads


def _build(config: TileBackwardConfig) -> None:
    args, batch, heads = _arguments(config)
    blocks = (args.n_query + config.rows - 1) // config.rows
    with (
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
        loops_for_nvcc(),
    ):
        # with a causal mask the last rows have most to do: they start first
        first_q = let("first_q", (blocks - 1 - block) * config.rows)
        shared = T.alloc_buffer((config.shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        features, channels, pairs_at, terms_at, _ = config.places
        seen = T.Select(args.causal != 0, T.min(args.n_key, first_q + config.rows), args.n_key)
        tiles = let("tiles", T.Cast("int32", (seen + config.tile - 1) // config.tile))

        copy_features(config, thread, args.phi_q, config.rows, base + T.uint32(features), b, h, first_q)
        copy_channels(config, thread, args.grad_out, config.rows, base + T.uint32(channels), b, h, first_q)
        copy_channels(config, thread, args.out, config.rows, base, b, h, first_q)
        warp.commit()
        _row_terms(config, thread, base)

        pairs = Pairs(config, thread, base)
        sums = Sums("grad_phi_sums", config, config.features, thread, base)
        denominator = named("denominator", warp.registers(KEPT, "float32"))
        warp.zero(denominator, KEPT)

        def load(stage: Expr, tile: Expr) -> None:
            first_k = let("first_k", T.Cast("int64", tile) * config.tile)
            of_channels, weights, *_ = config.stage_places
            copy_features(config, thread, args.phi_k, config.tile, stage, b, h, first_k)
            copy_channels(config, thread, args.value, config.tile, stage + T.uint32(4 * of_channels), b, h, first_k)
            offset = first_k - first_q + (config.length - config.rows)
            to = stage + T.uint32(4 * weights)
            copy_floats(config, thread, args.table, config.rows + config.tile, to, h, offset)

        def add(used: Expr, tile: Expr) -> None:
            first_k = let("first_k", T.Cast("int64", tile) * config.tile)
            left = let("left", T.Cast("int32", args.n_key - first_k))
            # of all keys before it and as many more as its row is below the first one
            before = T.Select(args.causal != 0, T.Cast("int32", first_q - first_k) + 1, T.int32(config.tile))
            before = let("before", before)

            def allows(walked: Expr, kept: Expr) -> Expr:
                return T.And(walked < left, walked < before + kept)

            is_partial = let("is_partial", T.min(left, before) < config.tile)
            _add_tile(config, pairs, sums, denominator, args.known, used, is_partial, allows)

        walk(config, base, tiles, load, add)
        _finish(config, args, thread, base, pairs, sums, denominator, b, h, first_q)


def _row_terms(config: TileBackwardConfig, thread: Expr, base: Expr) -> None:
    """Put w of the block's rows into shared memory, out being where the tiles will be.

    The sum goes through the channels as that of T does: what cancels in T has the same rounding errors.
    """
    _, channels, _, terms_at, _ = config.places
    warp.wait(0)
    warp.barrier()
    with T.If(thread < config.rows), T.Then():
        total = named("total", warp.registers(1, "float32"))
        x, y = (named(name, warp.registers(FOUR, "float32")) for name in ("x", "y"))
        T.buffer_store(total, T.float32(0), [0])
        row = let("row", warp.uint32(4 * (thread * config.channels + thread // FOUR * FOUR)))
        with T.serial(config.channels // FOUR) as four:
            at = let("at", base + row + warp.uint32(four * CHUNK_BYTES))
            warp.load_four(x, 0, at, channels)
            warp.load_four(y, 0, at, 0)
            for channel in range(FOUR):
                T.buffer_store(total, total[0] + x[channel] * y[channel], [0])
        warp.store_float(base + warp.uint32(terms_at + 4 * thread), 0, -total[0])
    warp.barrier()


def _add_tile(
    config: TileBackwardConfig,
    pairs: Pairs,
    sums: Sums,
    denominator: Buffer,
    known: Expr,
    used: Expr,
    is_partial: Expr,
    allows: Allows,
) -> None:
    """Add the contribution of a tile of keys."""
    numbers = named("numbers", warp.registers(PAIRS, "float32"))
    weight = pairs.load_weights(used, 1)

    def add_scores(meet: Meet) -> None:
        with T.unroll(WALKED) as i, T.unroll(KEPT) as j:
            score = meet(i, j, numbers[i * KEPT + j] * weight(i, j))
            T.buffer_store(denominator, denominator[j] + score, [j])

    def weigh(meet: Meet) -> None:
        with T.unroll(WALKED) as i, T.unroll(KEPT) as j:
            at = i * KEPT + j
            T.buffer_store(numbers, meet(i, j, (numbers[at] + terms[j]) * weight(i, j)), [at])

    with T.If(known == 0), T.Then():
        pairs.of_features(used, numbers)
        pairs.where_they_meet(is_partial, allows, add_scores)
    pairs.of_channels(used, numbers)
    terms = named("kept_terms", warp.registers(KEPT, "float32"))
    warp.load_four(terms, 0, pairs.kept_terms, 0)
    pairs.where_they_meet(is_partial, allows, weigh)
    pairs.store(numbers)
    warp.barrier()
    with T.If(is_partial):
        with T.Then():
            sums.add_features(used, allows)
        with T.Else():
            sums.add_features(used)


def _finish(
    config: TileBackwardConfig,
    args: _Arguments,
    thread: Expr,
    base: Expr,
    pairs: Pairs,
    sums: Sums,
    denominator: Buffer,
    b: Expr,
    h: Expr,
    first_q: Expr,
) -> None:
    """Write what the keys' gradients need of the rows, then the gradient of the queries' features."""
    _, _, pairs_at, terms_at, _ = config.places
    warp.barrier()
    of_thread = warp.uint32(pairs_at + 4 * (pairs.walked * config.rows + pairs.kept * FOUR))
    warp.store_four(base + of_thread, 0, [denominator[j] for j in range(KEPT)])
    warp.barrier()
    denominators_at = base + T.uint32(terms_at + 4 * config.rows)
    with T.If(thread < config.rows), T.Then():
        total, part, term = (named(name, warp.registers(1, "float32")) for name in ("total", "part", "term"))
        T.buffer_store(total, T.float32(0), [0])
        row = let("row", first_q + thread)
        with T.If(args.known != 0):
            with T.Then(), T.If(row < args.n_query), T.Then():
                T.buffer_store(total, args.denominators[b, h, row], [0])
            with T.Else():
                of_row = let("of_row", base + warp.uint32(pairs_at + 4 * thread))
                for walked in range(config.tile // WALKED):
                    warp.load_float(part, 0, of_row, 4 * walked * config.rows)
                    T.buffer_store(total, total[0] + part[0], [0])
        warp.load_float(term, 0, base + warp.uint32(terms_at + 4 * thread), 0)
        passes = let("passes", T.And(total[0] != T.float32(0), row < args.n_query))
        inverse = let("inverse", T.Select(passes, T.float32(1) / total[0], T.float32(0)))
        T.buffer_store(args.terms, T.Select(passes, term[0], T.float32(0)), [0, b, h, row])
        T.buffer_store(args.terms, inverse, [1, b, h, row])
        warp.store_float(denominators_at + warp.uint32(4 * thread), 0, T.Select(passes, total[0], T.float32(0)))
    sums.add_groups()
    denominators = named("denominators", warp.registers(ROWS, "float32"))
    for half in (0, 1):
        at = warp.uint32(4 * (sums.kept * FOUR + half * (config.rows // 2)))
        warp.load_four(denominators, half * FOUR, denominators_at + at, 0)

    def store(i: Expr, row: Expr, column: Expr, total: Expr) -> None:
        # a row that has no weight passes nothing, whatever its sums are
        gradient = T.Select(denominators[i] != T.float32(0), total / denominators[i], T.float32(0))
        with only_if(column < config.num_features if config.features > config.num_features else None):
            T.buffer_store(args.grad_phi, gradient, [b, h, column, 0, first_q + row])

    sums.write(store)
