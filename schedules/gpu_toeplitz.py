"""Schedules of `te.gpu_toeplitz`, shared by GPUs: as those of attention, with both parities' sums in registers."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.schedules.gpu import Loop, below, bind_grid, meet, pad_meetings, place, stages, unroll


def product(sch: Schedule, config: GpuToeplitzConfig) -> None:
    """Schedule `te.gpu_toeplitz.product`: a block of threads for each (batch, head, pair)."""
    radices, threads = config.radices, config.threads
    chain = stages(radices, inverse=True)
    meetings = meet(sch, chain)

    sums, out = sch.get_sblock("sums"), sch.get_sblock("out")
    b, h, pair, s, q, c, parity = sch.get_loops(sums)
    # one butterfly of a thread, a loop of one turn, inside of that over parities
    butterfly, thread = sch.split(q, [None, threads])
    sch.reorder(b, h, pair, thread, parity, butterfly, s, c)
    unroll(sch, [butterfly, s, c])
    b, h, i, channel = sch.get_loops(out)
    s, q = sch.split(i, [radices[0], config.row // radices[0]])
    turn, of_thread = sch.split(q, [None, threads])
    of_pair, half = sch.split(channel, [None, 2 if config.head_dim % 2 else 1])
    sch.reorder(b, h, of_pair, of_thread, turn, s, half)
    unroll(sch, [turn, s, half])
    sch.merge(thread, of_thread)
    b, h, pair, thread, *_ = sch.get_loops(out)
    bind_grid(sch, b, h, pair)
    sch.bind(thread, "threadIdx.x")
    sch.set_scope(sums, 0, "local")

    place(sch, chain, meetings, parity, butterfly, threads)
    pad_meetings(sch, radices, meetings)
    _pack_in_shared(sch, config, pair)
    start = sch.decompose_reduction(sums, parity)
    unroll(sch, below(sch, start, thread))


def _pack_in_shared(sch: Schedule, config: GpuToeplitzConfig, loop: Loop) -> None:
    packed = sch.get_sblock("packed_x")
    sch.set_scope(packed, 0, "shared.dyn")
    sch.compute_at(packed, loop, preserve_unit_loops=True)
    *_, s, q, c = sch.get_loops(packed)
    sch.reorder(q, s, c)
    _, lane = sch.split(q, [None, config.threads])
    sch.bind(lane, "threadIdx.x")
    unroll(sch, [s, c])
    read_pairs(sch, "x", s)


def read_pairs(sch: Schedule, name: str, loop: Loop) -> None:
    """Read both channels of a pair into registers under `loop`."""
    read = sch.get_sblock(f"read_{name}")
    sch.set_scope(read, 0, "local")
    sch.compute_at(read, loop)
    unroll(sch, below(sch, read, loop))


def correlation(sch: Schedule, config: GpuToeplitzConfig) -> None:
    """Schedule `te.gpu_toeplitz.correlation`: a block of threads for each (batch, head, group of pairs, parity)."""
    b, h, group, parity, k1, *inner = sch.get_loops(sch.get_sblock("sums"))
    bind_grid(sch, b, h, sch.fuse(group, parity, k1))
    for name, first in sum_over_pairs(sch, config, inner).items():
        packed = sch.get_sblock(f"packed_{name}")
        sch.set_scope(packed, 0, "local")
        sch.compute_at(packed, first)
        loops = below(sch, packed, first)
        unroll(sch, loops)
        read_pairs(sch, name, loops[-2])


def sum_over_pairs(sch: Schedule, config: GpuToeplitzConfig, inner: list[Loop]) -> dict[str, Loop]:
    """Schedule the sums of products of both sides' transforms, whose last loops are `inner`, in registers.

    Returns the loop of one butterfly of each side's first stage.
    """
    radices, threads = config.radices, config.threads
    chains = {name: stages(radices, inverse=False, of=f"_{name}_") for name in ("grad", "x")}
    meetings = {name: meet(sch, chain) for name, chain in chains.items()}
    sums = sch.get_sblock("sums")
    t, turn, thread, c, pair = inner
    sch.reorder(thread, pair, turn, t, c)
    sch.bind(thread, "threadIdx.x")
    written = sch.cache_write(sums, 0, "local")
    sch.reverse_compute_at(written, thread)
    *loops, part = below(sch, written, thread)
    unroll(sch, loops)
    sch.vectorize(part)
    first = {name: place(sch, chain, meetings[name], pair, turn, threads) for name, chain in chains.items()}
    for name in chains:
        pad_meetings(sch, radices, meetings[name], of=f"_{name}_")
    unroll(sch, [turn, t, c])
    start = sch.decompose_reduction(sums, pair)
    unroll(sch, below(sch, start, thread))
    return first
