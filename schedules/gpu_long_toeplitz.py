"""Schedules of `te.gpu_long_toeplitz`: tiles of columns of some pairs in shared memory, butterflies in registers."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.schedules.gpu import Block, Loop, below, bind_grid, entry, read_index, unroll
from rpe_tvm.schedules.gpu_long import halves, into_registers
from rpe_tvm.schedules.gpu_toeplitz import sum_over_pairs

# pairs and columns of a tile: 64 bytes of a row of channels, 256 bytes of a row of columns
PAIRS, COLUMNS = 8, 32


def _tile(config: GpuToeplitzConfig) -> tuple[int, int]:
    """Return the pairs and columns of a tile; a thread has a column of a pair."""
    return min(PAIRS, config.pairs), min(COLUMNS, config.row)


def _pad(sch: Schedule, tile: Block) -> None:
    """Pad the pairs of a tile `[..., pair, row, column, part]`, so that neighbouring channels lie in other banks."""
    rank = len(sch.get(tile).writes[0].region)
    sch.storage_align(tile, 0, rank - 4, 32, 4)


def _stored_as_pairs(sch: Schedule, block: Block, loop: Loop) -> Block:
    """Write the result of a block from registers, two numbers at once, under `loop`; return what writes."""
    result = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(result, loop)
    *loops, part = below(sch, result, loop)
    unroll(sch, loops)
    sch.vectorize(part)
    return result


def columns(sch: Schedule, config: GpuToeplitzConfig) -> None:
    """Schedule `te.gpu_long_toeplitz.columns`: a thread transforms a column of a pair for both parities."""
    pairs, width = _tile(config)
    transformed = sch.get_sblock("transformed")
    u, pair, p, k1, column, c = sch.get_loops(transformed)
    group, pair = sch.split(pair, [None, pairs])
    tile, column = sch.split(column, [None, width])
    sch.reorder(u, group, tile, pair, column, p, k1, c)
    bind_grid(sch, u, group, tile)
    thread = sch.fuse(pair, column)
    sch.bind(thread, "threadIdx.x")
    unroll(sch, [p])
    _stored_as_pairs(sch, transformed, p)
    unroll(sch, [k1, c])
    halves(sch, config, p)
    into_registers(sch, sch.get_sblock("twisted"), p)

    packed = sch.get_sblock("packed_x")
    sch.set_scope(packed, 0, "shared.dyn")
    sch.compute_at(packed, tile, preserve_unit_loops=True)
    pair, row, column, c = sch.get_loops(packed)[-4:]
    sch.reorder(row, column, pair, c)
    _in_turns(sch, [row, column, pair, c], pairs * width)
    sch.compute_inline(sch.get_sblock("read_x"))
    _pad(sch, packed)


def _in_turns(sch: Schedule, loops: list[Loop], threads: int) -> None:
    """Give all of a tile to the threads, in the order of memory; all turns at once, so that none waits for another."""
    turn, thread = sch.split(sch.fuse(*loops), [None, threads])
    sch.bind(thread, "threadIdx.x")
    sch.unroll(turn)


def back_columns(sch: Schedule, config: GpuToeplitzConfig) -> None:
    """Schedule `te.gpu_long_toeplitz.back_columns`: a thread transforms a column of a pair back, for both parities."""
    pairs, width = _tile(config)
    sums, out = sch.get_sblock("sums"), sch.get_sblock("out")
    u, pair, row, column, c = sch.get_loops(sums)
    group, pair = sch.split(pair, [None, pairs])
    tile, column = sch.split(column, [None, width])
    sch.reorder(u, group, tile, pair, column, row, c)
    unroll(sch, [row, c])
    u, i, channel = sch.get_loops(out)
    row, of_tile, column = sch.split(i, [config.columns, config.row // width, width])
    group, channel = sch.split(channel, [None, 2 * pairs])
    sch.reorder(u, group, of_tile, row, column, channel)
    sch.merge(tile, of_tile)
    u, group, tile, *inner = sch.get_loops(out)
    bind_grid(sch, u, group, tile)
    _in_turns(sch, inner, pairs * width)
    pair, column, *_ = below(sch, sums, tile)
    thread = sch.fuse(pair, column)
    sch.bind(thread, "threadIdx.x")
    stored = _stored_as_pairs(sch, sums, thread)
    sch.set_scope(stored, 0, "shared.dyn")
    into_registers(sch, sch.get_sblock("back"), thread)
    halves(sch, config, thread)
    turned = sch.get_sblock("turned")
    into_registers(sch, turned, thread)
    into_registers(sch, sch.cache_read(turned, read_index(sch, turned, "product"), "local"), thread, vectorized=True)
    _pad(sch, stored)


def correlation_rows(sch: Schedule, config: GpuToeplitzConfig) -> None:
    """Schedule `te.gpu_long_toeplitz.correlation_rows`: a block of threads for each row of a group of pairs."""
    u, group, p, k1, *inner = sch.get_loops(sch.get_sblock("sums"))
    bind_grid(sch, u, group, sch.fuse(p, k1))
    first_radix = config.radices[0]
    loads = {}
    for name in ("grad", "x"):
        first = entry(sch, f"ahead_{name}_0", first_radix)
        loads[name] = sch.cache_read(first, read_index(sch, first, f"{name}_columns"), "local")
    for name, butterfly in sum_over_pairs(sch, config, inner).items():
        into_registers(sch, loads[name], butterfly, vectorized=True)
