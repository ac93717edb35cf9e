"""Features of 16 rows in shared memory, by one warp; the projection lies in its registers.

The rows are exact operands; the projection, float32, is split into two 16-bit numbers. The products W x are float32
sums in registers, where each lane takes the exponential. They leave in the registers in which a matrix instruction
wants them as rows: register 2 t + i holds features 8 t + 2 pair and the next of row `group + 8 i`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, TensorCoreConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named
from rpe_tvm.te.cuda_warp import Buffer, Expr
from rpe_tvm.te.features import FeatureMap

LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Projection:
    """Fragments of W in a warp's registers, and the registers that features are made in.

    With `interleaved`, register 2 t + i of a result holds features 2 (words pair + t) and the next for `words` tiles of
    8 features: those of a lane are neighbours.
    """

    feature_map: FeatureMap
    parts: Buffer
    lane: Expr
    logits: Buffer
    squares: Buffer
    rows: Buffer
    packed: Buffer
    interleaved: bool


def store_projection(config: TensorCoreConfig, projection: Buffer, shared: Expr, thread: Expr) -> None:
    """Put W `[m, d]` into shared memory: in every row 16-bit numbers, then those of what rounding lost."""
    m, pairs = config.num_features, config.head_dim // 2
    count = config.padded_features * pairs
    places = [thread + first for first in range(0, count, config.threads)]
    part = named("part", warp.registers(2, "uint32"))
    exact = named("exact", warp.registers(2 * len(places), "float32"))
    # all loads are on the way at the same time
    for turn, place in enumerate(places):
        row, column = T.min(place // pairs, m - 1), place % pairs
        for i in (0, 1):
            T.buffer_store(exact, projection[row, 2 * column + i], [2 * turn + i])
    for turn, place in enumerate(places):
        row, column = place // pairs, place % pairs
        with T.If(place < count), T.Then():
            numbers = [T.Select(row < m, exact[2 * turn + i], T.float32(0)) for i in (0, 1)]
            warp.pack(config.dtype, part[0], *numbers)
            rounded = warp.unpack(config.dtype, part[0])
            warp.pack(config.dtype, part[1], *(number - rounded[i] for i, number in enumerate(numbers)))
            to = let("to", shared + warp.uint32(row * config.projection_row_bytes + 4 * column))
            for i in (0, 1):
                warp.store_shared_pair(to, i * 2 * config.head_dim, part[i])


def load_projection(
    config: TensorCoreConfig, feature_map: FeatureMap, shared: Expr, lane: Expr, interleaved: bool = False
) -> Projection:
    """Load the fragments of W, after a barrier behind `store_projection`."""
    depth, tiles = config.head_dim // ROWS, config.padded_features // 8
    parts = named("parts", warp.registers(depth * tiles * 4, "uint32"))
    # channels 0-7 and 8-15, rounded, then what rounding lost
    in_row = lane // 8 % 2 * CHUNK_BYTES + lane // 16 * (2 * config.head_dim)
    row, rows_of_tile = (lane % 8, 8) if not interleaved else (lane % 8 // 2 * (2 * tiles) + lane % 2, 2)
    address = let("projection", shared + warp.uint32(row * config.projection_row_bytes + in_row))
    for k in range(depth):
        for tile in range(tiles):
            offset = tile * rows_of_tile * config.projection_row_bytes + k * 2 * CHUNK_BYTES
            warp.load_matrices([parts[(k * tiles + tile) * 4 + i] for i in range(4)], address, offset)
    return Projection(
        feature_map,
        parts,
        lane,
        named("logits", warp.registers(tiles * 4, "float32")),
        named("squares", warp.registers(2, "float32")),
        named("rows", warp.registers(4, "uint32")),
        named("packed", warp.registers(tiles * 2, "uint32")),
        interleaved,
    )


def sixteen_rows(config: TensorCoreConfig, w: Projection, address: Expr, exists: list[Expr] | None) -> Buffer:
    """Return the features of 16 rows, zero of those that do not exist; `address` is that of a lane's row and piece.

    PRF: phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m) with x' = x / d^(1/4). NPRF: the same with x' = x / |x|, where
    |x'|^2 / 2 = 1/2; a zero vector stays zero. Source: Luo et al. 2021, Eq. 5 and Algorithm 1.
    """
    depth, tiles, d, m = config.head_dim // ROWS, config.padded_features // 8, config.head_dim, config.num_features
    warp.zero(w.logits, tiles * 4)
    warp.zero(w.squares, 2)
    address = let("rows_address", address)
    for k in range(depth):
        warp.load_matrices(w.rows, address, k * 2 * CHUNK_BYTES)
        rows = [w.rows[i] for i in range(4)]
        for part in (0, 2):
            for tile in range(tiles):
                first = (k * tiles + tile) * 4 + part
                logits = [w.logits[tile * 4 + i] for i in range(4)]
                warp.multiply_add(config.dtype, logits, rows, [w.parts[first], w.parts[first + 1]])
        for i in range(4):
            low, high = warp.unpack(config.dtype, rows[i])
            T.buffer_store(w.squares, w.squares[i % 2] + (low * low + high * high), [i % 2])
    # exp(scale logit + norm) / sqrt(m), as a power of 2
    scale, norm = [], []
    for i in (0, 1):
        warp.quad_sum(w.squares, i)
        square = w.squares[i]
        if w.feature_map == "prf":
            scale.append(T.float32(LOG2_E * d**-0.25))
            exponent = square * T.float32(-0.5 * LOG2_E * d**-0.5) - T.float32(0.5 * math.log2(m))
        else:
            scale.append(let("scale", T.Select(square > 0, T.rsqrt(square) * T.float32(LOG2_E), square)))
            exponent = T.float32(-0.5 * LOG2_E - 0.5 * math.log2(m))
        norm.append(let("norm", exponent if exists is None else T.Select(exists[i], exponent, T.float32(-math.inf))))
    for tile in range(tiles):
        for lower in (0, 1):
            at = [tile * 4 + lower * 2 + i for i in (0, 1)]
            for i in at:
                warp.power_of_2(w.logits, i, w.logits[i] * scale[lower] + norm[lower])
                if config.padded_features != m:
                    pair = w.lane % 4 * 2
                    feature = (pair * tiles + tile * 2 if w.interleaved else pair + tile * 8) + i % 2
                    T.buffer_store(w.logits, T.Select(feature < m, w.logits[i], T.float32(0)), [i])
            warp.pack(config.dtype, w.packed[tile * 2 + lower], *(w.logits[i] for i in at))
    return w.packed
