"""Schedules shared by CPUs (x86 and ARM): loop nests for caches and vector lanes.

Every schedule is a function of a `Schedule`, an `AttentionConfig` and `Choices`. With `Choices.sampled` the tile sizes
become `sample_*` decisions for MetaSchedule; otherwise they are the fixed numbers of a default schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import Factorised, split_of
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te.dft import COMPOSITE

Loop = Any
Block = Any


@dataclass(frozen=True)
class Choices:
    """Decisions of a schedule.

    Parameters
    ----------
    sampled : bool
        Let MetaSchedule decide the tile sizes: `feature_block`, `columns`, `rows`, `row_block` and `score_rows` are
        then ignored.
    pad : bool
        Pad the rows of the arrays between the halves of the four-step split, so that a walk along a column does
        not fall on one cache set.
    cooperative : bool
        Only `fft`: all threads work on one product (`cpu_parts`), where one for each would not fit into a shared cache.
    feature_block : int
        Features that are transformed in one pass over value and output.
    columns, rows : int
        Neighbouring columns (rows) of the four-step split that one pass transforms.
    row_block : int
        Only `direct`: queries whose output rows are summed in registers.
    vectors : int
        Only `direct` without panels: vectors of channels of each of those rows that are summed in registers; divides
        their number. With panels it is `AttentionConfig.panel`.
    score_rows, score_vectors : int
        Only `direct`: queries, and vectors of keys, whose scores are summed in registers.
    """

    sampled: bool = False
    pad: bool = True
    cooperative: bool = False
    feature_block: int = 1
    columns: int = 1
    rows: int = 1
    row_block: int = 4
    vectors: int = 1
    score_rows: int = 4
    score_vectors: int = 4


def tiled(sch: Schedule, loop: Loop, inner: int, choices: Choices, largest: int) -> tuple[Loop, Loop]:
    """Split a loop in two by a sampled or a fixed factor."""
    fixed = [None, inner]
    factors = sch.sample_perfect_tile(loop, n=2, max_innermost_factor=largest) if choices.sampled else fixed
    outer, tile = sch.split(loop, factors)
    return outer, tile


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor up to a limit."""
    return max(k for k in range(1, limit + 1) if number % k == 0)


def at_consumer(sch: Schedule, block: Block, loop: Loop) -> None:
    # unit loops are kept so that loops can be counted from the end whatever the sizes are
    sch.compute_at(block, loop, preserve_unit_loops=True)


def vectorize(sch: Schedule, block: Block, unrolled: int) -> None:
    """Vectorise the innermost loop and unroll the next ones."""
    *_, lane = loops = sch.get_loops(block)
    sch.vectorize(lane)
    for loop in loops[-1 - unrolled : -1]:
        sch.unroll(loop)


@dataclass(frozen=True)
class Stage:
    """A DFT stage: loops (..., batch, blocks, q, radix, part, lane), and `<name>_first` for a composite radix."""

    name: str
    radix: int


def transform(name: str, radices: tuple[int, ...]) -> list[Stage]:
    return [Stage(f"{name}{number}", radix) for number, radix in enumerate(radices)]


def place(sch: Schedule, stage: Stage, loop: Loop, preserve_unit_loops: bool = True) -> Block:
    """Compute a stage under `loop`, its butterflies unrolled over vectors of lanes."""
    block = sch.get_sblock(stage.name)
    sch.compute_at(block, loop, preserve_unit_loops=preserve_unit_loops)
    if stage.radix in COMPOSITE:
        first = sch.get_sblock(f"{stage.name}_first")
        at_consumer(sch, first, sch.get_loops(block)[-4])
        vectorize(sch, first, unrolled=3)
    vectorize(sch, block, unrolled=2)
    return block


def place_rows(sch: Schedule, rows: list[Stage], back_rows: list[Stage], loop: Loop, choices: Choices) -> Block:
    """Place the stages of rows there and back under `loop`, a few rows at a time; returns the last of them."""
    last = place(sch, back_rows[-1], loop)
    few_rows, _ = tiled(sch, sch.get_loops(last)[-6], choices.rows, choices, largest=4)
    for stage in reversed(back_rows[:-1]):
        place(sch, stage, few_rows)
    # the last forward and the first inverse stage of a row work on the same points: both stay in registers
    first_back = sch.get_sblock(back_rows[0].name)
    place(sch, rows[-1], sch.get_loops(first_back)[-5])
    for stage in reversed(rows[:-1]):
        place(sch, stage, few_rows)
    return last


def pad_rows(sch: Schedule, config: AttentionConfig, block: Block, points: int) -> None:
    """Pad the rows of what the last stage of columns or rows writes, so that walks across them use all cache sets."""
    line = 2 * config.lanes
    axis = len(sch.get(block).writes[0].region) - 6
    sch.storage_align(block, 0, axis, points * line, line)


def schedule_scores(sch: Schedule, config: AttentionConfig, choices: Choices, loop: Loop) -> None:
    """Compute weighted scores of tiles under `loop`, those of a few queries and vectors of keys in registers."""
    weighted = sch.get_sblock("weighted")
    at_consumer(sch, weighted, loop)
    i, j = sch.get_loops(weighted)[-2:]
    i_outer, i_inner = tiled(sch, i, choices.score_rows, choices, largest=8)
    j_outer, j_inner = sch.split(j, [None, choices.score_vectors * config.lanes])
    sch.reorder(j_outer, i_outer, i_inner, j_inner)
    scores = sch.get_sblock("scores")
    at_consumer(sch, scores, i_outer)
    i, j, feature = sch.get_loops(scores)[-3:]
    j_vector, j_lane = sch.split(j, [None, config.lanes])
    sch.reorder(feature, i, j_vector, j_lane)
    vectorize(sch, scores, unrolled=2)
    vectorize(sch, sch.decompose_reduction(scores, feature), unrolled=2)
    j_vector, j_lane = sch.split(j_inner, [None, config.lanes])
    vectorize(sch, weighted, unrolled=2)


def query_tiles(sch: Schedule, config: AttentionConfig) -> Loop:
    """Make the output parallel over (batch, head, query tile); returns that loop."""
    b, h, i, channel = sch.get_loops(sch.get_sblock("out"))
    tile, _ = sch.split(i, [None, config.tile[0]])
    task = sch.fuse(b, h, tile)
    sch.parallel(task)
    sch.vectorize(sch.split(channel, [None, config.lanes])[1])
    return task


def direct_attention(sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
    """Schedule `te.direct_attention`: parallel over (batch, head, query tile), one tile of keys after the other."""
    task = query_tiles(sch, config)
    at_consumer(sch, sch.get_sblock("denominator"), task)

    sums = sch.get_sblock("sums")
    at_consumer(sch, sums, task)
    row, vector, lane, block = sch.get_loops(sums)[-4:]
    # a tile of values serves all query rows of the tile, a buffer of weighted scores 64 of them
    score_tile, row = sch.split(row, [None, largest_divisor(config.tile[0], 64)])
    rows_outer, rows_inner = tiled(sch, row, choices.row_block, choices, largest=8)
    sch.reorder(block, score_tile, rows_outer, rows_inner, vector, lane)
    for name in ("row_sum", "product"):
        at_consumer(sch, sch.get_sblock(name), rows_outer)
    at_consumer(sch, sch.get_sblock("packed_value"), block)

    schedule_scores(sch, config, choices, score_tile)

    product = sch.get_sblock("product")
    i, vector, lane, j = sch.get_loops(product)[-4:]
    vector_outer, vector = sch.split(vector, [None, choices.vectors])
    sch.reorder(vector_outer, j, i, vector, lane)
    vectorize(sch, product, unrolled=2)
    vectorize(sch, sch.decompose_reduction(product, j), unrolled=2)
    row_sum = sch.get_sblock("row_sum")
    i, lane, part = sch.get_loops(row_sum)[-3:]
    sch.reorder(part, i, lane)
    vectorize(sch, row_sum, unrolled=1)
    vectorize(sch, sch.decompose_reduction(row_sum, part), unrolled=1)
    vectorize(sch, sch.get_sblock("packed_value"), unrolled=1)
    vectorize(sch, sums, unrolled=2)
    vectorize(sch, sch.decompose_reduction(sums, block), unrolled=0)


def features(sch: Schedule, config: AttentionConfig, accumulators: int) -> None:
    """Schedule `te.features`: parallel over about 64 positions, whose features are transposed in L1.

    Parameters
    ----------
    accumulators : int
        Vector registers in which logits are summed.
    """
    phi = sch.get_sblock("phi")
    b, h, feature, row, column = sch.get_loops(phi)
    tile = (1, BLOCK)
    if config.algorithm == "fft":
        # neighbouring rows of the buffer are neighbouring positions, 16 columns fill a cache line
        split = split_of(config)
        columns = largest_divisor(split.n1, 16)
        tile = (largest_divisor(split.n2, BLOCK // columns), columns)
    row_outer, row = sch.split(row, [None, tile[0]])
    column_outer, column = sch.split(column, [None, tile[1]])
    sch.reorder(b, h, row_outer, column_outer, feature, row, column)
    task = sch.fuse(b, h, row_outer, column_outer)
    sch.parallel(task)
    if config.algorithm == "direct":
        # all features of a few positions: which of them exist is known before
        few, lane = sch.split(column, [None, config.lanes])
        sch.reorder(few, feature, lane)
        sch.vectorize(lane)

    # each step for all positions of the task: a position's own chain, from its norm to its exponentials, is long
    activated = sch.get_sblock("activated")
    at_consumer(sch, activated, task)
    vectorize(sch, activated, unrolled=0)
    scale, norm, squares = (sch.get_sblock(name) for name in ("scale", "norm", "squares"))
    at_consumer(sch, scale, task)
    at_consumer(sch, norm, task)
    at_consumer(sch, squares, sch.get_loops(norm)[-2])
    i, lane, part = sch.get_loops(squares)[-3:]
    sch.reorder(part, i, lane)
    vectorize(sch, squares, unrolled=1)
    vectorize(sch, sch.decompose_reduction(squares, part), unrolled=1)

    logits = sch.get_sblock("logits")
    at_consumer(sch, logits, task)
    vectors_inner = largest_divisor(-(-config.num_features // config.lanes), 8)
    i, vector, lane, k = sch.get_loops(logits)[-4:]
    i_outer, i = sch.split(i, [None, largest_divisor(tile[1], min(8, accumulators // vectors_inner))])
    vector_outer, vector = sch.split(vector, [None, vectors_inner])
    sch.reorder(i_outer, vector_outer, k, i, vector, lane)
    vectorize(sch, logits, unrolled=2)
    vectorize(sch, sch.decompose_reduction(logits, k), unrolled=2)


def direct_weights(sch: Schedule, config: AttentionConfig) -> None:
    """Schedule `te.direct_weights`: parallel over heads."""
    for name in ("largest", "table"):
        sch.parallel(sch.get_loops(sch.get_sblock(name))[0])


def fft_weights(sch: Schedule, config: AttentionConfig) -> None:
    """Schedule `te.fft_weights`."""
    sch.parallel(sch.get_loops(sch.get_sblock("largest"))[0])
    spectrum(sch, config)


def spectrum(sch: Schedule, config: Factorised) -> None:
    """Schedule the spectrum of `te.weights`: parallel over (head, parity), the columns of the split as lanes."""
    folded = sch.get_sblock("folded")
    h, sign, _ = sch.get_loops(folded)
    sch.parallel(sch.fuse(h, sign))
    h, p, *_ = sch.get_loops(sch.get_sblock("spectrum"))
    task = sch.fuse(h, p)
    sch.parallel(task)
    stages = transform("spectrum_columns", config.outer) + transform("spectrum_rows", config.inner)
    for stage in reversed(stages):
        block = sch.get_sblock(stage.name)
        at_consumer(sch, block, task)
        *_, blocks, q, radix, part, position = sch.get_loops(block)
        outer, lane = sch.split(position, [None, config.lanes])
        sch.reorder(blocks, q, outer, radix, part, lane)
        if stage.radix in COMPOSITE:
            first = sch.get_sblock(f"{stage.name}_first")
            at_consumer(sch, first, outer)
            vectorize(sch, first, unrolled=3)
        vectorize(sch, block, unrolled=2)
