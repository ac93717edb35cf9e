"""Schedules of the gradients of attention on GPUs: as those of attention, with the sums of a feature in registers."""

from __future__ import annotations

from collections.abc import Sequence

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

# From that many points on a thread keeps its spectra of values in shared memory until it multiplies them, and has 128
# registers: 0.88 in place of 0.93 ms at 4096 on an H100. At 1024 there are so few blocks that all run at once with more
# registers: 0.21 in place of 0.27 ms.
KEPT_IN_SHARED = 2048


def denominators(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_backward.denominators`: a block of threads for each (batch, head, feature, remainder)."""
    chain = stages(config.radices, inverse=True)
    meetings = meet(sch, chain)
    terms = sch.get_sblock("terms")
    b, h, feature, residue, fold, s, q = sch.get_loops(terms)
    sch.reorder(q, fold, s)
    block = sch.fuse(feature, residue)
    bind_grid(sch, b, h, block)
    sch.bind(q, "threadIdx.x")
    place(sch, chain, meetings, block, q, config.threads)
    pad_meetings(sch, config.radices, meetings)
    unroll(sch, [fold, s])


def fft_backward(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_backward.fft_backward`: a block of threads for each (batch, head, feature, remainder)."""
    results = {name: sch.get_sblock(name) for name in ("correlation", "of_grads", "of_values")}
    for result in results.values():
        b, h, f, r, *inner, q, pair = sch.get_loops(result)
        sch.reorder(b, h, f, r, q, pair, *inner)
    b, h, f, r, q, pair = nest(sch, results, grid=4)
    bind_grid(sch, b, h, sch.fuse(f, r))
    for result in results.values():
        sum_in_registers(sch, result, q)
    two_sides(sch, config, pair, {"values": "channels", "grads": "channels"})
    for result in results.values():
        decompose(sch, result, q, pair)


def nest(sch: Schedule, results: dict[str, Block], grid: int) -> list[Loop]:
    """Make one loop nest of results whose loops are those of the grid, q, the pairs of channels, and others.

    Returns the loops of the grid, that of threads, which is bound, and that of pairs.
    """
    for result in results.values():
        loops = sch.get_loops(result)
        # a turn of one butterfly is left below the pairs, where what it needs is computed
        within, thread = sch.split(loops[grid], [1, None])
        sch.reorder(thread, loops[grid + 1], within)
    sch.merge(*(sch.get_loops(result)[grid + 1] for result in results.values()))  # at the last one: after all they need
    merged: list[Loop] = sch.get_loops(results["of_values"])[: grid + 2]
    sch.bind(merged[grid], "threadIdx.x")
    return merged


def two_sides(sch: Schedule, config: GpuBackwardConfig, pair: Loop, inputs: dict[str, str]) -> None:
    """Compute the transforms of both sides, there and back, under the loop over pairs.

    First the spectra of values, then those of gradients, then all that needs both. `inputs` names the buffer that the
    first stage of a side loads.
    """
    radices, threads = config.radices, config.threads
    meetings: dict[str, tuple[Block, Block]] = {}
    loads: dict[str, Block] = {}
    for side, name in inputs.items():
        ahead, back = _chains(radices, side)
        meetings |= meet(sch, ahead) | meet(sch, back)
        first = entry(sch, *ahead[0])
        loads[side] = sch.cache_read(first, read_index(sch, first, name), "local", [first])
    for side in ("grads", "values"):
        _, back = _chains(radices, side)
        butterfly = below(sch, sch.get_sblock(f"of_{side}"), pair)[0]
        first_butterfly = place(sch, back, meetings, pair, butterfly, threads)
        sch.unroll(around(sch, meetings[back[0][0]][0], first_butterfly))
    for side in ("values", "grads"):
        ahead, _ = _chains(radices, side)
        # the first inverse stage reads what its own thread kept, which its loops do not say
        kept = sch.get_sblock(f"kept_{side}")
        in_shared = side == "values" and config.row >= KEPT_IN_SHARED
        sch.set_scope(kept, 0, "shared.dyn" if in_shared else "local")
        sch.compute_at(kept, pair, preserve_unit_loops=True)
        u, t, q, c = sch.get_loops(kept)[-4:]
        sch.reorder(q, u, t, c)
        sch.bind(q, "threadIdx.x")
        first_butterfly = place(sch, ahead, meetings, pair, u, threads)
        sch.compute_at(loads[side], first_butterfly)
        *loops, part = below(sch, loads[side], first_butterfly)
        unroll(sch, [u, t, *loops])
        sch.vectorize(part)
        sch.vectorize(c)
        pad_meetings(sch, radices, meetings, of=side)


def decompose(sch: Schedule, result: Block, thread: Loop, pair: Loop) -> None:
    """Set the sums of a result to 0 before the loop over pairs, and unroll what is inside of it."""
    unroll(sch, below(sch, result, pair)[1:])
    start = sch.decompose_reduction(result, pair)
    unroll(sch, below(sch, start, thread))


def sum_in_registers(sch: Schedule, result: Block, thread: Loop) -> None:
    """Write a result from registers after all turns."""
    written = sch.cache_write(result, 0, "local")
    sch.reverse_compute_at(written, thread)
    unroll(sch, below(sch, written, thread))


def _chains(radices: Sequence[int], side: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return (name, radix) of the stages of a side, there and back."""
    chain = stages(tuple(radices), inverse=True, of=side)
    return chain[: len(radices)], chain[len(radices) :]


def around(sch: Schedule, block: Block, loop: Loop) -> Loop:
    """Return the loop directly around one of a block's loops."""
    return sch.get_loops(block)[-len(below(sch, block, loop)) - 2]
