"""Schedules for x86 CPUs: the tile sizes that AVX2, with 16 vector registers, and AVX-512, with 32, like."""

from __future__ import annotations

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import cpu
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.schedules.cpu_schedules import CpuSchedules


def _avx512_choices(config: AttentionConfig) -> Choices:
    """16 accumulators, and 16 registers for their operands."""
    vectors = cpu.largest_divisor(-(-config.head_dim // config.lanes), 8)
    return Choices(row_block={1: 8, 2: 4, 3: 4}.get(vectors, 2), vectors=vectors, score_rows=4, score_vectors=4)


def _avx2_choices(config: AttentionConfig) -> Choices:
    """8 to 12 accumulators, and the other registers for their operands.

    Two loads begin in a cycle, as two products do: 8 scores take 6 or 9 loads, 12 take 8.
    """
    rows = config.tile[0]
    row_block = cpu.largest_divisor(rows, {1: 8, 2: 6, 3: 3}.get(config.panel, 2))
    return Choices(row_block=row_block, score_rows=6 if rows % 6 == 0 else 4, score_vectors=2)


def _direct_choices(config: AttentionConfig) -> Choices:
    return (_avx512_choices if config.lanes == 16 else _avx2_choices)(config)


def _accumulators(lanes: int) -> int:
    """Half of the registers."""
    return 16 if lanes == 16 else 8


# Arrays of 2 MiB, for each thread, fill the cache that threads share.
SCHEDULES = CpuSchedules(_direct_choices, score_vectors=(1, 2, 4), accumulators=_accumulators, task_floats=1 << 19)
