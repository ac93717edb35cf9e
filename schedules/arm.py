"""Schedules for ARM CPUs with NEON: 4 lanes, 32 vector registers on aarch64 and 16 on armv7.

Nothing here was measured on a board. Register blocks are those whose inner loops do not spill
(`tests/schedules/test_arm_code.py`); cache sizes are those of common boards.
"""

from __future__ import annotations

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import cpu
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.schedules.cpu_schedules import CpuSchedules

# Arrays of 256 KiB for each of four threads fill 1 MiB, the L2 of a Cortex-A72 with four cores.
_TASK_FLOATS = 1 << 16


def _aarch64_choices(config: AttentionConfig) -> Choices:
    """16 accumulators, and 8 registers for their operands."""
    vectors = cpu.largest_divisor(-(-config.head_dim // config.lanes), 4)
    return Choices(row_block={1: 8, 2: 8}.get(vectors, 4), vectors=vectors, score_rows=4, score_vectors=4)


def _armv7_choices(config: AttentionConfig) -> Choices:
    """8 accumulators, and 6 registers for their operands."""
    vectors = cpu.largest_divisor(-(-config.head_dim // config.lanes), 4)
    return Choices(row_block={1: 4, 2: 4}.get(vectors, 2), vectors=vectors, score_rows=4, score_vectors=2)


AARCH64 = CpuSchedules(_aarch64_choices, score_vectors=(1, 2, 4), accumulators=lambda _: 16, task_floats=_TASK_FLOATS)
ARMV7 = CpuSchedules(_armv7_choices, score_vectors=(1, 2), accumulators=lambda _: 8, task_floats=_TASK_FLOATS)
