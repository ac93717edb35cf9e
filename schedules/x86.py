"""Schedules for x86 CPUs: the tile sizes that AVX2 and AVX-512 like."""

from __future__ import annotations

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import cpu
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.schedules.cpu_schedules import CpuSchedules


def _direct_choices(config: AttentionConfig) -> Choices:
    """8 to 16 accumulators, in 32 vector registers or in 16."""
    has_avx512 = config.lanes == 16
    vectors = cpu.largest_divisor(-(-config.head_dim // config.lanes), 8 if has_avx512 else 4)
    row_block = {1: 8, 2: 4, 3: 4}.get(vectors, 2)
    if has_avx512:
        return Choices(row_block=row_block, vectors=vectors, score_rows=4, score_vectors=4)
    return Choices(row_block=row_block, vectors=vectors, score_rows=8, score_vectors=1)


# Arrays of 2 MiB, for each thread, fill the cache that threads share.
SCHEDULES = CpuSchedules(_direct_choices, score_vectors=(1, 2, 4), accumulators=16, task_floats=1 << 19)
