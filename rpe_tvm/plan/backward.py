"""The frozen configuration of the compiled gradients of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from rpe_tvm.plan import static_rates, wisdom
from rpe_tvm.plan.buckets import bucket_length, neighbours
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK


@dataclass(frozen=True)
class BackwardConfig(AttentionConfig):
    """How the gradients are computed; the fields are those of attention.

    The queries of a tile of `direct` are divided among `parts` tasks.
    """

    op: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm == "direct":
            rows, columns = self.tile
            of_part = rows // self.parts
            if rows % self.parts or BLOCK % of_part or of_part % self.lanes or columns % self.lanes:
                raise ValueError(
                    f"Invalid tile of gradients: expected {self.parts} times a multiple of {self.lanes} that divides "
                    f"{BLOCK}, and a multiple of {self.lanes}, got {self.tile}."
                )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"backward-m{self.num_features}-d{self.head_dim}-n{self.length}"

    @property
    def parts(self) -> int:
        """Into how many parts a head is divided: tasks of their own, each with its own sums.

        `fft` divides the channels, `direct` the queries of each tile.
        """
        if self.algorithm == "direct":
            return 2
        groups = -(-self.head_dim // (2 * self.lanes))
        return 2 if groups % 2 == 0 else 1


# Time of log2(n) m d butterflies for a position by FFT, in multiplications of tiles: measured on znver4. With the rates
# of the forward pass there it is 3.4 of its passes by FFT.
_FFT_COST, _FORWARD_PASSES = 40.0, 3.4
# Short sequences are always computed by tiles, row by row: small denominators keep their digits.
_SHORTEST_FFT, _LONGEST_DIRECT = 256, 4096


def longest_direct(target_id: str, num_features: int, head_dim: int, lanes: int) -> int:
    """Return the longest bucket whose gradients are faster by tiles than by FFT, as of `wisdom.rule`."""
    pair = 3 * num_features + 2 * head_dim
    rates = static_rates.rates(target_id)

    def is_direct(n: int) -> bool:
        if rates is None:
            return 2 * n * pair <= _FFT_COST * num_features * head_dim * math.log2(n)
        fft = _FORWARD_PASSES * rates.fft(rates.best_halves(n), num_features, head_dim, lanes)
        return n**2 * pair * (rates.score + rates.value) / 2 / lanes <= fft

    lengths = neighbours(_SHORTEST_FFT, _LONGEST_DIRECT)
    return max(n for n in lengths if n == _SHORTEST_FFT or is_direct(n))


def direct_config(target_id: str, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients by tiles, one for all lengths: nothing that is compiled depends on them."""
    length = longest_direct(target_id, num_features, head_dim, lanes)
    return BackwardConfig(num_features, head_dim, length, "direct", tile=(128, 64), lanes=lanes)


def fft_rule(target_id: str, length: int, num_features: int, head_dim: int, lanes: int) -> BackwardConfig:
    """Return the config of the gradients of a bucket by FFT where nothing was measured; arguments as of `choose`."""
    fft = wisdom.fft_config(target_id, num_features, head_dim, length, lanes)
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
    direct = direct_config(target_id, num_features, head_dim, lanes)
    if n <= direct.length:
        return direct
    return fft_config(target_id, n, num_features, head_dim, lanes)
