"""The frozen configuration of the compiled gradients of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from rpe_tvm.plan import wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig


@dataclass(frozen=True)
class BackwardConfig(AttentionConfig):
    """How the gradients are computed; the fields are those of attention. Only `fft` so far."""

    op: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm != "fft":
            raise ValueError(f"Invalid algorithm of gradients: expected 'fft', got {self.algorithm!r}.")

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"backward-m{self.num_features}-d{self.head_dim}-n{self.length}"

    @property
    def parts(self) -> int:
        """Into how many parts the channels of a head are divided: tasks of their own, each with its own sums."""
        groups = -(-self.head_dim // (2 * self.lanes))
        return 2 if groups % 2 == 0 else 1


def rule(target_id: str, length: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of a bucket from operation counts alone; arguments as of `wisdom.rule`."""
    fft = wisdom.fft_config(num_features, head_dim, length, wisdom.fft_lanes(target_id, lanes))
    return BackwardConfig(num_features, head_dim, fft.length, "fft", fft.outer, fft.inner, lanes=fft.lanes)


def choose(target_id: str, n: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients for up to `n` positions: what was measured for its bucket, else the rule's.

    Arguments are as of `wisdom.choose`.
    """
    length = bucket_length(n)
    for measured in wisdom.records(target_id, BackwardConfig):
        config = measured.config
        if (config.length, config.num_features, config.head_dim) == (length, num_features, head_dim):
            return cast(BackwardConfig, config)
    return rule(target_id, length, num_features, head_dim, lanes)
