"""Schedule of `te.gpu_joint_backward`: one block of threads on a multiprocessor, what it reads each turn beside it."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules.gpu import (
    Block,
    Loop,
    below,
    bind_grid,
    entry,
    meet,
    pad_meetings,
    place,
    read_index,
    stages,
    unroll,
)
from rpe_tvm.schedules.gpu_backward import around, decompose, nest, sum_in_registers


def fft_backward(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_joint_backward.fft_backward`: a block of threads for each (batch, head, feature, remainder)."""
    results = {name: sch.get_sblock(name) for name in ("correlation", "of_values", "of_grads")}
    for result in results.values():
        b, h, f, r, *inner, q, pair = sch.get_loops(result)
        sch.reorder(b, h, f, r, q, pair, *inner)
    b, h, f, r, q, pair = nest(sch, results, grid=4)
    block = sch.fuse(f, r)
    bind_grid(sch, b, h, block)
    for result in results.values():
        sum_in_registers(sch, result, q)
    _transforms(sch, config, pair)
    for result in results.values():
        decompose(sch, result, q, pair)
    first = entry(sch, "backsides0", config.radices[-1])
    for copy in (
        sch.get_sblock("features"),
        sch.cache_read(first, read_index(sch, first, "spectrum"), "shared.dyn", [first]),
    ):
        _copy(sch, copy, block, config.threads)


def _transforms(sch: Schedule, config: GpuBackwardConfig, pair: Loop) -> None:
    """Compute the transforms of both sides, there and back, under the loop over pairs."""
    radices, threads = config.radices, config.threads
    chain = stages(radices, inverse=True, of="sides")
    ahead, back = chain[: len(radices)], chain[len(radices) :]
    meetings = meet(sch, ahead) | meet(sch, back)
    first = entry(sch, *ahead[0])
    load = sch.cache_read(first, read_index(sch, first, "channels"), "local", [first])
    butterfly = place(sch, back, meetings, pair, pair, threads, together=1)
    sch.unroll(around(sch, meetings[back[0][0]][0], butterfly))
    kept = sch.get_sblock("kept_sides")
    sch.set_scope(kept, 0, "local")
    sch.compute_at(kept, pair, preserve_unit_loops=True)
    side, u, t, q, c = sch.get_loops(kept)[-5:]
    sch.reorder(q, u, side, t, c)
    sch.bind(q, "threadIdx.x")
    butterfly = place(sch, ahead, meetings, pair, u, threads, together=1)
    sch.compute_at(load, butterfly)
    *loops, part = below(sch, load, butterfly)
    unroll(sch, [u, side, t, *loops])
    sch.vectorize(part)
    sch.vectorize(c)
    pad_meetings(sch, radices, meetings, of="sides")


def _copy(sch: Schedule, copy: Block, grid: Loop, threads: int) -> None:
    """Make what a block of threads reads in every turn once, in shared memory."""
    sch.set_scope(copy, 0, "shared.dyn")
    sch.compute_at(copy, grid, preserve_unit_loops=True)
    _, thread = sch.split(sch.fuse(*below(sch, copy, grid)), [None, threads])
    sch.bind(thread, "threadIdx.x")
