"""The frozen configuration of attention by FFT on a GPU, and its constant tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import fields_from_json, fields_to_json
from rpe_tvm.plan.twiddles import stage_sizes

# Radices of one stage, whose butterfly a thread keeps in registers, and the two factors that a composite one is made of.
COMPOSITE: dict[int, tuple[int, int]] = {
    6: (2, 3),
    8: (2, 4),
    10: (2, 5),
    12: (3, 4),
    15: (3, 5),
    16: (4, 4),
    20: (4, 5),
}
RADICES = (2, 3, 4, 5, *COMPOSITE)

FLOAT_BYTES = 4
# threads of a warp that one phase of an 8-byte access to shared memory serves
HALF_WARP = 16


@dataclass(frozen=True)
class GpuAttentionConfig:
    """What one compiled attention operator computes on a GPU, and how.

    Parameters
    ----------
    num_features : int
        Features m of the feature map.
    head_dim : int
        Channels d of query, key and value of a head.
    length : int
        Bucket length P: the operator serves every n up to it.
    radices : tuple of int
        Radices of the forward transform of P points, P = prod(radices).
    threads : int
        Threads of the block that transforms one pair of channels.
    dtype : {"float32", "bfloat16", "float16"}
        Of query, key, value and out; all sums are float32.
    """

    num_features: int
    head_dim: int
    length: int
    radices: tuple[int, ...]
    threads: int
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    op: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "length", "threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        if math.prod(self.radices) != self.length or len(self.radices) < 2:
            raise ValueError(
                f"Invalid radices: expected two or more whose product is {self.length}, got {self.radices}."
            )
        if not set(self.radices) <= set(RADICES):
            raise ValueError(f"Invalid radix: expected radices of {RADICES}, got {self.radices}.")

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket and dtype."""
        return f"attention-m{self.num_features}-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def description(self) -> str:
        """One short word for tables: the algorithm with its factorisation."""
        return f"fft {'.'.join(map(str, self.radices))}"

    @property
    def pairs(self) -> int:
        """Pairs of channels that ride in one complex number; channel d is constant 1 and gives the denominators."""
        return self.head_dim // 2 + 1

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GpuAttentionConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))


@dataclass(frozen=True)
class TableLayout:
    """Where each table starts in the flat float32 array of tables; all are complex, stored as pairs.

    Parameters
    ----------
    stages : dict
        (size, radix) of a stage -> start of its twiddles, `[radix, size / radix]`: neighbouring threads read
        neighbouring numbers.
    parity : int
        exp(-i pi j / P) for j < P: turns a skew-circulant product into a circulant one.
    size : int
        Length of the whole array.
    """

    stages: dict[tuple[int, int], int]
    parity: int
    size: int


def layout(config: GpuAttentionConfig) -> TableLayout:
    """Return the layout of the tables of a config."""
    stages: dict[tuple[int, int], int] = {}
    start = 0
    for size, radix in stage_sizes(config.radices):
        if size > radix:
            stages[size, radix] = start
            start += 2 * size
    return TableLayout(stages, start, start + 2 * config.length)


def tables(config: GpuAttentionConfig) -> npt.NDArray[np.float32]:
    """Return the constant tables, made in float64 and rounded once, flat, as `layout` says."""
    where = layout(config)
    out = np.empty(where.size, np.float32)
    for (size, radix), start in where.stages.items():
        out[start : start + 2 * size] = _pairs(np.outer(np.arange(radix), np.arange(size // radix)) / size)
    out[where.parity :] = _pairs(np.arange(config.length) / (2 * config.length))
    return out


def _pairs(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return exp(-2 pi i turns) as pairs, flat."""
    values = np.exp(-2j * np.pi * turns)
    return np.stack([values.real, values.imag], -1).astype(np.float32).ravel()


def greedy_radices(length: int) -> tuple[int, ...]:
    """Return few radices of at most 16 whose product is a bucket's length, the odd factor in the first."""
    odd = next((f for f in (5, 3) if length % f == 0), 1)
    rest = length // odd
    first = {1: (), 3: (12,), 5: (10,)}[odd]
    rest = length // math.prod(first)
    radices = list(first)
    while rest > 1:
        # never a last radix of 2 where two radices of 8 do
        radix = 8 if rest in (32, 64, 8) else 4 if rest == 4 else min(16, rest)
        radices.append(radix)
        rest //= radix
    return tuple(radices)


def choose(n: int, num_features: int, head_dim: int, dtype: str = "float32") -> GpuAttentionConfig:
    """Return the config for up to `n` positions."""
    length = bucket_length(n)
    radices = greedy_radices(length)
    threads = max(32, -(-length // max(radices) // 32) * 32)
    return GpuAttentionConfig(num_features, head_dim, length, radices, threads, dtype)  # type: ignore[arg-type]
