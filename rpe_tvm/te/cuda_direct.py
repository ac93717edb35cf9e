"""Kernelized attention with RPE on tensor cores: ((phi_q phi_k^T) * C) value, normalised, tile by tile.

A block walks over the keys and keeps the sums of its queries in registers, as in FlashAttention-2 (Dao 2023, arXiv
2307.08691), but there is no softmax: nothing is rescaled, and what several warps have is simply added.

Statements, not tensor expressions: the weighted scores leave one matrix instruction in the very registers in which the
next one wants its operand, and of the Toeplitz weights a lane needs only two new ones for 8 keys, since those of 8 rows
further down are those of 8 keys before. `tensorize` can be told neither.
Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_tile import CHUNK, Lane, Sums, add_partial_sums, add_tile, share, write
from rpe_tvm.te.cuda_walk import walk
from rpe_tvm.te.cuda_warp import Buffer, Expr


def direct_attention(config: TensorCoreConfig, is_recorded: bool = False) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `attention(phi_q, phi_k, value, table, causal, out)` for CUDA, or
    `recorded_attention(phi_q, phi_k, value, table, causal, denominators, out)`, for which gradients will be asked.

    Arguments of the function: phi_q `[B, H, n_q', m']`, phi_k `[B, H, n_k', m']` and table `[H, n_q' + n_k']` as
    in `plan.gpu_direct`, value `[B, H, n_k, d]` and out `[B, H, n_q, d]` with any strides that are multiples of 8,
    at addresses that are multiples of 16 bytes, the last axis contiguous; causal 0 or 1: whether tiles above the
    diagonal are skipped; denominators `[B, H, n_q]` float32: what numerators are divided by, which gradients take. All
    sizes but m and d are read from the arguments.
    """
    with function("recorded_attention" if is_recorded else "attention") as built:
        _build(config, is_recorded)
    return built.get()


@dataclass(frozen=True)
class _Arguments:
    """The function's arguments and sizes."""

    phi_q: Buffer
    phi_k: Buffer
    value: Buffer
    table: Buffer
    denominators: Buffer | None
    out: Buffer
    n_query: Expr
    n_key: Expr
    rows_q: Expr
    causal: Expr


def _arguments(config: TensorCoreConfig, is_recorded: bool) -> tuple[_Arguments, Expr, Expr]:
    names = ("batch", "heads", "n_query", "n_key", "rows_q", "rows_k")
    batch, heads, n_query, n_key, rows_q, rows_k = (named(name, T.int64()) for name in names)
    dtype, features, channels = config.dtype, T.int64(config.padded_features), T.int64(config.head_dim)
    phi_q = argument("phi_q", (batch, heads, rows_q, features), dtype)
    phi_k = argument("phi_k", (batch, heads, rows_k, features), dtype)
    value = argument("value", (batch, heads, n_key, channels), dtype, strided=True)
    table = argument("table", (heads, rows_q + rows_k), "float32")
    causal = T.arg("causal", T.int64())
    denominators = argument("denominators", (batch, heads, n_query), "float32", align=4) if is_recorded else None
    out = argument("out", (batch, heads, n_query, channels), dtype, strided=True)
    return _Arguments(phi_q, phi_k, value, table, denominators, out, n_query, n_key, rows_q, causal), batch, heads


def _build(config: TensorCoreConfig, is_recorded: bool) -> None:
    args, batch, heads = _arguments(config, is_recorded)
    with (
        T.launch_thread("blockIdx.x", args.rows_q // config.tile_q) as block,
        T.launch_thread("blockIdx.y", heads) as h,
        T.launch_thread("blockIdx.z", batch) as b,
        T.launch_thread("threadIdx.x", config.threads) as thread,
        blocks_at_once(config.blocks),
    ):
        # with a causal mask the last rows have most to do: they start first
        first_q = let("first_q", (args.rows_q // config.tile_q - 1 - block) * config.tile_q)
        shared = T.alloc_buffer((config.shared_bytes,), "uint8", scope="shared.dyn", align=CHUNK_BYTES)
        # a pointer to all of it: of a pointer to an element TVM would keep that element only
        base = let("base", T.cuda.cvta_generic_to_shared(shared.access_ptr("rw")))
        seen = T.Select(args.causal != 0, T.min(args.n_key, first_q + config.tile_q), args.n_key)
        tiles = let("tiles", T.Cast("int32", (seen + config.tile_k - 1) // config.tile_k))
        values = config.tile_k * config.key_row_bytes
        weights = values + config.tile_k * config.value_row_bytes
        lane = Lane(config, thread, base, base + T.uint32(values), base + T.uint32(weights))
        sums = Sums(config)
        phi_q = _load_queries(config, args, lane, b, h, first_q)

        def load(stage: Expr, tile: Expr) -> None:
            _load_tile(config, args, stage, thread, b, h, first_q, tile)

        def add(used: Expr, tile: Expr) -> None:
            addresses = (
                let(name, at + used)
                for name, at in (("key", lane.keys), ("value", lane.values), ("weight", lane.weights))
            )
            add_tile(config, phi_q, sums, *addresses)

        walk(config, base, tiles, load, add)
        if config.warps_k > 1:
            add_partial_sums(config.warps_q, config.warps_k, base, lane, sums.all)
        with T.If(lane.warp_k == 0), T.Then():
            write(config, args.out, args.n_query, lane, sums, b, h, first_q, args.denominators)


def _load_queries(config: TensorCoreConfig, args: _Arguments, lane: Lane, b: Expr, h: Expr, first_q: Expr) -> Buffer:
    """Return the fragments of phi_q: they stay in registers."""
    depth = config.padded_features // ROWS
    fragments = named("phi_q_fragments", warp.registers(config.row_blocks * depth * 4, "uint32"))
    for block in range(config.row_blocks):
        for k in range(depth):
            for i in range(4):
                row = first_q + lane.row + (block * ROWS + i % 2 * 8) + lane.group
                feature = k * ROWS + i // 2 * 8 + 2 * lane.pair
                pointer = args.phi_q.ptr_to([b, h, row, feature])
                warp.load_pair(fragments[(block * depth + k) * 4 + i], pointer)
    return fragments


def _load_tile(
    config: TensorCoreConfig, args: _Arguments, stage: Expr, thread: Expr, b: Expr, h: Expr, first_q: Expr, tile: Expr
) -> None:
    """Start the copies of a tile of phi_k, of value, and of the weights from the block's queries to the tile's keys."""
    first_k = let("first_k", T.Cast("int64", tile) * config.tile_k)
    keys_left = T.Cast("int32", args.n_key) - tile * config.tile_k
    values = config.tile_k * config.key_row_bytes
    weights = values + config.tile_k * config.value_row_bytes

    def copy_key(chunk: Expr) -> None:
        chunks = config.padded_features // CHUNK
        row, column = chunk // chunks, chunk % chunks
        pointer = args.phi_k.ptr_to([b, h, first_k + row, column * CHUNK])
        warp.copy_async(stage + warp.uint32(row * config.key_row_bytes + column * CHUNK_BYTES), pointer)

    def copy_value(chunk: Expr) -> None:
        chunks = config.head_dim // CHUNK
        row, column = chunk // chunks, chunk % chunks
        pointer = args.value.ptr_to([b, h, first_k + row, column * CHUNK])
        target = stage + warp.uint32(values + row * config.value_row_bytes + column * CHUNK_BYTES)
        warp.copy_async(target, pointer, ignore=row >= keys_left)

    def copy_weight(chunk: Expr) -> None:
        pointer = args.table.ptr_to([h, first_k - first_q + (args.rows_q - config.tile_q) + chunk * 4])
        warp.copy_async(stage + warp.uint32(weights + chunk * CHUNK_BYTES), pointer)

    share(config.threads, thread, config.tile_k * (config.padded_features // CHUNK), copy_key)
    share(config.threads, thread, config.tile_k * (config.head_dim // CHUNK), copy_value)
    share(config.threads, thread, (config.tile_q + config.tile_k) // 4, copy_weight)
