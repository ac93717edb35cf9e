"""Feature maps of query and key on tensor cores, both in one launch: a warp makes 16 rows of phi.

The rows are exact operands; the projection, float32, is split into two 16-bit numbers. The products W x are float32
sums in registers, where each lane takes the exponential.
"""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import ROWS, WARP, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.features import FeatureMap

WARPS = 4
FEATURES = 64  # of which a lane has the products in registers


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
        units_q, units_k = rows_q // ROWS, rows_k // ROWS
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
                    _sixteen_rows(config, feature_map, query, n_query, projection, phi_q, b, h, unit * ROWS, lane)
                with T.Else(), T.If(unit < units_q + units_k), T.Then():
                    first = (unit - units_q) * ROWS
                    _sixteen_rows(config, feature_map, key, n_key, projection, phi_k, b, h, first, lane)
    return built.get()


def _sixteen_rows(
    config: TensorCoreConfig,
    feature_map: FeatureMap,
    x: Buffer,
    n: Expr,
    projection: Buffer,
    phi: Buffer,
    b: Expr,
    h: Expr,
    first: Expr,
    lane: Expr,
) -> None:
    m, d, dtype = config.num_features, config.head_dim, config.dtype
    group, pair = let("group", lane // 4), let("pair", lane % 4)
    logits = named("logits", warp.registers(FEATURES // 2, "float32"))
    squares = named("squares", warp.registers(2, "float32"))
    rows = named("rows", warp.registers(4, "uint32"))
    weights = named("weights", warp.registers(4, "uint32"))
    scale = named("scale", warp.registers(2, "float32"))

    def multiply(start: int, tiles: range, k: Expr, halves: int) -> None:
        """Add the products with 16 channels from k on, or with 8 (one half)."""
        for i in range(4):
            if i // 2 >= halves:
                T.buffer_store(rows, T.uint32(0), [i])
                continue
            # past the end the last row again; `phi` has zeros there
            row = T.min(first + (i % 2 * 8) + group, n - 1)
            warp.load_pair(rows[i], x.ptr_to([b, h, row, k + i // 2 * 8 + 2 * pair]))
            if start == 0:
                low, high = warp.unpack(dtype, rows[i])
                T.buffer_store(squares, squares[i % 2] + (low * low + high * high), [i % 2])
        for tile in tiles:
            _split(dtype, projection, T.min(start + tile * 8 + group, m - 1), k + 2 * pair, halves, weights)
            at = [logits[tile * 4 + i] for i in range(4)]
            for part in (0, 2):
                warp.multiply_add(dtype, at, [rows[i] for i in range(4)], [weights[part], weights[part + 1]])

    def normalise() -> None:
        for i in (0, 1):
            warp.quad_sum(squares, i)
            if feature_map == "prf":
                T.buffer_store(scale, squares[i] * T.float32(-0.5 * d**-0.5), [i])
            else:
                T.buffer_store(scale, T.Select(squares[i] > 0, T.float32(1) / T.sqrt(squares[i]), squares[i]), [i])

    def feature(i: int, row: Expr, column: Expr) -> Expr:
        logit, norm = logits[i], scale[i % 4 // 2]
        is_prf = feature_map == "prf"
        exponent = logit * T.float32(d**-0.25) + norm if is_prf else logit * norm - T.float32(0.5)
        exists = row < n if config.padded_features == m else T.And(row < n, column < m)
        return T.Select(exists, T.exp(exponent) * T.float32(m**-0.5), T.float32(0))

    # steps whose loads are on the way at the same time; one after the other they would wait for memory each
    together = next(count for count in (4, 3, 2, 1) if d // ROWS % count == 0)
    warp.zero(squares, 2)
    for start in range(0, config.padded_features, FEATURES):
        tiles = range(min(FEATURES, config.padded_features - start) // 8)
        warp.zero(logits, len(tiles) * 4)
        with T.serial(d // (ROWS * together)) as turn:
            for i in range(together):
                multiply(start, tiles, (turn * together + i) * ROWS, 2)
        if d % ROWS:
            multiply(start, tiles, d // ROWS * ROWS, 1)
        if start == 0:
            normalise()
        for lower in (0, 1):
            row = let("row", first + lower * 8 + group)
            for tile in tiles:
                column = start + tile * 8 + 2 * pair
                elements = (feature(tile * 4 + lower * 2 + i, row, column + i) for i in (0, 1))
                warp.pack(dtype, rows[0], *elements)
                warp.store_pair(phi.ptr_to([b, h, row, column]), rows[0])


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
