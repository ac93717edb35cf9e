"""The frozen configuration of attention by FFT on a GPU, and its constant tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan.config import fields_from_json, fields_to_json
from rpe_tvm.plan.twiddles import stage_sizes

# Radices of a stage, whose butterfly a thread keeps in registers, and the two factors that a composite one is made of.
COMPOSITE: dict[int, tuple[int, int]] = {
    6: (2, 3),
    8: (2, 4),
    10: (2, 5),
    12: (3, 4),
    15: (3, 5),
    16: (4, 4),
    20: (4, 5),
    32: (8, 4),
}
RADICES = (2, 3, 4, 5, *COMPOSITE)

# threads of a warp that one phase of an 8-byte access to shared memory serves
HALF_WARP = 16


# Radices and folds whose kernel is faster where nvcc may load a twiddle at once, as tables are aligned: 4096 and 16384
# positions by 7 and 4 %. Others become slower: 1024, 2048 and 8192 by 19, 8 and 16 % (H100).
_ALIGNED_TABLES = (((16, 16, 16), 1), ((16, 16, 16), 4))


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
        Radices of the transform that a block of threads makes in shared memory.
    threads : int
        Threads of that block.
    folds : int
        Into how many parts of the transform's length the P positions fall: the transform of 2 P points is 2 * folds
        ones of P / folds points, one for each remainder of the frequency.
    columns : int
        1 where that transform has P points. Else P points lie as columns x prod(radices) in memory (the four-step
        split), and each column is one butterfly of this radix.
    blocks_per_sm : int
        Blocks that a multiprocessor shall hold at once, which bounds the registers of a thread; 0: as the compiler
        likes.
    dtype : {"float32", "bfloat16", "float16"}
        Of query, key, value and out; all sums are float32.
    """

    num_features: int
    head_dim: int
    length: int
    radices: tuple[int, ...]
    threads: int
    folds: int = 1
    columns: int = 1
    blocks_per_sm: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    op: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "length", "threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        if self.columns * self.folds * self.row != self.length or len(self.radices) < 2:
            raise ValueError(
                f"Invalid radices: expected two or more whose product is {self.length} / (columns * folds), got "
                f"{self.radices}, columns {self.columns} and folds {self.folds}."
            )
        # Threads that take turns must have the same number: else barriers stand where only some of them come by.
        butterflies = [self.row // radix for radix in self.radices]
        if any(count > self.threads and count % self.threads for count in butterflies):
            raise ValueError(
                f"Invalid threads: expected a divisor of each stage's butterflies {butterflies} that are more than "
                f"threads, got {self.threads} for radices {self.radices}."
            )
        if min(self.columns, self.folds) != 1:
            raise ValueError(f"Invalid folds: expected 1 where there are columns, got {self.folds}.")
        if not {*self.radices, self.columns} <= {1, *RADICES}:
            raise ValueError(f"Invalid radix: expected radices of {RADICES}, got {self.radices}.")

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket and dtype."""
        return f"attention-m{self.num_features}-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def description(self) -> str:
        """One short word for tables: the algorithm with its factorisation."""
        rows = ".".join(map(str, self.radices))
        if self.folds > 1:
            return f"fft {self.folds}({rows})"
        return f"fft {rows}" if self.columns == 1 else f"fft {self.columns}x{rows}"

    @property
    def residues(self) -> int:
        """Transforms of one product: remainders of the frequency; 2, its parities, where nothing is folded."""
        return 2 * self.folds

    @property
    def row(self) -> int:
        """Points of the transform in shared memory."""
        return math.prod(self.radices)

    @property
    def pairs(self) -> int:
        """Pairs of channels that ride in one complex number; channel d is constant 1 and gives the denominators."""
        return self.head_dim // 2 + 1

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @property
    def has_aligned_tables(self) -> bool:
        """Whether the kernel of the transforms is told that tables are aligned."""
        return (self.radices, self.folds) in _ALIGNED_TABLES and self.columns == 1

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
    turns : int
        exp(-i pi j / P) for j < P, where positions are folded for j < 2 P: what frequencies of a remainder are
        shifted by.
    split : int
        Only with columns: exp(-2 pi i k1 n2 / P), `[columns, row]`.
    size : int
        Length of the whole array.
    """

    stages: dict[tuple[int, int], int]
    turns: int
    split: int
    size: int


def layout(config: GpuAttentionConfig) -> TableLayout:
    """Return the layout of the tables of a config."""
    stages: dict[tuple[int, int], int] = {}
    start = 0
    for size, radix in stage_sizes(config.radices):
        if size > radix:
            stages[size, radix] = start
            start += 2 * size
    split = start + 2 * config.length * min(config.folds, 2)
    return TableLayout(stages, start, split, split + (2 * config.length if config.columns > 1 else 0))


def tables(config: GpuAttentionConfig) -> npt.NDArray[np.float32]:
    """Return the constant tables, made in float64 and rounded once, flat, as `layout` says."""
    where = layout(config)
    out = np.empty(where.size, np.float32)
    for (size, radix), start in where.stages.items():
        out[start : start + 2 * size] = _pairs(np.outer(np.arange(radix), np.arange(size // radix)) / size)
    out[where.turns : where.split] = _pairs(np.arange((where.split - where.turns) // 2) / (2 * config.length))
    if config.columns > 1:
        out[where.split :] = _pairs(np.outer(np.arange(config.columns), np.arange(config.row)) / config.length)
    return out


def _pairs(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return exp(-2 pi i turns) as pairs, flat."""
    values = np.exp(-2j * np.pi * turns)
    return np.stack([values.real, values.imag], -1).astype(np.float32).ravel()


# rows up to this length are transformed in shared memory at once
LONGEST_ROW = 8192
LONGEST = 32 * LONGEST_ROW
# transformed in shared memory by folds of 4096 positions
FOLDED = 16384


# The radices of a row of that many points: each divides the first, so that every stage has a multiple of the first
# one's butterflies and every thread the same number of points. On an H100 8.8.8.8 took 0.52 ms where 16.16.16 took
# 0.40, and 16.16.8.4 1.00 where 16.8.8.8 took 0.95 (8 heads, m = 32, d = 64).
ROW_RADICES: dict[int, tuple[int, ...]] = {
    64: (8, 8),
    128: (16, 8),
    256: (16, 16),
    512: (8, 8, 8),
    1024: (16, 8, 8),
    2048: (16, 16, 8),
    4096: (16, 16, 16),
    8192: (16, 8, 8, 8),
}


# Measured on an H100: 119 registers in place of 159, 0.19 ms in place of 0.22; 128 with few spilled in place of 194,
# 0.396 in place of 0.42.
BLOCKS_PER_SM: dict[tuple[int, ...], int] = {(16, 16, 8): 4, (16, 16, 16): 2}


def gpu_bucket(n: int) -> int:
    """Return the smallest bucket on a GPU that holds `n` positions: a power of two of at least 64."""
    return max(64, 1 << (n - 1).bit_length())


def choose(n: int, num_features: int, head_dim: int, dtype: str = "float32") -> GpuAttentionConfig:
    """Return the config for up to `n` positions.

    Raises
    ------
    ValueError
        For more than `LONGEST` positions.
    """
    if n > LONGEST:
        raise ValueError(f"Invalid length: expected at most {LONGEST} positions on a GPU so far, got {n}.")
    length = gpu_bucket(n)
    folds = columns = 1
    if length == FOLDED:
        folds = 4
    elif length > LONGEST_ROW:
        columns = 32 if length == LONGEST else max(4, min(16, length // 4096))
    row = length // (folds * columns)
    radices = ROW_RADICES[row]
    threads = max(32, row // radices[0])
    blocks_per_sm = BLOCKS_PER_SM.get(radices, 0) if folds * columns == 1 else 0
    return GpuAttentionConfig(num_features, head_dim, length, radices, threads, folds, columns, blocks_per_sm, dtype)  # type: ignore[arg-type]
