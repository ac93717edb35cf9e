"""What a block of the attention on tensor cores does with a tile of keys, and with its sums at the end.

Source: Luo et al. 2021, Eq. 10, multiplied out.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, WARP, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr

ELEMENT_BYTES = 2
ONES = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}  # 1 in both halves of a register
CHUNK = CHUNK_BYTES // ELEMENT_BYTES


class Place:
    """What a lane knows of its place in a block: `warps_q` warps side by side along what they keep, others share it."""

    def __init__(self, warps_q: int, row_blocks: int, thread: Expr) -> None:
        self.lane = let("lane", thread % WARP)
        self.warp_q = let("warp_q", thread // WARP % warps_q)
        self.warp_k = let("warp_k", thread // (WARP * warps_q))
        self.group = let("group", self.lane // 4)
        self.pair = let("pair", self.lane % 4)
        self.row = let("row", self.warp_q * (ROWS * row_blocks))


class Lane(Place):
    """Its place, and the addresses that it reads in the first tile.

    Parameters
    ----------
    keys, values, weights
        Where rows of phi_k and of value begin in shared memory, and the weight of offset -tile_q from the block's
        first query to the tile's first key.
    """

    def __init__(self, config: TensorCoreConfig, thread: Expr, keys: Expr, values: Expr, weights: Expr) -> None:
        super().__init__(config.warps_q, config.row_blocks, thread)
        key = self.warp_k * (config.tile_k // config.warps_k)
        # keys 0-7 and 8-15, of each features 0-7 and 8-15
        in_keys = (key + self.lane // 16 * 8 + self.lane % 8) * config.key_row_bytes + self.lane // 8 % 2 * CHUNK_BYTES
        # channels 0-7 and 8-15, of each keys 0-7 and 8-15
        in_values = (key + self.lane % 16) * config.value_row_bytes + self.lane // 16 * CHUNK_BYTES
        # the weight of the first key and the warp's first row in this lane
        in_weights = config.tile_q + key - self.row + 2 * self.pair - self.group
        self.keys = let("keys", keys + warp.uint32(in_keys))
        self.values = let("values", values + warp.uint32(in_values))
        self.weights = let("weights", weights + warp.uint32(in_weights * 4))


class Sums:
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


def share(threads: int, thread: Expr, count: int, action: Any) -> None:
    """Let the block's threads take turns in `action(0)` to `action(count - 1)`."""
    for first in range(0, count, threads):
        chunk = thread + first
        if first + threads <= count:
            action(chunk)
        else:
            with T.If(chunk < count), T.Then():
                action(chunk)


def add_tile(
    config: TensorCoreConfig, phi_q: Buffer, sums: Sums, key_address: Expr, value_address: Expr, weight_address: Expr
) -> None:
    """Add the contribution of a warp's keys of one tile, 16 keys at a time."""
    depth = config.padded_features // ROWS
    keys = config.tile_k // config.warps_k

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


def add_partial_sums(warps_q: int, warps_k: int, base: Expr, lane: Place, sums: list[tuple[Buffer, int]]) -> None:
    """Add what the warps along the keys have, in the first of them, through shared memory."""
    warp.wait(0)
    warp.barrier()
    stride = 4 * WARP * warps_q  # one register of all warps along the queries
    place = let("place", base + warp.uint32((lane.warp_q * WARP + lane.lane) * 4))
    others = warps_k - 1
    with T.If(lane.warp_k > 0), T.Then():
        mine = let("mine", place + warp.uint32((lane.warp_k - 1) * stride))
        for register, (array, i) in enumerate(sums):
            warp.store_float(mine, register * others * stride, array[i])
    warp.barrier()
    with T.If(lane.warp_k == 0), T.Then():
        part = warp.registers(1, "float32")
        for register, (array, i) in enumerate(sums):
            for other in range(others):
                warp.load_float(part, 0, place, (register * others + other) * stride)
                T.buffer_store(array, array[i] + part[0], [i])


def write(
    config: TensorCoreConfig,
    out: Buffer,
    n_query: Expr,
    lane: Lane,
    sums: Sums,
    b: Expr,
    h: Expr,
    first_q: Expr,
    denominators: Buffer | None = None,
) -> None:
    """Write the quotients of the rows that exist, and their denominators if they are wanted."""
    pair = warp.registers(1, "uint32")
    for block in range(config.row_blocks):
        for lower in (0, 1):
            denominator = block * 4 + lower * 2
            if not config.matrix_sums:
                warp.quad_sum(sums.denominator, denominator)
            row = let("row", first_q + lane.row + (block * ROWS + lower * 8) + lane.group)
            with T.If(row < n_query), T.Then():
                if denominators is not None:
                    with T.If(lane.pair == 0), T.Then():
                        T.buffer_store(denominators, sums.denominator[denominator], [b, h, row])
                T.buffer_store(sums.denominator, T.float32(1) / sums.denominator[denominator], [denominator])
                for column in range(sums.columns):
                    numerators = sums.at(block, column)[2 * lower : 2 * lower + 2]
                    quotients = [numerator * sums.denominator[denominator] for numerator in numerators]
                    warp.pack(config.dtype, pair[0], *quotients)
                    pointer = out.ptr_to([b, h, row, column * 8 + 2 * lane.pair])
                    warp.store_pair(pointer, pair[0])
