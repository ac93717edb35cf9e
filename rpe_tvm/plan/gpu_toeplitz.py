"""The frozen configuration of the Toeplitz product on a GPU, and the shapes of what lies between its functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_backward import HOPPER
from rpe_tvm.plan.twiddles import digit_order

LONGEST = gpu.LONGEST

# Pairs of channels whose correlations one block of threads adds up: enough blocks for all of a GPU, and sums that are
# small beside x.
CORRELATED_PAIRS = 4
# Of each of the two arrays between columns and rows, as of attention.
_ARRAY_FLOATS = 64 << 20


@dataclass(frozen=True)
class GpuToeplitzConfig(GpuAttentionConfig):
    """What one compiled Toeplitz product computes on a GPU, y_i = sum_j w[j-i] x_j, and how.

    The fields are those of attention with one feature, which is 1, and without folds; there are no denominators.
    """

    op: ClassVar[str] = "toeplitz"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.num_features, self.folds, self.dtype) != (1, 1, "float32"):
            raise ValueError(
                "Invalid config of a Toeplitz product: expected num_features 1, folds 1 and float32, got "
                f"{self.num_features}, {self.folds} and {self.dtype}."
            )
        first = self.radices[0]
        if self.threads * first != self.row or first % self.radices[-1]:
            raise ValueError(
                f"Invalid threads of a Toeplitz product: expected {self.row} / {first} and a first radix that the last "
                f"one divides, got {self.threads} and {self.radices}."
            )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"toeplitz-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def pairs(self) -> int:
        """Pairs of channels that ride in one complex number; the last one has one channel where d is odd."""
        return (self.head_dim + 1) // 2


def choose(n: int, head_dim: int, shared_bytes: int = HOPPER) -> GpuToeplitzConfig:
    """Return the config for up to `n` positions.

    Parameters
    ----------
    n : int
        The larger of the numbers of inputs and outputs.
    head_dim : int
        Channels d.
    shared_bytes : int
        Shared memory that a block of threads may have.

    Raises
    ------
    ValueError
        For more than `LONGEST` positions.
    """
    if n > LONGEST:
        raise ValueError(f"Invalid length: expected at most {LONGEST} positions on a GPU so far, got {n}.")
    length = gpu.gpu_bucket(n)
    is_hopper = shared_bytes >= HOPPER
    row = length
    if length > (8192 if is_hopper else 4096):
        # two blocks of rows of 4096 share a multiprocessor, and a thread has registers for a column of 16
        row = 8192 if length > (16 if is_hopper else 32) * 4096 else 4096
    radices = gpu.ROW_RADICES[row]
    blocks_per_sm = gpu.BLOCKS_PER_SM.get(radices, 0) if row == length else 0
    return GpuToeplitzConfig(
        1, head_dim, length, radices, row // radices[0], columns=length // row, blocks_per_sm=blocks_per_sm
    )


def between(config: GpuToeplitzConfig, heads: int) -> tuple[int, ...]:
    """What columns and rows of some heads hand to each other, complex, `[heads, pairs, 2, columns, row, 2]`."""
    return heads, config.pairs, 2, config.columns, config.row, 2


def heads_at_once(config: GpuToeplitzConfig, heads: int) -> int:
    """Heads whose columns and rows take turns."""
    return max(1, min(heads, _ARRAY_FLOATS // math.prod(between(config, 1))))


def correlation_groups(config: GpuToeplitzConfig) -> int:
    """Groups of pairs of channels whose correlations are added up."""
    return -(-config.pairs // CORRELATED_PAIRS)


def correlation_shape(config: GpuToeplitzConfig) -> tuple[int, ...]:
    """Spectra of the weights' gradient of a head by groups of pairs, complex.

    With S the first and R the last radix `[groups, 2, columns, R, S / R, row / S, 2]`.
    """
    first, last = config.radices[0], config.radices[-1]
    return correlation_groups(config), 2, config.columns, last, first // last, config.threads, 2


def places(config: GpuToeplitzConfig) -> npt.NDArray[np.int64]:
    """Return where each of the P frequencies lies in `correlation_shape` after the parity, flat."""
    last = config.radices[-1]
    rows = config.columns * digit_order(config.radices).reshape(-1, last).T.ravel()
    return np.argsort((np.arange(config.columns)[:, None] + rows).ravel())
