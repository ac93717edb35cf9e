"""Schedules shared by GPUs: butterflies in registers, stages that meet in shared memory, sums over features in registers."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu import COMPOSITE, FLOAT_BYTES, HALF_WARP, GpuAttentionConfig

Loop = Any
Block = Any

PAIR = 2  # floats of a complex number
LEAD = 5  # axes of a stage before its own: batch, head, pair of channels, parity, feature


def _read_index(sch: Schedule, block: Block, source: str) -> int:
    """Return which of a block's reads is the buffer that another block writes."""
    buffer = sch.get(sch.get_sblock(source)).writes[0].source
    return next(i for i, region in enumerate(sch.get(block).reads) if region.source.same_as(buffer))


def _unroll(sch: Schedule, loops: list[Loop]) -> None:
    for loop in loops:
        sch.unroll(loop)


def _below(sch: Schedule, block: Block, loop: Loop) -> list[Loop]:
    """Return the loops of a block inside `loop`."""
    loops = sch.get_loops(block)
    outer = sch.get(loop).loop_var
    return loops[1 + next(i for i, each in enumerate(loops) if sch.get(each).loop_var.same_as(outer)) :]


def _entry(sch: Schedule, stage: str, radix: int) -> Block:
    """Return the block of a stage that reads the stage before."""
    return sch.get_sblock(f"{stage}_first" if radix in COMPOSITE else stage)


def _in_registers(sch: Schedule, stage: str, radix: int, loop: Loop) -> None:
    """Compute a stage and its first half in registers under `loop`."""
    names = [stage, f"{stage}_first"] if radix in COMPOSITE else [stage]
    for name in names:
        block = sch.get_sblock(name)
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, loop)
        _unroll(sch, _below(sch, block, loop))


def _through_shared(sch: Schedule, producer: str, consumer: str, radix: int) -> tuple[Block, Block]:
    """Put shared memory between two stages; return the blocks that write to it and that read from it."""
    reader = _entry(sch, consumer, radix)
    index = _read_index(sch, reader, producer)
    store = sch.cache_read(reader, index, "shared.dyn")
    load = sch.cache_read(reader, index, "local")
    return store, load


def _pad(sch: Schedule, store: Block, axis: int, row: int, width: int) -> None:
    """Pad rows of `row` complex numbers by `width`, so that a half warp that reads several rows meets all banks."""
    if width < HALF_WARP:
        sch.storage_align(store, 0, LEAD + axis, PAIR * row, PAIR * width)


def _bind_threads(sch: Schedule, store: Block, threads: int) -> Loop:
    """Give the butterflies that a block of loops (LEAD, block, t, rest ..., part) stores to threads.

    Returns the loop of one butterfly.
    """
    axes = len(sch.get(store).writes[0].region) - LEAD
    butterfly, t, *rest, part = sch.get_loops(store)[-axes:]
    sch.reorder(butterfly, *rest, t, part)
    _, thread = sch.split(sch.fuse(butterfly, *rest), [None, threads])
    sch.bind(thread, "threadIdx.x")
    sch.unroll(t)
    sch.vectorize(part)
    return thread


def fft_attention(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_attention.fft_attention`: a block of threads for each (batch, head, pair, parity)."""
    radices, threads = config.radices, config.threads
    count = len(radices)
    ahead = [f"ahead{k}" for k in range(count)]
    back = [f"back{k}" for k in range(count)]
    stages = list(zip(ahead, radices, strict=True)) + list(zip(back, reversed(radices), strict=True))

    # memory between neighbouring stages, except where the spectrum is multiplied: there one thread has both
    meetings: dict[str, tuple[Block, Block]] = {}
    for (producer, _), (consumer, radix) in zip(stages, stages[1:], strict=False):
        if consumer != back[0]:
            meetings[producer] = _through_shared(sch, producer, consumer, radix)

    partial = sch.get_sblock("partial")
    b, h, pair, p, s, q, c, feature = sch.get_loops(partial)
    outer, thread = sch.split(q, [None, threads])
    sch.reorder(b, h, pair, p, thread, feature, outer, s, c)
    block = sch.fuse(pair, p)
    # an axis of the grid each: a symbolic number of heads would be divided by in the kernel
    for loop, axis in ((b, "z"), (h, "y"), (block, "x")):
        sch.bind(loop, f"blockIdx.{axis}")
    sch.bind(thread, "threadIdx.x")
    result = sch.cache_write(partial, 0, "local")
    sch.reverse_compute_at(result, thread)
    _unroll(sch, _below(sch, result, thread)[:-1])
    sch.vectorize(sch.get_loops(result)[-1])

    # from the last stage to the first, each under the loop of the threads that take its result
    _in_registers(sch, back[-1], radices[0], outer)
    at = outer
    for (producer, radix), (consumer, _) in reversed(list(zip(stages, stages[1:], strict=False))):
        if consumer == back[0]:
            _in_registers(sch, producer, radix, at)
            continue
        store, load = meetings[producer]
        sch.compute_at(load, at)
        loops = _below(sch, load, at)
        _unroll(sch, loops[:-1])
        sch.vectorize(loops[-1])
        sch.compute_at(store, feature, preserve_unit_loops=True)
        at = _bind_threads(sch, store, threads)
        _in_registers(sch, producer, radix, at)

    packed = sch.get_sblock("packed")
    sch.set_scope(packed, 0, "shared.dyn")
    sch.compute_at(packed, block, preserve_unit_loops=True)
    *_, s, q, c = sch.get_loops(packed)
    sch.reorder(q, s, c)
    _, lane = sch.split(q, [None, threads])
    sch.bind(lane, "threadIdx.x")

    size = config.length
    for k, radix in enumerate(radices[:-1]):
        rest = size // radix
        # forward: rows of `rest` numbers that blocks of the next stage read with `rest / next` neighbours each
        _pad(sch, meetings[ahead[k]][0], 1, rest, rest // radices[k + 1])
        # inverse: the stage that made blocks of `rest` numbers wrote `rest / next` neighbours of each
        _pad(sch, meetings[back[count - 2 - k]][0], 0, rest, rest // radices[k + 1])
        size = rest
    _unroll(sch, sch.get_loops(partial)[-3:])
    sch.decompose_reduction(partial, feature)
    initial = sch.get_sblock("partial_init")
    _unroll(sch, sch.get_loops(initial)[-3:])
