"""The frozen configuration of the compiled gradients of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rpe_tvm.plan import wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig


@dataclass(frozen=True)
class BackwardConfig(AttentionConfig):
    """How the gradients are computed; the fields are those of attention.

    The keys of a tile of `direct` are divided among `parts` tasks.
    """

    op: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm == "direct" and (
            self.tile[0] % self.lanes or self.tile[1] % (self.parts * self.lanes)
        ):
            raise ValueError(
                f"Invalid tile of gradients: expected multiples of {self.lanes} and {self.parts * self.lanes}, got "
                f"{self.tile}."
            )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"backward-m{self.num_features}-d{self.head_dim}-n{self.length}"

    @property
    def parts(self) -> int:
        """Into how many parts a head is divided: tasks of their own, each with its own sums.

        `fft` divides the channels, `direct` the keys of each tile.
        """
        if self.algorithm == "direct":
            return 2
        groups = -(-self.head_dim // (2 * self.lanes))
        return 2 if groups % 2 == 0 else 1


# Up to this bucket gradients by tiles are the fastest.
LONGEST_DIRECT = 1024


def direct_config(num_features: int, head_dim: int, length: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients by tiles."""
    return BackwardConfig(num_features, head_dim, length, "direct", tile=(64, 128), lanes=lanes)


def fft_config(target_id: str, num_features: int, head_dim: int, length: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients by FFT."""
    fft = wisdom.fft_config(num_features, head_dim, length, wisdom.fft_lanes(target_id, lanes))
    return BackwardConfig(num_features, head_dim, fft.length, "fft", fft.outer, fft.inner, lanes=fft.lanes)


def choose(target_id: str, n: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients for up to `n` positions; arguments as of `wisdom.choose`."""
    length = bucket_length(n)
    if length <= LONGEST_DIRECT:
        return direct_config(num_features, head_dim, length, lanes)
    return fft_config(target_id, num_features, head_dim, length, lanes)
