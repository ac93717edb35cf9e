"""Gradients of the keys, the values and the bias on tensor cores: a block keeps keys and walks over the queries.

With G = grad_out, w_i = -G_i . out_i, r_i = s / den_i and C the Toeplitz weights, for each pair (i, j):

    P_ij = (phi_q_i . phi_k_j) c[j-i] r_i        T_ij = G_i . value_j + w_i        D_ij = T_ij c[j-i] r_i

    s grad value_j = sum_i P_ij G_i            s grad phi_k_j = sum_i D_ij phi_q_i
    s grad b[t] = sum_(j-i=t) P_ij T_ij

P is divided by the denominators before it is rounded, so that float16 holds it whatever the size of features and
weights; without the factor s, n_k up to 32768, which is taken out at the end, it would be too small in long sequences.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_backward_rows import (
    Argument,
    copy_floats,
    copy_rows,
    in_matrices,
    load_rows,
    write_argument_gradient,
)
from rpe_tvm.te.cuda_diagonals import Diagonals
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_tile import ELEMENT_BYTES, Place, add_partial_sums
from rpe_tvm.te.cuda_walk import walk
from rpe_tvm.te.cuda_warp import Buffer, Expr


def key_gradients(config: TensorCoreBackwardConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `grad_keys(key, value, grad_out, phi_q, phi_k, table, terms, projection, causal,
    normalised, of_projection, exponent, diagonals, grad_key, grad_value)` for CUDA.

    Arguments of the function: as of `te.cuda_backward_queries`; key, grad_key and grad_value `[B, H, n_k, d]` like
    value; exponent `[B, H, n_k', m']`; diagonals `[B, H, slots, n_q' + n_k']` float32: becomes s times the gradients of
    the bias of all keys of a slot, laid out as table. The blocks of keys are dealt out to the slots in turns.
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
    terms: Buffer
    diagonals: Buffer
    grad_value: Buffer
    key: Argument
    n_query: Expr
    n_key: Expr
    rows_q: Expr
    rows_k: Expr
    slots: Expr
    causal: Expr


def _arguments(config: TensorCoreBackwardConfig) -> tuple[_Arguments, Expr, Expr]:
    names = ("batch", "heads", "n_query", "n_key", "rows_q", "rows_k", "slots")
    batch, heads, n_query, n_key, rows_q, rows_k, slots = (named(name, T.int64()) for name in names)
    dtype, features, channels = config.dtype, T.int64(config.padded_features), T.int64(config.head_dim)
    key = argument("key", (batch, heads, n_key, channels), dtype, strided=True)
    value = argument("value", (batch, heads, n_key, channels), dtype, strided=True)
    grad_out = argument("grad_out", (batch, heads, n_query, channels), dtype, strided=True)
    phi_q = argument("phi_q", (batch, heads, rows_q, features), dtype)
    phi_k = argument("phi_k", (batch, heads, rows_k, features), dtype)
    table = argument("table", (heads, rows_q + rows_k), "float32")
    terms = argument("terms", (T.int64(2), batch, heads, rows_q), "float32")
    projection = argument("projection", (T.int64(config.num_features), channels), "float32", align=4)
    causal, normalised, of_projection = (T.arg(name, T.int64()) for name in ("causal", "normalised", "of_projection"))
    exponent = argument("exponent", (batch, heads, rows_k, features), "float32")
    diagonals = argument("diagonals", (batch, heads, slots, rows_q + rows_k), "float32")
    grad_key = argument("grad_key", (batch, heads, n_key, channels), dtype, strided=True)
    grad_value = argument("grad_value", (batch, heads, n_key, channels), dtype, strided=True)
    of_key = Argument(key, grad_key, projection, exponent, normalised, of_projection)
    arrays = value, grad_out, phi_q, phi_k, table, terms, diagonals, grad_value
    return _Arguments(*arrays, of_key, n_query, n_key, rows_q, rows_k, slots, causal), batch, heads


def _build(config: TensorCoreBackwardConfig) -> None:
    args, batch, heads = _arguments(config)
    with (
        T.launch_thread("blockIdx.x", args.slots) as slot,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
    ):
        shared = T.alloc_buffer((config.shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        lane = Place(config.warps, config.row_blocks, thread)
        diagonals = Diagonals(config, thread, lane, base + T.uint32(config.query_shared_bytes))
        diagonals.clear()
        width = args.rows_q + args.rows_k
        with T.serial((width + config.threads - 1) // config.threads) as turn:
            place = let("place", turn * config.threads + thread)
            with T.If(place < width), T.Then():
                T.buffer_store(args.diagonals, T.float32(0), [b, h, slot, place])
        blocks = args.rows_k // config.rows
        with T.serial((blocks - slot + args.slots - 1) // args.slots) as turn:
            warp.barrier()
            first_k = let("first_k", (slot + turn * args.slots) * config.rows)
            _keys(config, args, thread, lane, base, diagonals, b, h, slot, first_k)


def _keys(
    config: TensorCoreBackwardConfig,
    args: _Arguments,
    thread: Expr,
    lane: Place,
    base: Expr,
    diagonals: Diagonals,
    b: Expr,
    h: Expr,
    slot: Expr,
    first_k: Expr,
) -> None:
    """Make the gradients of a block of keys."""
    phi = load_rows("phi", args.phi_k, config.padded_features, lane, config.row_blocks, b, h, first_k)
    value = load_rows("value_rows", args.value, config.head_dim, lane, config.row_blocks, b, h, first_k)
    sums = _Sums(config)

    channels, weights, terms, _ = config.stage_places
    query = lane.warp_k * config.share
    of_features, of_channels = config.feature_row_bytes, config.channel_row_bytes
    channels_at = channels + query * of_channels
    places = _Places(
        *(
            let(name, base + warp.uint32(place))
            for name, place in (
                ("features_by_column", query * of_features + in_matrices(lane, of_features, False)),
                ("features_by_row", query * of_features + in_matrices(lane, of_features, True)),
                ("channels_by_column", channels_at + in_matrices(lane, of_channels, False)),
                ("channels_by_row", channels_at + in_matrices(lane, of_channels, True)),
                ("weights_at", weights + 4 * (config.tile + lane.row - query + lane.group - 2 * lane.pair)),
                ("terms_at", terms + 4 * (query + 2 * lane.pair)),
            )
        )
    )
    first_tile = let("first_tile", T.Select(args.causal != 0, first_k // config.tile, T.int64(0)))
    last_tile = (args.n_query + config.tile - 1) // config.tile
    tiles = let("tiles", T.Cast("int32", T.max(last_tile - first_tile, T.int64(0))))

    def first_query(tile: Expr) -> Expr:
        return (first_tile + T.Cast("int64", tile)) * config.tile

    def load(stage: Expr, tile: Expr) -> None:
        first_q = let("first_q", first_query(tile))
        copy_rows(config, thread, args.phi_q, config.padded_features, stage, config.feature_row_bytes, b, h, first_q)
        to = stage + T.uint32(channels)
        copy_rows(config, thread, args.grad_out, config.head_dim, to, config.channel_row_bytes, b, h, first_q)
        offset = first_k - first_q + (args.rows_q - config.tile)
        copy_floats(config, thread, args.table, config.rows + config.tile, stage + T.uint32(weights), h, offset)
        for which in (0, 1):
            to = stage + T.uint32(terms + which * 4 * config.tile)
            copy_floats(config, thread, args.terms, config.tile, to, T.int64(which), b, h, first_q)

    def add_diagonals(tile: Expr) -> None:
        offset = first_k - first_query(tile) + (args.rows_q - config.tile)
        diagonals.add_to(args.diagonals, warp.uint32(tile % 2), b, h, slot, offset)

    def add(used: Expr, tile: Expr) -> None:
        with T.If(tile > 0), T.Then():
            add_diagonals(tile - 1)
        _add_tile(config, phi, value, sums, diagonals, places.after(used), warp.uint32(tile % 2))

    walk(config, base, tiles, load, add)
    warp.barrier()
    with T.If(tiles > 0), T.Then():
        add_diagonals(tiles - 1)
    if config.shares > 1:
        add_partial_sums(config.warps, config.shares, base, lane, sums.all)
    with T.If(lane.warp_k == 0), T.Then():
        _finish(config, args, lane, phi, sums, b, h, first_k)


@dataclass(frozen=True)
class _Places:
    """Addresses that a lane reads in a stage."""

    features_by_column: Expr
    features_by_row: Expr
    channels_by_column: Expr
    channels_by_row: Expr
    weights: Expr
    terms: Expr

    def after(self, used: Expr) -> _Places:
        """Return those of the stage that begins at an offset."""
        return _Places(*(let(name, at + used) for name, at in vars(self).items()))


class _Sums:
    """The accumulators of a lane: of D phi_q and of P G, a row of 8 features or channels each."""

    def __init__(self, config: TensorCoreBackwardConfig) -> None:
        self.features, self.channels = config.padded_features // 8, config.head_dim // 8
        counts = [config.row_blocks * columns * 4 for columns in (self.features, self.channels)]
        self.grad = named("grad_phi", warp.registers(counts[0], "float32"))
        self.value = named("grad_values", warp.registers(counts[1], "float32"))
        self.all = [(self.grad, i) for i in range(counts[0])] + [(self.value, i) for i in range(counts[1])]
        warp.zero(self.grad, counts[0])
        warp.zero(self.value, counts[1])


def _add_tile(
    config: TensorCoreBackwardConfig,
    phi: Buffer,
    value: Buffer,
    sums: _Sums,
    diagonals: Diagonals,
    places: _Places,
    odd: Expr,
) -> None:
    """Add the contribution of a warp's share of the queries of one tile, 16 queries at a time."""
    dtype, blocks = config.dtype, config.row_blocks
    sixteens = config.share // ROWS
    # weights[2 (s - lowest) + e] is c of the lane's row and column e of blocks of 8 x 8 that lie s of them apart
    lowest, highest = diagonals.lowest, diagonals.highest
    weights = named("weights", warp.registers(2 * config.diagonals, "float32"))
    terms = named("terms", warp.registers(8, "float32"))
    scores = named("scores", warp.registers(blocks * 8, "float32"))
    pulls = named("pulls", warp.registers(blocks * 8, "float32"))
    scaled = named("scaled", warp.registers(1, "float32"))
    weighted = named("weighted", warp.registers(blocks * 4, "uint32"))
    pulled = named("pulled", warp.registers(blocks * 4, "uint32"))
    operand = named("operand", warp.registers(4, "uint32"))

    def load_weights(steps: range) -> None:
        for step in steps:
            for column in (0, 1):
                at = 2 * (step - lowest) + column
                warp.load_float(weights, at, places.weights, 4 * (8 * step - column))

    def multiply(rows: Buffer, target: Buffer, depth: int, address: Expr, row_bytes: int, sixteen: int) -> None:
        """Add the products of kept rows and 16 rows of the tile."""
        for k in range(depth):
            warp.load_matrices(operand, address, sixteen * ROWS * row_bytes + k * ROWS * ELEMENT_BYTES)
            for block in range(blocks):
                kept = [rows[(block * depth + k) * 4 + i] for i in range(4)]
                for half in (0, 1):
                    sums_of_half = [target[block * 8 + half * 4 + i] for i in range(4)]
                    warp.multiply_add(dtype, sums_of_half, kept, [operand[2 * half], operand[2 * half + 1]])

    def add(rows: Buffer, target: Buffer, columns: int, address: Expr, row_bytes: int, sixteen: int) -> None:
        """Add 16 rows of the tile, times the numbers of kept rows."""
        for column in range(0, columns, 2):
            offset = sixteen * ROWS * row_bytes + column * CHUNK_BYTES
            warp.load_matrices(operand, address, offset, transpose=True)
            for block in range(blocks):
                factors = [rows[block * 4 + i] for i in range(4)]
                for half in range(min(2, columns - column)):
                    first = (block * columns + column + half) * 4
                    columns_of_half = [operand[2 * half], operand[2 * half + 1]]
                    warp.multiply_add(dtype, [target[first + i] for i in range(4)], factors, columns_of_half)

    load_weights(range(0, highest + 1))
    for sixteen in range(sixteens):
        load_weights(range(-2 * sixteen - 1, -2 * sixteen))
        if sixteen > 0:
            load_weights(range(-2 * sixteen, -2 * sixteen + 1))
        for half in (0, 1):
            for which in (0, 1):
                offset = 4 * (which * config.tile + sixteen * ROWS + half * 8)
                warp.load_floats(terms, half * 4 + which * 2, places.terms, offset)
        warp.zero(scores, blocks * 8)
        for block in range(blocks):
            for i in range(8):
                T.buffer_store(pulls, terms[i // 4 * 4 + i % 2], [block * 8 + i])
        features, channels = config.feature_row_bytes, config.channel_row_bytes
        multiply(phi, scores, config.padded_features // ROWS, places.features_by_column, features, sixteen)
        multiply(value, pulls, config.padded_channels // ROWS, places.channels_by_column, channels, sixteen)
        for block in range(blocks):
            for half in (0, 1):
                for lower in (0, 1):
                    step = 2 * block + lower - 2 * sixteen - half
                    pair = [block * 8 + half * 4 + lower * 2 + column for column in (0, 1)]
                    for column, i in enumerate(pair):
                        weight = weights[2 * (step - lowest) + column]
                        T.buffer_store(scaled, weight * terms[half * 4 + 2 + column], [0])
                        T.buffer_store(scores, scores[i] * scaled[0], [i])
                        diagonals.add(step, column, scores[i] * pulls[i])
                        T.buffer_store(pulls, pulls[i] * scaled[0], [i])
                    place = block * 4 + half * 2 + lower
                    warp.pack(dtype, weighted[place], *(scores[i] for i in pair))
                    warp.pack(dtype, pulled[place], *(pulls[i] for i in pair))
        add(weighted, sums.value, sums.channels, places.channels_by_row, channels, sixteen)
        add(pulled, sums.grad, sums.features, places.features_by_row, features, sixteen)
        # queries further down touch only lower steps
        complete = highest - 2 * sixteen
        diagonals.store(odd, range(complete - 1 if sixteen + 1 < sixteens else lowest, complete + 1))


def _finish(
    config: TensorCoreBackwardConfig,
    args: _Arguments,
    lane: Place,
    phi: Buffer,
    sums: _Sums,
    b: Expr,
    h: Expr,
    first_k: Expr,
) -> None:
    """Write the gradients of a warp's values and keys."""
    pair = named("pair_of_values", warp.registers(1, "uint32"))
    for block in range(config.row_blocks):
        for lower in (0, 1):
            row = let("row", first_k + lane.row + (block * ROWS + lower * 8) + lane.group)
            with T.If(row < args.n_key), T.Then():
                for column in range(sums.channels):
                    first = (block * sums.channels + column) * 4 + 2 * lower
                    warp.pack(config.dtype, pair[0], *(sums.value[first + i] for i in (0, 1)))
                    warp.store_pair(args.grad_value.ptr_to([b, h, row, column * 8 + 2 * lane.pair]), pair[0])
    factors: list[Expr] = [T.float32(1)] * (2 * config.row_blocks)
    write_argument_gradient(config, lane, args.key, phi, sums.grad, factors, b, h, first_k)
