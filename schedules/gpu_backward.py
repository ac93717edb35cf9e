"""Schedules of the gradients of attention on GPUs: as those of attention, with the sums of a feature in registers."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules.gpu import Block, Loop, below, bind_grid, meet, pad_meetings, place, stages, unroll

# Where a thread keeps the spectra of a side until it multiplies them.
SCOPES = {"values": "shared.dyn", "grads": "local"}


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
    pad_meetings(sch, config.radices, meetings)
    sch.unroll(s)


def _chains(radices: tuple[int, ...], side: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return (name, radix) of the stages of a side, there and back."""
    chain = stages(radices, inverse=True, of=side)
    return chain[: len(radices)], chain[len(radices) :]


def fft_backward(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_backward.fft_backward`: a block of threads for each (batch, head, feature, parity).

    One loop over pairs of channels for all results: the spectra of values, those of gradients, their correlation, and
    both ways back. A thread keeps its values' spectra in shared memory, those of gradients in registers.
    """
    radices, threads = config.radices, config.threads
    results = [sch.get_sblock(name) for name in ("correlation", "grad_of_grads", "grad_of_values")]
    pairs = []
    for result in results:
        *outer, s, q, pair = sch.get_loops(result)
        within, thread = sch.split(q, [None, config.threads])
        sch.reorder(*outer[:4], thread, pair, within, *outer[4:], s)
        pairs.append(pair)
    sch.merge(*pairs)  # where the last one stands: after all that they need
    b, h, feature, parity, q, pair = sch.get_loops(results[-1])[:6]
    block = sch.fuse(feature, parity)
    bind_grid(sch, b, h, block)
    sch.bind(q, "threadIdx.x")
    for result in results:
        written = sch.cache_write(result, 0, "local")
        sch.reverse_compute_at(written, q)
        unroll(sch, below(sch, written, q))

    meetings: dict[str, tuple[Block, Block]] = {}
    for side in ("values", "grads"):
        ahead, back = _chains(radices, side)
        meetings |= meet(sch, ahead) | meet(sch, back)
    for side in ("grads", "values"):
        _, back = _chains(radices, side)
        position = sch.get_loops(sch.get_sblock(f"grad_of_{side}"))[-2]
        first_butterfly = place(sch, back, meetings, pair, position, threads)
        unroll(sch, [sch.get_loops(sch.get_sblock(f"grad_of_{side}"))[-1]])
        sch.unroll(_around(sch, meetings[back[0][0]][0], first_butterfly))
    for side in ("values", "grads"):
        ahead, _ = _chains(radices, side)
        # the first inverse stage reads what its own thread kept, which its loops do not say
        kept = sch.get_sblock(f"kept_{side}")
        sch.set_scope(kept, 0, SCOPES[side])
        sch.compute_at(kept, pair, preserve_unit_loops=True)
        u, t, q, c = sch.get_loops(kept)[-4:]
        sch.reorder(q, u, t, c)
        sch.bind(q, "threadIdx.x")
        place(sch, ahead, meetings, pair, u, threads)
        unroll(sch, [u, t])
        sch.vectorize(c)
    for side in ("values", "grads"):
        pad_meetings(sch, radices, meetings, of=side)
    for result in results:
        inner = below(sch, result, pair)
        unroll(sch, inner)
        start = sch.decompose_reduction(result, pair)
        unroll(sch, sch.get_loops(start)[4:])


def _around(sch: Schedule, block: Block, loop: Loop) -> Loop:
    """Return the loop directly around one of a block's loops."""
    return sch.get_loops(block)[-len(below(sch, block, loop)) - 2]
