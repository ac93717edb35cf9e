"""Schedules of the gradients of attention on GPUs: as those of attention, with the sums of a feature in registers."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules.gpu import Block, Loop, below, bind_grid, meet, pad_meetings, place, stages, unroll


def denominators(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_backward.denominators`: a block of threads for each (batch, head, feature, parity)."""
    chain = stages(config.radices, inverse=True)
    meetings = meet(sch, chain)
    terms = sch.get_sblock("terms")
    b, h, feature, parity, s, q = sch.get_loops(terms)
    sch.reorder(q, s)
    block = sch.fuse(feature, parity)
    bind_grid(sch, b, h, block)
    sch.bind(q, "threadIdx.x")
    place(sch, chain, meetings, block, q, config.threads)
    pad_meetings(sch, config.radices, meetings, inverse=True)
    sch.unroll(s)


def fft_backward(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_backward.fft_backward`: a block of threads for each (batch, head, feature, parity)."""
    chain, stage_count = stages(config.radices, inverse=True), len(config.radices)
    ahead, back = chain[:stage_count], chain[stage_count:]
    meetings = meet(sch, ahead) | meet(sch, back)

    sums = sch.get_sblock("sums")
    b, h, feature, parity, kind, s, q, pair = sch.get_loops(sums)
    sch.reorder(q, pair, kind, s)
    block = sch.fuse(feature, parity)
    bind_grid(sch, b, h, block)
    sch.bind(q, "threadIdx.x")
    result = sch.cache_write(sums, 0, "local")
    sch.reverse_compute_at(result, q)
    unroll(sch, below(sch, result, q))

    # `sums` reads the dots of its own thread: one position of a butterfly is left of their loops
    dots = sch.get_sblock("dots")
    sch.set_scope(dots, 0, "local")
    sch.compute_at(dots, pair, preserve_unit_loops=True)
    side, s, q = sch.get_loops(dots)[-3:]
    sch.reorder(q, s)
    first_butterfly = place(sch, back, meetings, side, q, config.threads)
    unroll(sch, [side, s, _around(sch, meetings[back[0][0]][0], first_butterfly)])
    # the first inverse stage reads what its own thread kept, which its loops do not say
    kept = sch.get_sblock("kept")
    sch.set_scope(kept, 0, "local")
    sch.compute_at(kept, pair, preserve_unit_loops=True)
    side, u, t, q, c = sch.get_loops(kept)[-5:]
    sch.reorder(q, u, t, c)
    sch.bind(q, "threadIdx.x")
    place(sch, ahead, meetings, side, u, config.threads)
    unroll(sch, [side, u, t, c])

    pad_meetings(sch, config.radices, meetings, inverse=True)
    unroll(sch, sch.get_loops(sums)[-2:])
    sch.decompose_reduction(sums, pair)
    unroll(sch, sch.get_loops(sch.get_sblock("sums_init"))[-2:])


def _around(sch: Schedule, block: Block, loop: Loop) -> Loop:
    """Return the loop directly around one of a block's loops."""
    return sch.get_loops(block)[-len(below(sch, block, loop)) - 2]
