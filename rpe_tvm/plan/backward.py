"""The frozen configuration of the compiled gradients of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from rpe_tvm.plan import wisdom
from rpe_tvm.plan.buckets import bucket_length, neighbours
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK


@dataclass(frozen=True)
class BackwardConfig(AttentionConfig):
    """How the gradients are computed; the fields are those of attention.

    The keys of a tile of `direct` are divided among `parts` tasks.
    """

    op: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm == "direct":
            rows, columns = self.tile
            if BLOCK % rows or rows % self.lanes or columns % (self.parts * self.lanes):
                raise ValueError(
                    f"Invalid tile of gradients: expected a multiple of {self.lanes} that divides {BLOCK} and a "
                    f"multiple of {self.parts * self.lanes}, got {self.tile}."
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


# Time of log2(n) m d butterflies for a position by FFT, in multiplications of tiles: measured on znver4.
_FFT_COST = 43.0
# Short sequences are always computed by tiles, row by row: small denominators keep their digits.
_SHORTEST_FFT, _LONGEST_DIRECT = 256, 4096


def longest_direct(num_features: int, head_dim: int) -> int:
    """Return the longest bucket whose gradients are faster by tiles than by FFT, from operation counts."""
    pair, position = 2 * (4 * num_features + 2 * head_dim), _FFT_COST * num_features * head_dim
    lengths = neighbours(_SHORTEST_FFT, _LONGEST_DIRECT)
    return max(n for n in lengths if n == _SHORTEST_FFT or n * pair <= position * math.log2(n))


def direct_config(num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients by tiles, one for all lengths: nothing that is compiled depends on them."""
    length = longest_direct(num_features, head_dim)
    return BackwardConfig(num_features, head_dim, length, "direct", tile=(64, 128), lanes=lanes)


def fft_rule(target_id: str, length: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients of a bucket by FFT from operation counts alone; arguments as of `choose`."""
    lanes, largest = wisdom.fft_lanes(target_id, lanes), wisdom.largest_radix(target_id)
    fft = wisdom.fft_config(num_features, head_dim, length, lanes, largest)
    return BackwardConfig(num_features, head_dim, fft.length, "fft", fft.outer, fft.inner, lanes=fft.lanes)


def fft_config(target_id: str, n: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients by FFT: what was measured for the bucket, else the rule's."""
    length = bucket_length(n)
    for measured in wisdom.records(target_id, BackwardConfig):
        config = measured.config
        if (config.length, config.num_features, config.head_dim) == (length, num_features, head_dim):
            return cast(BackwardConfig, config)
    return fft_rule(target_id, length, num_features, head_dim, lanes)


def choose(target_id: str, n: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients for up to `n` positions; arguments as of `wisdom.choose`."""
    if n <= longest_direct(num_features, head_dim):
        return direct_config(num_features, head_dim, lanes)
    return fft_config(target_id, n, num_features, head_dim, lanes)
