"""Schedules of `te.gpu_gradients`: tiles of positions turn in shared memory, all else is one thread for each number."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules.gpu import (
    Block,
    Loop,
    bind_grid,
    meet,
    pad_meetings,
    place,
    read_index,
    stages,
    unroll,
)
from rpe_tvm.te.gpu_attention import TILE
from rpe_tvm.te.gpu_gradients import GradientSizes, column_groups

THREADS = 256


def _over_threads(sch: Schedule, loop: Loop, threads: int = THREADS) -> Loop:
    """Give neighbouring turns of a loop to threads; returns the loop of one thread."""
    _, thread = sch.split(loop, [None, threads])
    sch.bind(thread, "threadIdx.x")
    return thread


def _of_tile(sch: Schedule, block: Block, tile: Loop, threads: int, axes: int = 2) -> Loop:
    """Compute a block for a tile of positions in shared memory; its last `axes` axes go to threads.

    Where threads are more than that, some do nothing. No barrier may stand where only the others come by, so each has
    a single statement. Returns the loop of one thread.
    """
    sch.set_scope(block, 0, "shared.dyn")
    sch.compute_at(block, tile, preserve_unit_loops=True)
    return _over_threads(sch, sch.fuse(*sch.get_loops(block)[-axes:]), threads)


def channels(sch: Schedule) -> None:
    """Schedule `te.gpu_gradients.channels`: a block of threads for each tile of positions."""
    result = sch.get_sblock("channels")
    side, b, h, pair, residue, i, c = sch.get_loops(result)
    tile, position = sch.split(i, [None, TILE])
    sch.reorder(b, h, tile, side, pair, position, residue, c)
    bind_grid(sch, b, h, tile)
    _over_threads(sch, sch.fuse(side, pair, position))
    unroll(sch, [residue, c])
    for name in ("grads_row", "values_row"):
        row = sch.get_sblock(name)
        _of_tile(sch, row, tile, THREADS)
        sch.storage_align(row, 0, 3, 2, 1)  # an odd stride: threads of a warp read one column
    for name in ("weight", "inverse"):
        _of_tile(sch, sch.get_sblock(name), tile, THREADS, axes=1)
    for name in ("part", "products"):
        sums = sch.get_sblock(name)
        copy = sch.cache_write(sums, 0, "local")
        thread = _of_tile(sch, copy, tile, THREADS)
        sch.compute_at(sums, thread)


def grad_features(sch: Schedule, config: GradientSizes, feature_map: str) -> None:
    """Schedule `te.gpu_gradients.grad_features`: a block of threads for each tile of positions."""
    groups, columns = column_groups(config)
    threads = groups * TILE
    for name in ("q", "k"):
        result = sch.get_sblock(f"grad_{name}")
        b, h, i, channel = sch.get_loops(result)
        tile, position = sch.split(i, [None, TILE])
        bind_grid(sch, b, h, tile)
        _over_threads(sch, sch.fuse(position, channel), threads)
        for each in ("pull",) if feature_map == "prf" else ("inverse", "pull"):
            _of_tile(sch, sch.get_sblock(f"{each}_{name}"), tile, threads, axes=1)
        for each in () if feature_map == "prf" else ("norms", "pulls"):
            _of_tile(sch, sch.get_sblock(f"{each}_{name}"), tile, threads)
        along = sch.get_sblock(f"along_{name}")
        weights = sch.cache_read(along, read_index(sch, along, "projection"), "shared.dyn", [along])
        sch.set_scope(along, 0, "shared.dyn")
        sch.compute_at(along, tile, preserve_unit_loops=True)
        position, k = sch.get_loops(along)[-2:]
        group, k = sch.split(k, [None, columns])
        sch.reorder(group, position, k)
        thread = _over_threads(sch, sch.fuse(group, position), threads)
        sums = sch.cache_write(along, 0, "local")
        sch.reverse_compute_at(sums, thread)
        unroll(sch, [k, sch.get_loops(sums)[-1]])
        row = sch.get_sblock(f"row_{name}")
        for block in (row, sch.get_sblock(f"exponent_{name}")):
            _of_tile(sch, block, tile, threads)
        sch.compute_at(weights, tile, preserve_unit_loops=True)
        _over_threads(sch, sch.fuse(*sch.get_loops(weights)[-2:]), threads)
        # an odd stride: threads of a warp read one column
        sch.storage_align(row, 0, 3, 2, 1)
        sch.storage_align(sums, 0, 3, 2, 1)


def correlation_sums(sch: Schedule) -> None:
    """Schedule `te.gpu_gradients.correlation_sums`: a thread for each number."""
    h, p, c, k, *_ = sch.get_loops(sch.get_sblock("summed"))
    tile, thread = sch.split(sch.fuse(p, c, k), [None, THREADS])
    bind_grid(sch, h, tile)
    sch.bind(thread, "threadIdx.x")


def weight_sums(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_gradients.weight_sums`: a block of threads for each (head, remainder)."""
    chain = stages(config.radices, inverse=True)[len(config.radices) :]
    meetings = meet(sch, chain)
    h, residue, fold, s, q = sch.get_loops(sch.get_sblock("lags"))
    sch.reorder(q, fold, s)
    bind_grid(sch, h, residue)
    sch.bind(q, "threadIdx.x")
    place(sch, chain, meetings, residue, q, config.threads)
    pad_meetings(sch, config.radices, meetings)
    unroll(sch, [fold, s])


def grad_bias(sch: Schedule) -> None:
    """Schedule `te.gpu_gradients.grad_bias`: a thread for each offset."""
    h, offset = sch.get_loops(sch.get_sblock("grad_bias"))
    tile, thread = sch.split(offset, [None, THREADS])
    bind_grid(sch, h, tile)
    sch.bind(thread, "threadIdx.x")
