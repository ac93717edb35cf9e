"""Schedules for x86 CPUs: what the CPUs share (`cpu.py`), with the tile sizes that AVX2 and AVX-512 like."""

from __future__ import annotations

from dataclasses import replace

from tvm.s_tir import Schedule

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.schedules import (
    cpu,
    cpu_backward,
    cpu_denominator_backward,
    cpu_direct_backward,
    cpu_features_backward,
    cpu_toeplitz,
)
from rpe_tvm.schedules.cpu import Choices

features = cpu.features
direct_weights = cpu.direct_weights
fft_weights = cpu.fft_weights
features_backward = cpu_features_backward.features_backward
fft_row_weights = cpu_denominator_backward.fft_row_weights
fft_denominator_backward = cpu_denominator_backward.fft_denominator_backward
plain_weights = cpu.spectrum
toeplitz_correlation = cpu_toeplitz.toeplitz_correlation


def default_choices(config: AttentionConfig) -> Choices:
    """Return the fixed decisions of the default schedule.

    `direct`: 8 to 16 accumulators, in 32 vector registers or in 16. `fft`: arrays of one product past 2 MiB fill the
    shared cache when every thread has its own.
    """
    if config.algorithm == "fft":
        return Choices(cooperative=config.length * 2 * config.lanes > 1 << 19)
    has_avx512 = config.lanes == 16
    vectors = cpu.largest_divisor(-(-config.head_dim // config.lanes), 8 if has_avx512 else 4)
    row_block = {1: 8, 2: 4, 3: 4}.get(vectors, 2)
    if has_avx512:
        return Choices(row_block=row_block, vectors=vectors, score_rows=4, score_vectors=4)
    return Choices(row_block=row_block, vectors=vectors, score_rows=8, score_vectors=1)


def default(sch: Schedule, config: AttentionConfig) -> None:
    """Apply the default schedule of the tuned function of an operator; it needs no record."""
    schedule(sch, config, default_choices(config))


def schedule(sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
    """Apply the schedule of the config's operator and algorithm with these decisions."""
    if isinstance(config, BackwardConfig):
        is_direct = config.algorithm == "direct"
        (cpu_direct_backward.direct_backward if is_direct else cpu_backward.fft_backward)(sch, config, choices)
    elif config.algorithm == "direct":
        cpu.direct_attention(sch, config, choices)
    else:
        cpu.fft_attention(sch, config, choices)


def space(sch: Schedule, config: AttentionConfig) -> list[Schedule]:
    """Return the design spaces of the tuned function for MetaSchedule, tile sizes as `sample_*` decisions."""
    sampled = replace(default_choices(config), sampled=True)
    if config.algorithm == "fft":
        alternatives = [sampled, replace(sampled, pad=False)]
    else:
        alternatives = [replace(sampled, score_vectors=vectors) for vectors in (1, 2, 4)]
    spaces = []
    for choices in alternatives:
        found = sch.copy()
        schedule(found, config, choices)
        spaces.append(found)
    return spaces


def toeplitz_matmul(sch: Schedule, config: ToeplitzConfig) -> None:
    """Apply the schedule of the Toeplitz product; arrays past 2 MiB are shared by all threads, as for `fft`."""
    cpu_toeplitz.toeplitz_matmul(sch, config, cooperative=config.length * 2 * config.lanes > 1 << 19)


def direct_denominator(sch: Schedule, config: BackwardConfig) -> None:
    """Apply the schedule of the denominators by tiles."""
    cpu_direct_backward.direct_denominator(sch, config, default_choices(config))
