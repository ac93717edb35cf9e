"""Configs worth measuring for one length, features and head dimension."""

from __future__ import annotations

from rpe_tvm.build.workloads import TUNED
from rpe_tvm.plan import backward, wisdom
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import RADICES, AttentionConfig
from rpe_tvm.targets import TargetSpec

# beyond these lengths one algorithm has lost by far on every CPU that was measured
DIRECT_LONGEST, FFT_SHORTEST = 3072, 512
TILES = ((64, 64), (128, 64), (64, 128), (32, 64), (48, 64), (54, 64), (96, 64))


def rule(op: str, target: TargetSpec, length: int, num_features: int, head_dim: int) -> AttentionConfig:
    """Return what the plan takes where nothing was measured."""
    find = backward.fft_rule if op == BackwardConfig.op else wisdom.rule
    return find(target.id, length, num_features, head_dim, target.lanes)


def is_tuned(op: str, target: TargetSpec, length: int, num_features: int, head_dim: int) -> bool:
    """Return whether an operator of this length looks for a record: gradients by tiles do not."""
    return op == AttentionConfig.op or length > backward.longest_direct(target.id, num_features, head_dim, target.lanes)


def candidates(op: str, target: TargetSpec, length: int, num_features: int, head_dim: int) -> list[AttentionConfig]:
    """Return direct configs with several tiles and fft configs with several factorisations and lane counts.

    Of the gradients only those by FFT are tuned.
    """
    found: list[AttentionConfig] = []
    if length <= DIRECT_LONGEST and op == AttentionConfig.op:
        lanes = target.lanes
        found += [AttentionConfig(num_features, head_dim, length, "direct", tile=tile, lanes=lanes) for tile in TILES]
    if length >= FFT_SHORTEST:
        # where butterflies of 8 points spill, they still take fewer walks over memory
        largest = (wisdom.largest_radix(target.id, target.lanes), max(RADICES))
        halves = dict.fromkeys(pair for each in largest for pair in wisdom.factorisations(length, 3, each))
        for lanes in sorted({8, target.lanes}):
            if head_dim % (2 * lanes):
                continue
            for outer, inner in halves:
                found.append(TUNED[op](num_features, head_dim, length, "fft", outer, inner, lanes=lanes))
    default = rule(op, target, length, num_features, head_dim)
    return found if default in found else [default, *found]
