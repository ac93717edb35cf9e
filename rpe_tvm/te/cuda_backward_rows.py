"""What the gradients' two kernels on tensor cores share: how rows are loaded, and the way back through a feature map.

A warp keeps its rows, queries or keys, as fragments in registers; the rows of a tile lie in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, ROWS, round_up
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named
from rpe_tvm.te.cuda_tile import CHUNK, Place, share
from rpe_tvm.te.cuda_warp import Buffer, Expr


def load_rows(name: str, x: Buffer, columns: int, lane: Place, blocks: int, b: Expr, h: Expr, first: Expr) -> Buffer:
    """Return the fragments of a warp's rows, zero past the columns; rows past the last repeat it."""
    depth = round_up(columns, ROWS) // ROWS
    fragments = named(name, warp.registers(blocks * depth * 4, "uint32"))
    for block in range(blocks):
        for lower in (0, 1):
            row = let("row", T.min(first + lane.row + (block * ROWS + lower * 8) + lane.group, x.shape[2] - 1))
            for eight in range(2 * depth):
                at = (block * depth + eight // 2) * 4 + eight % 2 * 2 + lower
                if 8 * eight < columns:
                    warp.load_pair(fragments[at], x.ptr_to([b, h, row, 8 * eight + 2 * lane.pair]))
                else:
                    T.buffer_store(fragments, T.uint32(0), [at])
    return fragments


def copy_rows(
    config: TensorCoreBackwardConfig,
    thread: Expr,
    x: Buffer,
    columns: int,
    target: Expr,
    row_bytes: int,
    b: Expr,
    h: Expr,
    first: Expr,
) -> None:
    """Start the copies of the rows of a tile, with zeros for rows and columns that do not exist."""
    chunks = round_up(columns, ROWS) // CHUNK
    left = let("left", T.Cast("int32", x.shape[2] - first))

    def copy(chunk: Expr) -> None:
        row, column = chunk // chunks, chunk % chunks
        ignore = row >= left
        if columns % ROWS:
            ignore = T.Or(ignore, column >= columns // CHUNK)
        pointer = x.ptr_to([b, h, first + row, column * CHUNK])
        warp.copy_async(target + warp.uint32(row * row_bytes + column * CHUNK_BYTES), pointer, ignore)

    share(config.threads, thread, config.tile * chunks, copy)


def copy_floats(config: TensorCoreBackwardConfig, thread: Expr, x: Buffer, count: int, target: Expr, *at: Expr) -> None:
    """Start the copies of `count` floats of the last axis."""

    def copy(chunk: Expr) -> None:
        warp.copy_async(target + warp.uint32(chunk * CHUNK_BYTES), x.ptr_to([*at[:-1], at[-1] + chunk * 4]))

    share(config.threads, thread, count // 4, copy)


def in_matrices(lane: Place, row_bytes: int, transpose: bool) -> Expr:
    """Return where a lane's row of the matrices lies that `load_matrices` reads from 16 rows: two operands of 16 x 8.

    Two addresses, not one for both: an operand has to be in neighbouring registers, or it is moved there.
    """
    low, high = lane.lane % 8, lane.lane // 16 * 8
    if transpose:  # columns 0-7 and 8-15, of each rows 0-7 and 8-15
        return (lane.lane % 16) * row_bytes + lane.lane // 16 * CHUNK_BYTES
    return (high + low) * row_bytes + lane.lane // 8 % 2 * CHUNK_BYTES


@dataclass(frozen=True)
class Argument:
    """The argument of a feature map, queries or keys, and what becomes of its gradient.

    Attributes
    ----------
    x, grad_x
        `[B, H, n, d]`.
    projection
        W, `[m, d]`.
    exponent
        `[B, H, n', m']` float32: in the first n rows the gradient of the features' exponents, of which a learned
        projection needs the sum over rows of its products with x'; written where `of_projection` is not 0.
    normalised
        Whether the map is NPRF (not 0) or PRF (0).
    """

    x: Buffer
    grad_x: Buffer
    projection: Buffer
    exponent: Buffer
    normalised: Expr
    of_projection: Expr


def write_argument_gradient(
    config: TensorCoreBackwardConfig,
    lane: Place,
    argument: Argument,
    phi: Buffer,
    grad_phi: Buffer,
    factors: list[Expr],
    b: Expr,
    h: Expr,
    first: Expr,
) -> None:
    """Write the gradient of a warp's rows of x from the accumulators of that of phi, times a factor for each row.

    With y = phi dphi: PRF, phi = exp(W x' - |x'|^2 / 2) / sqrt(m), x' = x / d^(1/4): dx = (W^T y - x' sum(y)) /
    d^(1/4). NPRF, x' = x / |x|: dx = (W^T y - x' (x' . W^T y)) / |x|, and 0 where x is 0. Rows of y are divided by
    their largest entry before they are rounded: 16 bits then hold them.
    """
    x, n, dtype, blocks = argument.x, argument.x.shape[2], config.dtype, config.row_blocks
    tiles, depth, columns = config.padded_features // 8, config.padded_features // ROWS, config.head_dim // 8
    rows = [(block, lower) for block in range(blocks) for lower in (0, 1)]
    numbers = [let("row", first + lane.row + (block * ROWS + lower * 8) + lane.group) for block, lower in rows]
    totals = named("totals", warp.registers(2 * blocks, "float32"))
    largest = named("largest", warp.registers(2 * blocks, "float32"))
    packed = named("packed", warp.registers(blocks * depth * 4, "uint32"))
    warp.zero(totals, 2 * blocks)
    warp.zero(largest, 2 * blocks)
    for at, (block, lower) in enumerate(rows):
        places = [[(block * tiles + tile) * 4 + 2 * lower + i for i in (0, 1)] for tile in range(tiles)]
        for tile, pair in enumerate(places):
            features = warp.unpack(dtype, phi[(block * depth + tile // 2) * 4 + tile % 2 * 2 + lower])
            for i, place in enumerate(pair):
                T.buffer_store(grad_phi, grad_phi[place] * (features[i] * factors[at]), [place])
                T.buffer_store(totals, totals[at] + grad_phi[place], [at])
                T.buffer_store(largest, T.max(largest[at], T.max(grad_phi[place], -grad_phi[place])), [at])
        with T.If(T.And(argument.of_projection != 0, numbers[at] < n)), T.Then():
            for tile, pair in enumerate(places):
                for i, place in enumerate(pair):
                    column = tile * 8 + 2 * lane.pair + i
                    T.buffer_store(argument.exponent, grad_phi[place], [b, h, numbers[at], column])
        warp.quad_sum(totals, at)
        warp.quad_max(largest, at)
        # where all are 0, or too small to divide by
        T.buffer_store(largest, T.Select(largest[at] > T.float32(1e-30), largest[at], T.float32(1)), [at])
        inverse = let("inverse", T.float32(1) / largest[at])
        for tile, pair in enumerate(places):
            target = packed[(block * depth + tile // 2) * 4 + tile % 2 * 2 + lower]
            warp.pack(dtype, target, *(grad_phi[place] * inverse for place in pair))

    along = named("along", warp.registers(blocks * columns * 4, "float32"))
    warp.zero(along, blocks * columns * 4)
    parts = named("parts", warp.registers(4, "uint32"))
    for column in range(columns):
        for k in range(depth):
            _split(config, argument.projection, lane, k, column, parts)
            for part in (0, 2):
                for block in range(blocks):
                    sums = [along[(block * columns + column) * 4 + i] for i in range(4)]
                    operand = [packed[(block * depth + k) * 4 + i] for i in range(4)]
                    warp.multiply_add(dtype, sums, operand, [parts[part], parts[part + 1]])

    pairs = load_rows("x", x, config.head_dim, lane, blocks, b, h, first)
    square, dot = (named(name, warp.registers(2 * blocks, "float32")) for name in ("square", "dot"))
    warp.zero(square, 2 * blocks)
    warp.zero(dot, 2 * blocks)
    out = named("out_pair", warp.registers(1, "uint32"))
    width = config.padded_channels // ROWS
    for at, (block, lower) in enumerate(rows):

        def elements(column: int, block: int = block, lower: int = lower) -> list[tuple[Expr, Expr]]:
            """x and W^T y of two channels."""
            pair = warp.unpack(dtype, pairs[(block * width + column // 2) * 4 + column % 2 * 2 + lower])
            place = (block * columns + column) * 4 + 2 * lower
            return [(pair[i], along[place + i]) for i in (0, 1)]

        for column in range(columns):
            (x0, a0), (x1, a1) = elements(column)
            T.buffer_store(square, square[at] + (x0 * x0 + x1 * x1), [at])
            T.buffer_store(dot, dot[at] + (x0 * a0 + x1 * a1), [at])
        warp.quad_sum(square, at)
        warp.quad_sum(dot, at)
        is_map = argument.normalised != 0
        unit = T.Select(square[at] > 0, T.rsqrt(square[at]), T.float32(0))
        length = let("length", T.Select(is_map, unit, T.float32(config.head_dim**-0.25)))
        across = let("across", length * T.Select(is_map, length * (dot[at] * largest[at]), totals[at]))
        with T.If(numbers[at] < n), T.Then():
            for column in range(columns):
                gradients = [(a * largest[at] - x * across) * length for x, a in elements(column)]
                warp.pack(dtype, out[0], *gradients)
                warp.store_pair(argument.grad_x.ptr_to([b, h, numbers[at], column * 8 + 2 * lane.pair]), out[0])


def _split(
    config: TensorCoreBackwardConfig, projection: Buffer, lane: Place, k: int, column: int, parts: Buffer
) -> None:
    """Put 16 rows and 8 columns of W into fragments: rounded in 0 and 1, what rounding lost in 2 and 3."""
    for half in (0, 1):
        row = k * ROWS + half * 8 + 2 * lane.pair
        exact = [projection[T.min(row + i, config.num_features - 1), column * 8 + lane.group] for i in (0, 1)]
        warp.pack(config.dtype, parts[half], *exact)
        rounded = warp.unpack(config.dtype, parts[half])
        warp.pack(config.dtype, parts[half + 2], *(x - y for x, y in zip(exact, rounded, strict=True)))
