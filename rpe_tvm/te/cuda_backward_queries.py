"""Gradients of the queries on tensor cores: a block keeps queries and walks over the keys.

With G = grad_out, w_i = -G_i . out_i and C the Toeplitz weights, for each pair (i, j):

    D_ij = (G_i . value_j + w_i) c[j-i]        den_i = phi_q_i . sum_j c[j-i] phi_k_j

    grad phi_q_i = sum_j D_ij phi_k_j / den_i

No scores are needed: it is the forward pass with G and value in place of the features, and phi_k in place of value.
The denominators come from two sums that share their operand; what the keys' gradients need of them is written.
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
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_tile import ELEMENT_BYTES, Place, add_partial_sums
from rpe_tvm.te.cuda_walk import walk
from rpe_tvm.te.cuda_warp import Buffer, Expr


def query_gradients(config: TensorCoreBackwardConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `grad_queries(query, value, grad_out, out, denominators, phi_q, phi_k, table,
    projection, known, causal, normalised, of_projection, exponent, terms, grad_query)` for CUDA.

    Arguments of the function: query, grad_out, out and grad_query `[B, H, n_q, d]`, value `[B, H, n_k, d]` of the
    config's dtype with any strides that are multiples of 8, at addresses that are multiples of 16 bytes, the last axis
    contiguous; denominators `[B, H, n_q]` float32 of the forward pass if known is 1, else they are computed; phi_q,
    phi_k `[B, H, n', m']` and table `[H, n_q' + n_k']` as in `plan.gpu_workspace`; projection `[m, d]` float32; causal
    0 or 1; normalised 1 for NPRF, 0 for PRF; of_projection 0 or 1: whether exponent `[B, H, n_q', m']` float32 is
    written, see `te.cuda_backward_rows.Argument`; terms `[2, B, H, n_q']` float32: becomes w and 1 / den, both 0 where
    den is 0 or there is no query.
    """
    with function("grad_queries") as built:
        _build(config)
    return built.get()


@dataclass(frozen=True)
class _Arguments:
    value: Buffer
    grad_out: Buffer
    out: Buffer
    denominators: Buffer
    phi_q: Buffer
    phi_k: Buffer
    table: Buffer
    terms: Buffer
    query: Argument
    n_query: Expr
    n_key: Expr
    rows_q: Expr
    causal: Expr
    known: Expr


def _arguments(config: TensorCoreBackwardConfig) -> tuple[_Arguments, Expr, Expr]:
    names = ("batch", "heads", "n_query", "n_key", "rows_q", "rows_k")
    batch, heads, n_query, n_key, rows_q, rows_k = (named(name, T.int64()) for name in names)
    dtype, features, channels = config.dtype, T.int64(config.padded_features), T.int64(config.head_dim)
    query = argument("query", (batch, heads, n_query, channels), dtype, strided=True)
    value = argument("value", (batch, heads, n_key, channels), dtype, strided=True)
    grad_out = argument("grad_out", (batch, heads, n_query, channels), dtype, strided=True)
    out = argument("out", (batch, heads, n_query, channels), dtype, strided=True)
    denominators = argument("denominators", (batch, heads, n_query), "float32", align=4)
    phi_q = argument("phi_q", (batch, heads, rows_q, features), dtype)
    phi_k = argument("phi_k", (batch, heads, rows_k, features), dtype)
    table = argument("table", (heads, rows_q + rows_k), "float32")
    projection = argument("projection", (T.int64(config.num_features), channels), "float32", align=4)
    flags = ("known", "causal", "normalised", "of_projection")
    known, causal, normalised, of_projection = (T.arg(name, T.int64()) for name in flags)
    exponent = argument("exponent", (batch, heads, rows_q, features), "float32")
    terms = argument("terms", (T.int64(2), batch, heads, rows_q), "float32")
    grad_query = argument("grad_query", (batch, heads, n_query, channels), dtype, strided=True)
    of_query = Argument(query, grad_query, projection, exponent, normalised, of_projection)
    arrays = value, grad_out, out, denominators, phi_q, phi_k, table, terms
    return _Arguments(*arrays, of_query, n_query, n_key, rows_q, causal, known), batch, heads


def _build(config: TensorCoreBackwardConfig) -> None:
    args, batch, heads = _arguments(config)
    with (
        T.launch_thread("blockIdx.x", args.rows_q // config.rows) as block,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
    ):
        # with a causal mask the last rows have most to do: they start first
        first_q = let("first_q", (args.rows_q // config.rows - 1 - block) * config.rows)
        shared = T.alloc_buffer((config.query_shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        seen = T.Select(args.causal != 0, T.min(args.n_key, first_q + config.rows), args.n_key)
        tiles = let("tiles", T.Cast("int32", (seen + config.tile - 1) // config.tile))
        lane = Place(config.warps, config.row_blocks, thread)
        grad = load_rows("grad", args.grad_out, config.head_dim, lane, config.row_blocks, b, h, first_q)
        terms = _row_terms(config, args, lane, grad, b, h, first_q)
        sums = _Sums(config)

        channels, weights, *_ = config.stage_places
        key = lane.warp_k * config.share
        of_features, of_channels = config.feature_row_bytes, config.channel_row_bytes
        in_features = key * of_features + in_matrices(lane, of_features, True)
        in_channels = key * of_channels + in_matrices(lane, of_channels, False)
        in_weights = config.rows + key - lane.row + 2 * lane.pair - lane.group
        features_at = let("features_at", base + warp.uint32(in_features))
        channels_at = let("channels_at", base + warp.uint32(channels + in_channels))
        weights_at = let("weights_at", base + warp.uint32(weights + in_weights * 4))

        def load(stage: Expr, tile: Expr) -> None:
            first_k = let("first_k", T.Cast("int64", tile) * config.tile)
            copy_rows(
                config, thread, args.phi_k, config.padded_features, stage, config.feature_row_bytes, b, h, first_k
            )
            to = stage + T.uint32(channels)
            copy_rows(config, thread, args.value, config.head_dim, to, config.channel_row_bytes, b, h, first_k)
            offset = first_k - first_q + (args.rows_q - config.rows)
            copy_floats(config, thread, args.table, config.rows + config.tile, stage + T.uint32(weights), h, offset)

        def add(used: Expr, tile: Expr) -> None:
            places = features_at + used, channels_at + used, weights_at + used
            with T.If(args.known != 0):
                with T.Then():
                    _add_tile(config, grad, terms, sums, *places, is_known=True)
                with T.Else():
                    _add_tile(config, grad, terms, sums, *places, is_known=False)

        walk(config, base, tiles, load, add)
        if config.shares > 1:
            add_partial_sums(config.warps, config.shares, base, lane, sums.all)
        with T.If(lane.warp_k == 0), T.Then():
            _finish(config, args, lane, terms, sums, b, h, first_q)


class _Sums:
    """The accumulators of a lane: of D phi_k and of C phi_k, a row of 8 features each."""

    def __init__(self, config: TensorCoreBackwardConfig) -> None:
        self.columns = config.padded_features // 8
        count = config.row_blocks * self.columns * 4
        self.grad = named("grad_phi", warp.registers(count, "float32"))
        self.weighted = named("weighted_keys", warp.registers(count, "float32"))
        self.all = [(array, i) for array in (self.grad, self.weighted) for i in range(count)]
        warp.zero(self.grad, count)
        warp.zero(self.weighted, count)


def _row_terms(
    config: TensorCoreBackwardConfig, args: _Arguments, lane: Place, grad: Buffer, b: Expr, h: Expr, first_q: Expr
) -> Buffer:
    """Return w of a lane's rows."""
    depth = config.padded_channels // ROWS
    out = load_rows("out_rows", args.out, config.head_dim, lane, config.row_blocks, b, h, first_q)
    terms = named("row_terms", warp.registers(2 * config.row_blocks, "float32"))
    warp.zero(terms, 2 * config.row_blocks)
    for i in range(config.row_blocks * depth * 4):
        at = i // (4 * depth) * 2 + i % 2
        for x, y in zip(warp.unpack(config.dtype, grad[i]), warp.unpack(config.dtype, out[i]), strict=True):
            T.buffer_store(terms, terms[at] - x * y, [at])
    for at in range(2 * config.row_blocks):
        warp.quad_sum(terms, at)
        # out is NaN where the denominator is 0; what else makes it NaN makes more than this term NaN
        T.buffer_store(terms, T.Select(T.isnan(terms[at]), T.float32(0), terms[at]), [at])
    return terms


def _add_tile(
    config: TensorCoreBackwardConfig,
    grad: Buffer,
    terms: Buffer,
    sums: _Sums,
    features_at: Expr,
    channels_at: Expr,
    weights_at: Expr,
    is_known: bool,
) -> None:
    """Add the contribution of a warp's share of the keys of one tile, 16 keys at a time.

    C phi_k is only needed where the denominators are not known.
    """
    depth, dtype, blocks = config.padded_channels // ROWS, config.dtype, config.row_blocks
    # weights[2 (s - lowest) + e] is c of the lane's first row and column e, s * 8 offsets further
    lowest = 1 - 2 * blocks
    count = config.share // 8 - lowest
    weights = named("weights", warp.registers(2 * count, "float32"))
    rounded = named("rounded", warp.registers(count, "uint32"))

    def load_weights(steps: range) -> None:
        for step in steps:
            at = step - lowest
            for column in (0, 1):
                warp.load_float(weights, 2 * at + column, weights_at, 4 * (8 * step + column))
            if not is_known:
                warp.pack(dtype, rounded[at], weights[2 * at], weights[2 * at + 1])

    load_weights(range(lowest, 0))
    pulls = named("pulls", warp.registers(blocks * 8, "float32"))
    weighted = named("weighted", warp.registers(blocks * 4, "uint32"))
    operand = named("operand", warp.registers(4, "uint32"))
    for sixteen in range(config.share // ROWS):
        load_weights(range(2 * sixteen, 2 * sixteen + 2))
        for block in range(blocks):
            for i in range(8):
                T.buffer_store(pulls, terms[2 * block + i // 2 % 2], [block * 8 + i])
        for k in range(depth):
            offset = sixteen * ROWS * config.channel_row_bytes + k * ROWS * ELEMENT_BYTES
            warp.load_matrices(operand, channels_at, offset)
            for block in range(blocks):
                rows = [grad[(block * depth + k) * 4 + i] for i in range(4)]
                for half in (0, 1):
                    pull = [pulls[block * 8 + half * 4 + i] for i in range(4)]
                    warp.multiply_add(dtype, pull, rows, [operand[2 * half], operand[2 * half + 1]])
        for block in range(blocks):
            for half in (0, 1):
                for lower in (0, 1):
                    at = 2 * sixteen + half - 2 * block - lower - lowest
                    place = block * 8 + half * 4 + lower * 2
                    products = [pulls[place + column] * weights[2 * at + column] for column in (0, 1)]
                    warp.pack(dtype, weighted[block * 4 + half * 2 + lower], *products)
        for column in range(0, sums.columns, 2):
            offset = sixteen * ROWS * config.feature_row_bytes + column * CHUNK_BYTES
            warp.load_matrices(operand, features_at, offset, transpose=True)
            for block in range(blocks):
                pulled = [weighted[block * 4 + i] for i in range(4)]
                steps = [2 * sixteen + half - 2 * block - lower for half in (0, 1) for lower in (0, 1)]
                plain = [rounded[step - lowest] for step in steps]
                for half in (0, 1):
                    features = [operand[2 * half], operand[2 * half + 1]]
                    first = (block * sums.columns + column + half) * 4
                    warp.multiply_add(dtype, [sums.grad[first + i] for i in range(4)], pulled, features)
                    if not is_known:
                        warp.multiply_add(dtype, [sums.weighted[first + i] for i in range(4)], plain, features)


def _finish(
    config: TensorCoreBackwardConfig,
    args: _Arguments,
    lane: Place,
    terms: Buffer,
    sums: _Sums,
    b: Expr,
    h: Expr,
    first_q: Expr,
) -> None:
    """Write what the keys' gradients need of the rows, then the gradient of the queries."""
    blocks, depth = config.row_blocks, config.padded_features // ROWS
    phi = load_rows("phi", args.phi_q, config.padded_features, lane, blocks, b, h, first_q)
    denominator = named("denominator", warp.registers(2 * blocks, "float32"))
    warp.zero(denominator, 2 * blocks)
    rows = [first_q + lane.row + (at // 2 * ROWS + at % 2 * 8) + lane.group for at in range(2 * blocks)]
    with T.If(args.known != 0):
        with T.Then():
            for at, row in enumerate(rows):
                with T.If(row < args.n_query), T.Then():
                    T.buffer_store(denominator, args.denominators[b, h, row], [at])
        with T.Else():
            for i in range(blocks * depth * 4):
                block, k, half, lower = i // (4 * depth), i // 4 % depth, i // 2 % 2, i % 2
                place = (block * sums.columns + 2 * k + half) * 4 + 2 * lower
                for column, feature in enumerate(warp.unpack(config.dtype, phi[i])):
                    total = denominator[2 * block + lower] + feature * sums.weighted[place + column]
                    T.buffer_store(denominator, total, [2 * block + lower])
            for at in range(2 * blocks):
                warp.quad_sum(denominator, at)
    for at in range(2 * blocks):
        row = let("row", rows[at])
        passes = T.And(denominator[at] != T.float32(0), row < args.n_query)
        inverse = T.Select(passes, T.float32(1) / denominator[at], T.float32(0))
        T.buffer_store(denominator, inverse, [at])
        with T.If(lane.pair == 0), T.Then():
            T.buffer_store(args.terms, T.Select(passes, terms[at], T.float32(0)), [0, b, h, row])
            T.buffer_store(args.terms, denominator[at], [1, b, h, row])
    factors = [denominator[at] for at in range(2 * blocks)]
    write_argument_gradient(config, lane, args.query, phi, sums.grad, factors, b, h, first_q)
