"""Feature maps of query and key on tensor cores, both in one launch: a warp makes up to 64 rows of phi.

It reads the projection once for all of them: loads of 8 bytes from each of 8 rows take longer than the products.
The rows are exact operands; the projection, float32, is split into two 16-bit numbers. The products W x are float32
sums in registers, where each lane takes the exponential.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import ROWS, WARP, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.features import FeatureMap

WARPS = 4
FEATURES = 32  # of which a lane has the products in registers
LOG2_E = 1 / math.log(2)


def features(config: TensorCoreConfig, feature_map: FeatureMap) -> tvm.tirx.PrimFunc:
    """Return the scheduled function `features_<map>(query, key, projection, phi_q, phi_k)` for CUDA.

    PRF: phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m) with x' = x / d^(1/4). NPRF: the same with x' = x / |x|, where
    |x'|^2 / 2 = 1/2; a zero vector stays zero. Source: Luo et al. 2021, Eq. 5 and Algorithm 1.

    Arguments of the function: query `[B, H, n_q, d]` and key `[B, H, n_k, d]` of the config's dtype with any even
    strides at addresses that are multiples of 4 bytes, the last axis contiguous; projection W `[m, d]` float32; phi_q
    and phi_k as in `plan.gpu_direct`, zero past the last position and the last feature.
    """
    with function(f"features_{feature_map}") as built:
        batch, heads, n_query, n_key, rows_q, rows_k = (
            named(name, T.int64()) for name in ("batch", "heads", "n_query", "n_key", "rows_q", "rows_k")
        )
        channels, columns = T.int64(config.head_dim), T.int64(config.padded_features)
        query = argument("query", (batch, heads, n_query, channels), config.dtype, strided=True, align=4)
        key = argument("key", (batch, heads, n_key, channels), config.dtype, strided=True, align=4)
        projection = argument("projection", (T.int64(config.num_features), channels), "float32", align=4)
        phi_q = argument("phi_q", (batch, heads, rows_q, columns), config.dtype)
        phi_k = argument("phi_k", (batch, heads, rows_k, columns), config.dtype)
        rows = rows_of_warp(config)
        units_q, units_k = (rows_q + rows - 1) // rows, (rows_k + rows - 1) // rows
        with (
            T.launch_thread("blockIdx.x", (units_q + units_k + WARPS - 1) // WARPS) as block,
            T.launch_thread("blockIdx.y", heads) as h,
            T.launch_thread("blockIdx.z", batch) as b,
            T.launch_thread("threadIdx.x", WARP * WARPS) as thread,
            blocks_at_once(2),
        ):
            unit = let("unit", block * WARPS + thread // WARP)
            lane = let("lane", thread % WARP)
            with T.If(unit < units_q):
                with T.Then():
                    first = unit * rows
                    _make_rows(config, feature_map, query, n_query, projection, phi_q, rows_q, b, h, first, lane)
                with T.Else(), T.If(unit < units_q + units_k), T.Then():
                    first = (unit - units_q) * rows
                    _make_rows(config, feature_map, key, n_key, projection, phi_k, rows_k, b, h, first, lane)
    return built.get()


def rows_of_warp(config: TensorCoreConfig) -> int:
    """Return how many rows a warp makes: as many as its registers hold beside what it loads ahead."""
    return 64 if config.head_dim <= 64 else 32


def _make_rows(
    config: TensorCoreConfig,
    feature_map: FeatureMap,
    x: Buffer,
    n: Expr,
    projection: Buffer,
    phi: Buffer,
    n_phi: Expr,
    b: Expr,
    h: Expr,
    first: Expr,
    lane: Expr,
) -> None:
    m, d, dtype, blocks = config.num_features, config.head_dim, config.dtype, rows_of_warp(config) // ROWS
    group, pair = let("group", lane // 4), let("pair", lane % 4)
    logits = named("logits", warp.registers(blocks * FEATURES // 2, "float32"))
    squares = named("squares", warp.registers(2 * blocks, "float32"))
    rows = named("rows", warp.registers(4 * blocks, "uint32"))
    weights = named("weights", warp.registers(4, "uint32"))
    packed = named("packed", warp.registers(1, "uint32"))
    halves_of_blocks = [(block, lower) for block in range(blocks) for lower in (0, 1)]
    # rows `group` and `group + 8` of each block
    numbers = [let("row", first + (block * ROWS + lower * 8) + group) for block, lower in halves_of_blocks]

    def multiply(start: int, tiles: range, k: Expr, halves: int) -> None:
        """Add the products with 16 channels from k on, or with 8 (one half)."""
        for block, lower in halves_of_blocks:
            # past the end the last row again; `phi` has zeros there
            row = T.min(numbers[2 * block + lower], n - 1)
            for half in (0, 1):
                at = 4 * block + 2 * half + lower
                if half < halves:
                    warp.load_pair(rows[at], x.ptr_to([b, h, row, k + half * 8 + 2 * pair]))
                else:
                    T.buffer_store(rows, T.uint32(0), [at])
        if start == 0:
            for at in range(4 * blocks):
                low, high = warp.unpack(dtype, rows[at])
                place = at // 4 * 2 + at % 2
                T.buffer_store(squares, squares[place] + (low * low + high * high), [place])
        for tile in tiles:
            _split(dtype, projection, T.min(start + tile * 8 + group, m - 1), k + 2 * pair, halves, weights)
            for part in (0, 2):
                for block in range(blocks):
                    sums = [logits[(block * len(tiles) + tile) * 4 + i] for i in range(4)]
                    operand = [rows[4 * block + i] for i in range(4)]
                    warp.multiply_add(dtype, sums, operand, [weights[part], weights[part + 1]])

    def make(start: int, tiles: range, block: int, lower: int) -> None:
        """Store the features of a row: exp(scale logit + norm) / sqrt(m), as powers of 2."""
        number, square = numbers[2 * block + lower], squares[2 * block + lower]
        if feature_map == "prf":
            scale: Expr = T.float32(LOG2_E * d**-0.25)
            exponent = square * T.float32(-0.5 * LOG2_E * d**-0.5) - T.float32(0.5 * math.log2(m))
        else:
            scale = let("scale", T.Select(square > 0, T.rsqrt(square) * T.float32(LOG2_E), square))
            exponent = T.float32(-0.5 * LOG2_E - 0.5 * math.log2(m))
        norm = let("norm", exponent)
        with T.If(number < n_phi), T.Then():
            for tile in tiles:
                column = start + tile * 8 + 2 * pair
                at = [(block * len(tiles) + tile) * 4 + lower * 2 + i for i in (0, 1)]
                for i in (0, 1):
                    warp.power_of_2(logits, at[i], logits[at[i]] * scale + norm)
                    exists = number < n if config.padded_features == m else T.And(number < n, column + i < m)
                    T.buffer_store(logits, T.Select(exists, logits[at[i]], T.float32(0)), [at[i]])
                warp.pack(dtype, packed[0], *(logits[i] for i in at))
                warp.store_pair(phi.ptr_to([b, h, number, column]), packed[0])

    # steps whose loads are on the way at the same time; one after the other they would wait for memory each
    together = next(count for count in (4, 3, 2, 1) if d // ROWS % count == 0)
    warp.zero(squares, 2 * blocks)
    for start in range(0, config.padded_features, FEATURES):
        tiles = range(min(FEATURES, config.padded_features - start) // 8)
        warp.zero(logits, blocks * len(tiles) * 4)
        with T.serial(d // (ROWS * together)) as turn:
            for i in range(together):
                multiply(start, tiles, (turn * together + i) * ROWS, 2)
        if d % ROWS:
            multiply(start, tiles, d // ROWS * ROWS, 1)
        if start == 0:
            for row in range(2 * blocks):
                warp.quad_sum(squares, row)
        for block, lower in halves_of_blocks:
            make(start, tiles, block, lower)


def _split(dtype: str, projection: Buffer, row: Expr, column: Expr, halves: int, parts: Buffer) -> None:
    """Put 16 columns of 8 rows of W into fragments, or 8: rounded in 0 and 1, what rounding lost in 2 and 3."""
    for half in (0, 1):
        if half >= halves:
            for part in (half, half + 2):
                T.buffer_store(parts, T.uint32(0), [part])
            continue
        exact = [projection[row, column + half * 8 + i] for i in (0, 1)]
        warp.pack(dtype, parts[half], *exact)
        rounded = warp.unpack(dtype, parts[half])
        warp.pack(dtype, parts[half + 2], *(x - y for x, y in zip(exact, rounded, strict=True)))
