"""Schedules shared by GPUs: butterflies in registers, between them shared memory, sums over features in registers."""

from __future__ import annotations

import math
from typing import Any

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu import COMPOSITE, HALF_WARP, GpuAttentionConfig
from rpe_tvm.te.gpu_attention import TILE
from rpe_tvm.te.gpu_features import FeatureSizes

Loop = Any
Block = Any

PAIR = 2  # floats of a complex number
# axes of a stage's result after the leading ones, see `te.gpu_dft`
AHEAD_AXES, BACK_AXES = 5, 4
# positions whose features one block of threads makes, features of each of its threads, and groups of them
POSITIONS, FEATURES, MOST_GROUPS = 64, 8, 4
# channels of a row that a thread keeps in registers
WIDEST_ROW = 128
# threads that divide the outputs of a tile of positions
NORMALISING = 256


def read_index(sch: Schedule, block: Block, name: str) -> int:
    """Return which of a block's reads is the buffer called `name`."""
    return next(i for i, region in enumerate(sch.get(block).reads) if region.source.name == name)


def unroll(sch: Schedule, loops: list[Loop]) -> None:
    for loop in loops:
        sch.unroll(loop)


def below(sch: Schedule, block: Block, loop: Loop) -> list[Loop]:
    """Return the loops of a block inside `loop`."""
    loops = sch.get_loops(block)
    outer = sch.get(loop).loop_var
    inside: list[Loop] = loops[1 + next(i for i, each in enumerate(loops) if sch.get(each).loop_var.same_as(outer)) :]
    return inside


def entry(sch: Schedule, stage: str, radix: int) -> Block:
    """Return the block of a stage that reads the stage before."""
    return sch.get_sblock(f"{stage}_first" if radix in COMPOSITE else stage)


def _in_registers(sch: Schedule, stage: str, radix: int, loop: Loop) -> None:
    """Compute a stage and its first half in registers under `loop`."""
    names = [stage, f"{stage}_first"] if radix in COMPOSITE else [stage]
    for name in names:
        block = sch.get_sblock(name)
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, loop)
        unroll(sch, below(sch, block, loop))


def _through_shared(sch: Schedule, producer: str, consumer: str, radix: int) -> tuple[Block, Block]:
    """Put shared memory between two stages; return the blocks that write to it and that read from it."""
    reader = entry(sch, consumer, radix)
    index = read_index(sch, reader, producer)
    store = sch.cache_read(reader, index, "shared.dyn")
    load = sch.cache_read(reader, index, "local")
    return store, load


def _pad(sch: Schedule, store: Block, axis: int, row: int, width: int) -> None:
    """Pad rows of `row` complex numbers by `width`, so that a half warp that reads several rows meets all banks.

    `axis` counts from the end of the buffer's axes.
    """
    if width < HALF_WARP:
        rank = len(sch.get(store).writes[0].region)
        sch.storage_align(store, 0, rank - axis, PAIR * row, PAIR * width)


def _bind_threads(sch: Schedule, store: Block, axes: int, threads: int) -> Loop:
    """Give the butterflies that a block of loops (..., block, t, rest ..., part) stores to threads.

    `axes` is the number of these last loops. Returns the loop of one butterfly.
    """
    butterfly, t, *rest, part = sch.get_loops(store)[-axes:]
    sch.reorder(butterfly, *rest, t, part)
    _, thread = sch.split(sch.fuse(butterfly, *rest), [None, threads])
    sch.bind(thread, "threadIdx.x")
    sch.unroll(t)
    sch.vectorize(part)
    return thread


def stages(radices: tuple[int, ...], inverse: bool, of: str = "") -> list[tuple[str, int]]:
    """Return (name, radix) of the stages of a forward transform, and of the inverse one where it follows.

    Where a kernel has several, `of` tells them apart.
    """
    ahead = [(f"ahead{of}{k}", radix) for k, radix in enumerate(radices)]
    back = [(f"back{of}{k}", radix) for k, radix in enumerate(reversed(radices))]
    return ahead + back if inverse else ahead


def meet(sch: Schedule, chain: list[tuple[str, int]]) -> dict[str, tuple[Block, Block]]:
    """Put shared memory between neighbouring stages; return its (store, load) blocks by the name of the first.

    Where the spectrum is multiplied, from `ahead` to `back`, one thread has both.
    """
    return {
        producer: _through_shared(sch, producer, consumer, radix)
        for (producer, _), (consumer, radix) in zip(chain, chain[1:], strict=False)
        if consumer != "back0"
    }


def place(
    sch: Schedule,
    chain: list[tuple[str, int]],
    meetings: dict[str, tuple[Block, Block]],
    product: Loop,
    butterfly: Loop,
    threads: int,
) -> Loop:
    """Compute all stages under `product`, one transform of a block of threads; the last one under `butterfly`.

    Returns the loop of one butterfly of the first stage.
    """
    _in_registers(sch, *chain[-1], butterfly)
    for (producer, radix), (consumer, _) in reversed(list(zip(chain, chain[1:], strict=False))):
        if consumer != "back0":
            store, load = meetings[producer]
            sch.compute_at(load, butterfly)
            loops = below(sch, load, butterfly)
            unroll(sch, loops[:-1])
            sch.vectorize(loops[-1])
            sch.compute_at(store, product, preserve_unit_loops=True)
            axes = AHEAD_AXES if producer.startswith("ahead") else BACK_AXES
            butterfly = _bind_threads(sch, store, axes, threads)
        _in_registers(sch, producer, radix, butterfly)
    return butterfly


def pad_meetings(
    sch: Schedule, radices: tuple[int, ...], meetings: dict[str, tuple[Block, Block]], of: str = ""
) -> None:
    size, count = math.prod(radices), len(radices)
    for k, radix in enumerate(radices[:-1]):
        rest = size // radix
        ahead, back = f"ahead{of}{k}", f"back{of}{count - 2 - k}"
        # forward: rows of `rest` numbers that blocks of the next stage read with `rest / next` neighbours each
        if ahead in meetings:
            _pad(sch, meetings[ahead][0], AHEAD_AXES - 1, rest, rest // radices[k + 1])
        if back in meetings:  # the stage that made blocks of `rest` numbers wrote `rest / next` neighbours of each
            _pad(sch, meetings[back][0], BACK_AXES, rest, rest // radices[k + 1])
        size = rest


def _pack_in_shared(sch: Schedule, loop: Loop, threads: int) -> None:
    packed = sch.get_sblock("packed")
    sch.set_scope(packed, 0, "shared.dyn")
    sch.compute_at(packed, loop, preserve_unit_loops=True)
    *_, s, q, c = sch.get_loops(packed)
    sch.reorder(q, s, c)
    _, lane = sch.split(q, [None, threads])
    sch.bind(lane, "threadIdx.x")


def bind_grid(sch: Schedule, *loops: Loop) -> None:
    """Bind loops, outermost first, to an axis of the grid each: a symbolic extent would be divided by in the kernel."""
    for loop, axis in zip(reversed(loops), "xyz", strict=False):
        sch.bind(loop, f"blockIdx.{axis}")


def fft_attention(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_attention.fft_attention`: a block of threads for each (batch, head, pair, remainder)."""
    radices, threads = config.radices, config.threads
    chain = stages(radices, inverse=True)
    meetings = meet(sch, chain)

    partial = sch.get_sblock("partial")
    b, h, pair, residue, fold, s, q, c, feature = sch.get_loops(partial)
    outer, thread = sch.split(q, [None, threads])
    sch.reorder(b, h, pair, residue, thread, feature, outer, fold, s, c)
    block = sch.fuse(pair, residue)
    bind_grid(sch, b, h, block)
    sch.bind(thread, "threadIdx.x")
    result = sch.cache_write(partial, 0, "local")
    sch.reverse_compute_at(result, thread)
    loops = below(sch, result, thread)
    unroll(sch, loops[:-1])
    sch.vectorize(loops[-1])

    place(sch, chain, meetings, feature, outer, threads)
    _pack_in_shared(sch, block, threads)
    pad_meetings(sch, radices, meetings)
    unroll(sch, sch.get_loops(partial)[-4:])
    sch.decompose_reduction(partial, feature)
    unroll(sch, sch.get_loops(sch.get_sblock("partial_init"))[-4:])


def normalise(sch: Schedule) -> None:
    """Schedule `te.gpu_attention.normalise`: a tile of positions turns in shared memory from pairs to rows."""
    b, h, i, channel = sch.get_loops(sch.get_sblock("out"))
    tile, position = sch.split(i, [None, TILE])
    bind_grid(sch, b, h, tile)
    _, thread = sch.split(sch.fuse(position, channel), [None, NORMALISING])
    sch.bind(thread, "threadIdx.x")
    sums = sch.get_sblock("sums")
    sch.set_scope(sums, 0, "shared.dyn")
    sch.compute_at(sums, tile, preserve_unit_loops=True)
    pair, position, c = sch.get_loops(sums)[-3:]
    _, thread = sch.split(sch.fuse(pair, position), [None, NORMALISING])
    sch.bind(thread, "threadIdx.x")
    unroll(sch, [c])
    sch.storage_align(sums, 0, 3, PAIR * TILE, PAIR)


def features(sch: Schedule, config: FeatureSizes, widest_row: int = WIDEST_ROW) -> None:
    """Schedule `te.gpu_features.features`: a thread makes a few features of one position.

    Rows come through shared memory: neighbouring threads read neighbouring numbers of a row there. Rows of up to
    `widest_row` channels are then kept in registers.
    """
    for name in ("q", "k"):
        phi = sch.get_sblock(f"phi_{name}")
        b, h, feature, i = sch.get_loops(phi)
        tile, position = sch.split(i, [None, POSITIONS])
        group, feature = sch.split(feature, [None, FEATURES])
        sch.reorder(b, h, tile, group, position, feature)
        bind_grid(sch, b, h, tile)
        groups = -(-config.num_features // FEATURES)
        _, group = sch.split(group, [None, min(groups, MOST_GROUPS)])
        thread = sch.fuse(group, position)
        sch.bind(thread, "threadIdx.x")
        threads = POSITIONS * min(groups, MOST_GROUPS)

        logits, norm, row = (sch.get_sblock(f"{stage}_{name}") for stage in ("logits", "norm", "row"))
        weights = sch.cache_read(logits, read_index(sch, logits, "projection"), "shared.dyn", [logits])
        unrolled = [phi]
        if config.head_dim <= widest_row:
            of_thread = sch.cache_read(norm, read_index(sch, norm, f"row_{name}"), "local")
            unrolled += [logits, norm, of_thread]
        for block, loop in ((f"scale_{name}", thread), (f"logits_{name}", thread), (f"norm_{name}", thread)):
            stage = sch.get_sblock(block)
            sch.set_scope(stage, 0, "local")
            sch.compute_at(stage, loop)
        *of_features, k = below(sch, logits, thread)
        sch.reorder(k, *of_features)
        if config.head_dim <= widest_row:
            sch.compute_at(of_thread, thread)
        for stage in unrolled:
            unroll(sch, below(sch, stage, thread))
        sch.set_scope(row, 0, "shared.dyn")
        for block in (row, weights):
            sch.compute_at(block, tile, preserve_unit_loops=True)
            _, lane = sch.split(sch.fuse(*sch.get_loops(block)[-2:]), [None, threads])
            sch.bind(lane, "threadIdx.x")
        # an odd stride: threads of a warp read one column
        sch.storage_align(row, 0, 2, 2, 1)


def largest_bias(sch: Schedule) -> None:
    """Schedule `te.gpu_weights.largest_bias`: a block of threads for each head."""
    largest, lanes = sch.get_sblock("largest"), sch.get_sblock("lanes")
    head, lane = sch.get_loops(largest)
    sch.bind(head, "blockIdx.x")
    sch.bind(lane, "threadIdx.x")
    sch.set_scope(lanes, 0, "shared.dyn")
    sch.compute_at(lanes, head, preserve_unit_loops=True)
    sch.bind(sch.get_loops(lanes)[-2], "threadIdx.x")


def spectrum(sch: Schedule, config: GpuAttentionConfig) -> None:
    """Schedule `te.gpu_weights.spectrum`: a block of threads for each (head, parity)."""
    radices, threads = config.radices, config.threads
    chain = stages(radices, inverse=False)
    meetings = meet(sch, chain)
    result = sch.get_sblock("spectrum")
    h, p, t, block, c = sch.get_loops(result)
    outer, thread = sch.split(block, [None, threads])
    sch.reorder(h, p, outer, thread, t, c)
    bind_grid(sch, h, p)
    sch.bind(thread, "threadIdx.x")
    sch.unroll(t)
    sch.vectorize(c)
    place(sch, chain, meetings, p, thread, threads)
    _pack_in_shared(sch, p, threads)
    pad_meetings(sch, radices, meetings)
