"""The frozen configuration of the compiled gradients of attention on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu import GpuAttentionConfig

LONGEST = gpu.LONGEST

# Shared memory of a block on sm_90. Two folds of 4096 positions need 167,936 bytes, a block of sm_80 has 166,912.
HOPPER = 232_448
# transformed in shared memory by two folds of 4096 positions
FOLDED = 8192
# The transforms of both sides together, in one block of threads with all registers of a multiprocessor, as with folds.
TOGETHER = 4096

# Blocks that a multiprocessor shall hold at once: 128 registers for each of 512 threads, with few spilled.
BLOCKS_PER_SM: dict[tuple[int, ...], int] = {(16, 16, 8): 4, (16, 16, 16): 2}


@dataclass(frozen=True)
class GpuBackwardConfig(GpuAttentionConfig):
    """How the gradients are computed; the fields are those of attention.

    A thread keeps the frequencies that it made until it multiplies them, so each thread has one butterfly of the first
    radix, and as many points in all other stages.
    """

    op: ClassVar[str] = "backward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != "float32":
            raise ValueError(f"Invalid config of gradients: expected float32, got {self.dtype}.")
        first = self.radices[0]
        if self.threads * first != self.row or any(first % radix for radix in self.radices):
            raise ValueError(
                f"Invalid threads of gradients: expected {self.row} / {first} and a first radix that the others "
                f"divide, got {self.threads} and {self.radices}."
            )

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"backward-m{self.num_features}-d{self.head_dim}-n{self.length}-{self.dtype}"

    @property
    def sides_together(self) -> bool:
        """Whether a thread makes the transforms of both sides between the same barriers: one block, all registers."""
        return self.folds > 1 or (self.columns == 1 and self.blocks_per_sm == 1)

    @property
    def blocks_of_sums(self) -> int:
        """Blocks that a multiprocessor shall hold in the values' gradient, whatever it holds in the others'."""
        return BLOCKS_PER_SM.get(self.radices, 0) if self.blocks_per_sm == 1 else self.blocks_per_sm

    @property
    def value_pairs(self) -> int:
        """Pairs of the values' channels alone."""
        return (self.head_dim + 1) // 2

    @property
    def together(self) -> int:
        """Features whose transforms a thread makes at once in the values' gradient."""
        return 2 if self.folds > 1 and self.num_features % 2 == 0 else 1

    @property
    def num_terms(self) -> int:
        """Terms of a denominator and remainder: one for each feature, or their sum."""
        return self.num_features if self.columns == 1 else 1

    @property
    def grad_parts(self) -> int:
        """Parts of a feature's gradient: its remainders, or their sum."""
        return self.residues if self.columns == 1 else 1


def choose(n: int, num_features: int, head_dim: int, shared_bytes: int = HOPPER) -> GpuBackwardConfig:
    """Return the config of the gradients for up to `n` positions.

    Parameters
    ----------
    n : int
        The larger of the numbers of queries and keys.
    num_features, head_dim : int
        m and d.
    shared_bytes : int
        Shared memory that a block of threads may have.

    Raises
    ------
    ValueError
        For more than `LONGEST` positions.
    """
    if n > LONGEST:
        raise ValueError(f"Invalid length: expected at most {LONGEST} positions for gradients on a GPU, got {n}.")
    length = gpu.gpu_bucket(n)
    row = length
    if length > 4096:
        row = 8192 if length > 32 * 4096 else 4096
    folds = 2 if length == FOLDED and shared_bytes >= HOPPER else 1
    radices = gpu.ROW_RADICES[row]
    blocks_per_sm = BLOCKS_PER_SM.get(radices, 0) if folds == 1 else 0
    if length == TOGETHER and shared_bytes >= HOPPER:
        blocks_per_sm = 1
    columns = length // (folds * row)
    return GpuBackwardConfig(num_features, head_dim, length, radices, row // radices[0], folds, columns, blocks_per_sm)
