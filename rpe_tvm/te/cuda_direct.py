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
from typing import Any

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, WARP, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr

ELEMENT_BYTES = 2
ONES = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}  # 1 in both halves of a register
CHUNK = CHUNK_BYTES // ELEMENT_BYTES


def direct_attention(config: TensorCoreConfig) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `attention(phi_q, phi_k, value, table, causal, out)` for CUDA.

    Arguments of the function: phi_q `[B, H, n_q', m']`, phi_k `[B, H, n_k', m']` and table `[H, n_q' + n_k']` as
    in `plan.gpu_direct`, value `[B, H, n_k, d]` and out `[B, H, n_q, d]` with any strides that are multiples of 8,
    at addresses that are multiples of 16 bytes, the last axis contiguous; causal 0 or 1: whether tiles above the
    diagonal are skipped. All sizes but m and d are read from the arguments.
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
    out: Buffer
    n_query: Expr
    n_key: Expr
    rows_q: Expr
    causal: Expr


def _arguments(config: TensorCoreConfig) -> tuple[_Arguments, Expr, Expr]:
    names = ("batch", "heads", "n_query", "n_key", "rows_q", "rows_k")
    batch, heads, n_query, n_key, rows_q, rows_k = (named(name, T.int64()) for name in names)
    dtype, features, channels = config.dtype, T.int64(config.padded_features), T.int64(config.head_dim)
    phi_q = argument("phi_q", (batch, heads, rows_q, features), dtype)
    phi_k = argument("phi_k", (batch, heads, rows_k, features), dtype)
    value = argument("value", (batch, heads, n_key, channels), dtype, strided=True)
    table = argument("table", (heads, rows_q + rows_k), "float32")
    causal = T.arg("causal", T.int64())
    out = argument("out", (batch, heads, n_query, channels), dtype, strided=True)
    return _Arguments(phi_q, phi_k, value, table, out, n_query, n_key, rows_q, causal), batch, heads


def _build(config: TensorCoreConfig) -> None:
    args, batch, heads = _arguments(config)
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
        lane = _Lane(config, base, thread)
        sums = _Sums(config)
        phi_q = _load_queries(config, args, lane, b, h, first_q)
        for stage in range(config.stages - 1):
            with T.If(stage < tiles), T.Then():
                _load_tile(config, args, base + T.uint32(stage * config.stage_bytes), thread, b, h, first_q, stage)
            warp.commit()
        # where the stage in use lies: a register, or nvcc keeps the next value of every address made of it in another
        used = named("used", warp.registers(1, "uint32"))
        T.buffer_store(used, T.uint32(0), [0])
        last = T.uint32((config.stages - 1) * config.stage_bytes)
        size = T.uint32(config.stage_bytes)
        with T.serial(tiles) as tile:
            warp.wait(config.stages - 2)
            warp.barrier()
            ahead = tile + (config.stages - 1)
            with T.If(ahead < tiles), T.Then():
                free = let("free", base + T.Select(used[0] == 0, last, used[0] - size))
                _load_tile(config, args, free, thread, b, h, first_q, ahead)
            warp.commit()
            _add_tile(config, lane, phi_q, sums, used[0])
            T.buffer_store(used, T.Select(used[0] == last, T.uint32(0), used[0] + size), [0])
        if config.warps_k > 1:
            _add_partial_sums(config, lane, sums)
        with T.If(lane.warp_k == 0), T.Then():
            _write(config, args, lane, sums, b, h, first_q)


class _Lane:
    """What a lane knows of its place, and the addresses that it reads in the tile of stage 0."""

    def __init__(self, config: TensorCoreConfig, base: Expr, thread: Expr) -> None:
        self.lane = let("lane", thread % WARP)
        self.warp_q = let("warp_q", thread // WARP % config.warps_q)
        self.warp_k = let("warp_k", thread // (WARP * config.warps_q))
        self.group = let("group", self.lane // 4)
        self.pair = let("pair", self.lane % 4)
        self.row = let("row", self.warp_q * (ROWS * config.row_blocks))
        key = self.warp_k * (config.tile_k // config.warps_k)
        # keys 0-7 and 8-15, of each features 0-7 and 8-15
        in_keys = (key + self.lane // 16 * 8 + self.lane % 8) * config.key_row_bytes + self.lane // 8 % 2 * CHUNK_BYTES
        # channels 0-7 and 8-15, of each keys 0-7 and 8-15
        in_values = (key + self.lane % 16) * config.value_row_bytes + self.lane // 16 * CHUNK_BYTES
        values = config.tile_k * config.key_row_bytes
        self.keys = let("keys", base + warp.uint32(in_keys))
        self.values = let("values", base + warp.uint32(in_values + values))
        # the weight of the first key and the warp's first row in this lane: offset t at index t + tile_q
        in_weights = config.tile_q + key - self.row + 2 * self.pair - self.group
        weights = values + config.tile_k * config.value_row_bytes
        self.weights = let("weights", base + warp.uint32(in_weights * 4 + weights))
        self.partial = base


class _Sums:
    """The accumulators of a lane: numerators of its rows and channels, denominators of its rows.

    Registers 0 and 2 of a block's denominators belong to rows `group` and `group + 8`: sums over the lane's keys or, by
    matrix instructions, over all.
    """

    def __init__(self, config: TensorCoreConfig) -> None:
        self.columns = config.head_dim // 8
        self.numerator = named("numerator", warp.registers(config.row_blocks * self.columns * 4, "float32"))
        self.denominator = named("denominator", warp.registers(config.row_blocks * 4, "float32"))
        self.all = [(self.numerator, i) for i in range(config.row_blocks * self.columns * 4)]
        self.all += [(self.denominator, 4 * block + i) for block in range(config.row_blocks) for i in (0, 2)]
        warp.zero(self.numerator, config.row_blocks * self.columns * 4)
        warp.zero(self.denominator, config.row_blocks * 4)

    def at(self, block: int, column: int) -> list[Expr]:
        """Return the four numerators of a block of 16 rows and of 8 channels."""
        return [self.numerator[(block * self.columns + column) * 4 + i] for i in range(4)]


def _load_queries(config: TensorCoreConfig, args: _Arguments, lane: _Lane, b: Expr, h: Expr, first_q: Expr) -> Buffer:
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

    _share(config, thread, config.tile_k * (config.padded_features // CHUNK), copy_key)
    _share(config, thread, config.tile_k * (config.head_dim // CHUNK), copy_value)
    _share(config, thread, (config.tile_q + config.tile_k) // 4, copy_weight)


def _share(config: TensorCoreConfig, thread: Expr, count: int, action: Any) -> None:
    """Let the block's threads take turns in `action(0)` to `action(count - 1)`."""
    for first in range(0, count, config.threads):
        chunk = thread + first
        if first + config.threads <= count:
            action(chunk)
        else:
            with T.If(chunk < count), T.Then():
                action(chunk)


def _add_tile(config: TensorCoreConfig, lane: _Lane, phi_q: Buffer, sums: _Sums, stage: Expr) -> None:
    """Add the contribution of a warp's keys of one tile, 16 keys at a time."""
    depth = config.padded_features // ROWS
    keys = config.tile_k // config.warps_k
    key_address = let("key_address", lane.keys + stage)
    value_address = let("value_address", lane.values + stage)
    weight_address = let("weight_address", lane.weights + stage)

    # weights[2 (s + 2 row_blocks - 1) + e] is c of the lane's first row and column e, s * 8 offsets further
    lowest = 1 - 2 * config.row_blocks
    weights = warp.registers(2 * (keys // 8 - lowest), "float32")

    def weight(step: int, column: int) -> Expr:
        return weights[2 * (step - lowest) + column]

    def load_weights(steps: range) -> None:
        for step in steps:
            for column in (0, 1):
                warp.load_float(weights, 2 * (step - lowest) + column, weight_address, 4 * (8 * step + column))

    load_weights(range(lowest, 0))
    scores = warp.registers(config.row_blocks * 8, "float32")
    weighted = warp.registers(config.row_blocks * 4, "uint32")
    operand = warp.registers(4, "uint32")
    for sixteen in range(keys // ROWS):
        load_weights(range(2 * sixteen, 2 * sixteen + 2))
        warp.zero(scores, config.row_blocks * 8)
        for k in range(depth):
            warp.load_matrices(operand, key_address, sixteen * ROWS * config.key_row_bytes + k * ROWS * ELEMENT_BYTES)
            for block in range(config.row_blocks):
                rows = [phi_q[(block * depth + k) * 4 + i] for i in range(4)]
                for half in (0, 1):
                    score = [scores[block * 8 + half * 4 + i] for i in range(4)]
                    warp.multiply_add(config.dtype, score, rows, [operand[2 * half], operand[2 * half + 1]])
        for block in range(config.row_blocks):
            for half in (0, 1):
                for lower in (0, 1):
                    pair = [block * 8 + half * 4 + lower * 2 + column for column in (0, 1)]
                    for column, i in enumerate(pair):
                        step = 2 * sixteen + half - 2 * block - lower
                        T.buffer_store(scores, scores[i] * weight(step, column), [i])
                    if not config.matrix_sums:
                        row = block * 4 + lower * 2
                        total = sums.denominator[row] + (scores[pair[0]] + scores[pair[1]])
                        T.buffer_store(sums.denominator, total, [row])
                    warp.pack(config.dtype, weighted[block * 4 + half * 2 + lower], *(scores[i] for i in pair))
            if config.matrix_sums:
                one = T.uint32(ONES[config.dtype])
                total = [sums.denominator[block * 4 + i] for i in range(4)]
                warp.multiply_add(config.dtype, total, [weighted[block * 4 + i] for i in range(4)], [one, one])
        for column in range(0, sums.columns, 2):
            offset = sixteen * ROWS * config.value_row_bytes + column * CHUNK_BYTES
            warp.load_matrices(operand, value_address, offset, transpose=True)
            for block in range(config.row_blocks):
                rows = [weighted[block * 4 + i] for i in range(4)]
                for half in range(min(2, sums.columns - column)):
                    channels = [operand[2 * half], operand[2 * half + 1]]
                    warp.multiply_add(config.dtype, sums.at(block, column + half), rows, channels)


def _add_partial_sums(config: TensorCoreConfig, lane: _Lane, sums: _Sums) -> None:
    """Add what the warps along the keys have, in the first of them, through shared memory."""
    warp.wait(0)
    warp.barrier()
    stride = 4 * WARP * config.warps_q  # one register of all warps along the queries
    place = let("place", lane.partial + warp.uint32((lane.warp_q * WARP + lane.lane) * 4))
    others = config.warps_k - 1
    with T.If(lane.warp_k > 0), T.Then():
        mine = let("mine", place + warp.uint32((lane.warp_k - 1) * stride))
        for register, (array, i) in enumerate(sums.all):
            warp.store_float(mine, register * others * stride, array[i])
    warp.barrier()
    with T.If(lane.warp_k == 0), T.Then():
        part = warp.registers(1, "float32")
        for register, (array, i) in enumerate(sums.all):
            for other in range(others):
                warp.load_float(part, 0, place, (register * others + other) * stride)
                T.buffer_store(array, array[i] + part[0], [i])


def _write(
    config: TensorCoreConfig, args: _Arguments, lane: _Lane, sums: _Sums, b: Expr, h: Expr, first_q: Expr
) -> None:
    """Write the quotients of the rows that exist."""
    pair = warp.registers(1, "uint32")
    for block in range(config.row_blocks):
        for lower in (0, 1):
            denominator = block * 4 + lower * 2
            if not config.matrix_sums:
                warp.quad_sum(sums.denominator, denominator)
            row = let("row", first_q + lane.row + (block * ROWS + lower * 8) + lane.group)
            with T.If(row < args.n_query), T.Then():
                T.buffer_store(sums.denominator, T.float32(1) / sums.denominator[denominator], [denominator])
                for column in range(sums.columns):
                    numerators = sums.at(block, column)[2 * lower : 2 * lower + 2]
                    quotients = [numerator * sums.denominator[denominator] for numerator in numerators]
                    warp.pack(config.dtype, pair[0], *quotients)
                    pointer = args.out.ptr_to([b, h, row, column * 8 + 2 * lane.pair])
                    warp.store_pair(pointer, pair[0])
