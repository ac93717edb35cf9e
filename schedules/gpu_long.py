"""Schedules of `te.gpu_long`: columns in registers, rows in shared memory, shared by GPUs."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu import COMPOSITE, GpuAttentionConfig
from rpe_tvm.schedules import gpu
from rpe_tvm.schedules.gpu import Block, Loop

# threads that take neighbouring columns
THREADS = 128


def columns_of(sch: Schedule, column: Loop) -> tuple[Loop, Loop]:
    """Split neighbouring columns into blocks and threads."""
    tile, thread = sch.split(column, [None, THREADS])
    sch.bind(thread, "threadIdx.x")
    return tile, thread


def into_registers(sch: Schedule, block: Block, loop: Loop, vectorized: bool = False) -> None:
    """Compute a block in registers under `loop`."""
    sch.set_scope(block, 0, "local")
    sch.compute_at(block, loop)
    loops = gpu.below(sch, block, loop)
    gpu.unroll(sch, loops[:-1] if vectorized else loops)
    if vectorized:
        sch.vectorize(loops[-1])


def halves(sch: Schedule, config: GpuAttentionConfig, loop: Loop) -> None:
    """Compute the first half of a composite butterfly of columns in registers under `loop`."""
    if config.columns in COMPOSITE:
        into_registers(sch, sch.get_sblock("column_first"), loop)


def _store_from_registers(sch: Schedule, block: Block, loop: Loop) -> None:
    """Write the result of a block from registers, two numbers at once, under `loop`."""
    result = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(result, loop)
    loops = gpu.below(sch, result, loop)
    gpu.unroll(sch, loops[:-1])
    sch.vectorize(loops[-1])


def columns(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_long.columns`: a thread has one column, and walks over the features."""
    transformed = sch.get_sblock("transformed")
    u, p, f, k1, column, c = sch.get_loops(transformed)
    tile, thread = columns_of(sch, column)
    sch.reorder(u, p, tile, thread, f, k1, c)
    gpu.bind_grid(sch, u, p, tile)
    _store_from_registers(sch, transformed, f)
    gpu.unroll(sch, [k1, c])
    halves(sch, config, f)
    into_registers(sch, sch.get_sblock("packed"), thread)


def back_columns(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_long.back_columns`: a thread has one column, and sums over the features in registers."""
    partial = sch.get_sblock("partial")
    u, p, row, column, c, feature = sch.get_loops(partial)
    tile, thread = columns_of(sch, column)
    sch.reorder(u, p, tile, thread, feature, row, c)
    gpu.bind_grid(sch, u, p, tile)
    _store_from_registers(sch, partial, thread)
    into_registers(sch, sch.get_sblock("back"), feature)
    halves(sch, config, feature)
    entry = sch.get_sblock("column_first" if config.columns in COMPOSITE else "back")
    index = gpu.read_index(sch, entry, "product")
    into_registers(sch, sch.cache_read(entry, index, "local"), feature, vectorized=True)
    gpu.unroll(sch, [row, c])
    sch.decompose_reduction(partial, feature)
    gpu.unroll(sch, sch.get_loops(sch.get_sblock("partial_init"))[-2:])


def rows(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_long.rows`: a block of threads for each row."""
    radices, threads = config.radices, config.threads
    stages = gpu.stages(radices, inverse=True)
    meetings = gpu.meet(sch, stages)
    entry = gpu.entry(sch, "ahead0", radices[0])
    load = sch.cache_read(entry, gpu.read_index(sch, entry, "transformed"), "local")
    product = sch.get_sblock("product")
    u, p, f, k1, s, q, c = sch.get_loops(product)
    outer, thread = sch.split(q, [None, threads])
    sch.reorder(u, p, f, k1, outer, thread, s, c)
    block = sch.fuse(f, k1)
    gpu.bind_grid(sch, u, p, block)
    sch.bind(thread, "threadIdx.x")
    sch.unroll(s)
    sch.vectorize(c)
    first = gpu.place(sch, stages, meetings, block, thread, threads)
    into_registers(sch, load, first, vectorized=True)
    gpu.pad_meetings(sch, radices, meetings)


def spectrum_columns(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_long.spectrum_columns`: a thread has one column."""
    transformed = sch.get_sblock("transformed")
    h, p, k1, column, c = sch.get_loops(transformed)
    tile, thread = columns_of(sch, column)
    sch.reorder(h, p, tile, thread, k1, c)
    gpu.bind_grid(sch, h, p, tile)
    gpu.unroll(sch, [k1, c])
    halves(sch, config, thread)
    into_registers(sch, sch.get_sblock("packed"), thread)


def spectrum_rows(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_long.spectrum_rows`: a block of threads for each row."""
    radices, threads = config.radices, config.threads
    stages = gpu.stages(radices, inverse=False)
    meetings = gpu.meet(sch, stages)
    entry = gpu.entry(sch, "ahead0", radices[0])
    load = sch.cache_read(entry, gpu.read_index(sch, entry, "transformed"), "local")
    result = sch.get_sblock("spectrum")
    h, p, k1, t, block, c = sch.get_loops(result)
    outer, thread = sch.split(block, [None, threads])
    sch.reorder(h, p, k1, outer, thread, t, c)
    gpu.bind_grid(sch, h, p, k1)
    sch.bind(thread, "threadIdx.x")
    sch.unroll(t)
    sch.vectorize(c)
    first = gpu.place(sch, stages, meetings, k1, thread, threads)
    into_registers(sch, load, first, vectorized=True)
    gpu.pad_meetings(sch, radices, meetings)
