"""How rows of the gradients by tiles in float32 reach shared memory, by asynchronous copies."""

from __future__ import annotations

from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import CHUNK_BYTES, WARP
from rpe_tvm.plan.gpu_tiles_backward import FOUR, TileBackwardConfig
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, only_if
from rpe_tvm.te.cuda_tile import share
from rpe_tvm.te.cuda_warp import Buffer, Expr


def copy_features(
    config: TileBackwardConfig, thread: Expr, phi: Buffer, count: int, target: Expr, b: Expr, h: Expr, first: Expr
) -> None:
    """Start the copies of `count` positions of all features, zero from `num_features` on."""
    chunks = count // FOUR

    def copy(chunk: Expr) -> None:
        feature, part = chunk // chunks, chunk % chunks
        pointer = phi.ptr_to([b, h, feature, first + part * FOUR])
        to = target + warp.uint32(4 * (feature * count + feature // FOUR * FOUR) + part * CHUNK_BYTES)
        ignore = None if config.features == config.num_features else feature >= config.num_features
        warp.copy_async(to, pointer, ignore)

    share(config.threads, thread, config.features * chunks, copy)


def copy_channels(
    config: TileBackwardConfig, thread: Expr, x: Buffer, count: int, target: Expr, b: Expr, h: Expr, first: Expr
) -> None:
    """Start the copies of `count` rows, with zeros for rows and channels that do not exist; a warp takes a row."""
    warps = config.threads // WARP
    row, lane = let("row_of_warp", thread // WARP), let("lane", thread % WARP)
    left = let("left", T.Cast("int32", x.shape[2] - first))
    # rows of four follow each other without a gap, and warps take 2^i rows in turns
    from_row = let("from_row", target + warp.uint32(4 * (row * config.channels + row // FOUR * FOUR + lane)))
    with T.unroll(count // warps) as turn:
        for column in range(0, config.channels, WARP):
            offset = 4 * (turn * (warps * config.channels) + turn * warps // FOUR * FOUR + column)
            pointer = x.ptr_to([b, h, first + (turn * warps + row), column + lane])
            ignore = row + turn * warps >= left
            if column + WARP > config.head_dim:
                ignore = T.Or(ignore, lane >= config.head_dim - column)
            with only_if(lane < config.channels - column if column + WARP > config.channels else None):
                warp.copy_float_async(from_row + warp.uint32(offset), pointer, ignore)


def copy_floats(config: TileBackwardConfig, thread: Expr, x: Buffer, count: int, target: Expr, *at: Expr) -> None:
    """Start the copies of `count` floats of the last axis."""

    def copy(chunk: Expr) -> None:
        warp.copy_async(target + warp.uint32(chunk * CHUNK_BYTES), x.ptr_to([*at[:-1], at[-1] + chunk * FOUR]))

    share(config.threads, thread, count // FOUR, copy)
