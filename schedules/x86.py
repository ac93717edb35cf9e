"""Schedules for x86 CPUs: what the CPUs share (`cpu.py`), with the tile sizes that AVX2 and AVX-512 like."""

from __future__ import annotations

from dataclasses import replace

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import cpu
from rpe_tvm.schedules.cpu import Choices

features = cpu.features
direct_weights = cpu.direct_weights
fft_weights = cpu.fft_weights


def default_choices(config: AttentionConfig) -> Choices:
    """Return the fixed decisions of the default schedule: accumulators for 32 vector registers, or for 16."""
    if config.lanes == 16:
        return Choices(row_block=4, score_rows=4, score_vectors=4)
    return Choices(row_block=2, score_rows=4, score_vectors=2)


def attention(sch: Schedule, config: AttentionConfig) -> None:
    """Apply the default schedule of the attention function; it needs no tuned record."""
    schedule_attention(sch, config, default_choices(config))


def schedule_attention(sch: Schedule, config: AttentionConfig, choices: Choices) -> None:
    """Apply the schedule of the config's algorithm with these decisions."""
    if config.algorithm == "direct":
        cpu.direct_attention(sch, config, choices)
    else:
        cpu.fft_attention(sch, config, choices)


def attention_space(sch: Schedule, config: AttentionConfig) -> list[Schedule]:
    """Return the design spaces of the attention function for MetaSchedule, tile sizes as `sample_*` decisions."""
    default = replace(default_choices(config), sampled=True)
    if config.algorithm == "fft":
        alternatives = [default, replace(default, pad=False)]
    else:
        alternatives = [replace(default, score_vectors=vectors) for vectors in (1, 2, 4)]
    spaces = []
    for choices in alternatives:
        space = sch.copy()
        schedule_attention(space, config, choices)
        spaces.append(space)
    return spaces
