"""What AMD GPUs offer, and the rule for the config of attention there.

Nothing here was measured: it follows from what code objects say of registers and local memory (docs/decisions.md).
"""

from __future__ import annotations

from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu import GpuAttentionConfig

PREFIX = "rocm-"  # of target ids

# Architecture -> threads that execute together.
WAVES: dict[str, int] = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}
# Threads of a block: TVM's generator declares no more in code objects, and the driver refuses what is not declared.
MAX_THREADS = 256
# Local memory of a block ("LDS", what CUDA calls shared memory).
SHARED_BYTES = 64 * 1024

# The radices of a row of that many points. A thread with 16 points needs more than 256 registers with 64 of them in a
# wave; 8 at most, with a small radix in the middle, take 121 to 226 and the least local memory.
ROW_RADICES: dict[int, tuple[int, ...]] = {
    64: (4, 4, 4),
    128: (4, 2, 4, 4),
    256: (8, 4, 8),
    512: (8, 8, 8),
    1024: (8, 4, 4, 8),
    2048: (8, 4, 8, 8),
}
LONGEST_ROW = 2048
# In local memory by folds of 1024 positions; 8192 positions fill it before anything is transformed.
FOLDED, FOLDS = 4096, 4
# Wave -> the most columns. 32 of them spill registers where there are 256 of a thread.
MOST_COLUMNS: dict[int, int] = {64: 32, 32: 16}


def is_rocm(target_id: str) -> bool:
    """Return whether a target id is that of an AMD GPU, such as ``rocm-gfx942``."""
    return target_id.startswith(PREFIX)


def wave(target_id: str) -> int:
    """Return how many threads execute together on a target."""
    return WAVES[target_id.removeprefix(PREFIX)]


def choose(n: int, num_features: int, head_dim: int, target_id: str) -> GpuAttentionConfig:
    """Return the config for up to `n` positions on an AMD GPU.

    Raises
    ------
    ValueError
        For more positions than columns and rows hold.
    """
    longest = LONGEST_ROW * MOST_COLUMNS[wave(target_id)]
    if n > longest:
        raise ValueError(f"Invalid length: expected at most {longest} positions on {target_id}, got {n}.")
    length = gpu.gpu_bucket(n)
    folds = FOLDS if length == FOLDED else 1
    columns = length // LONGEST_ROW if length > FOLDED else 1
    return config(num_features, head_dim, length, ROW_RADICES[length // (folds * columns)], folds, columns)


def config(
    num_features: int, head_dim: int, length: int, radices: tuple[int, ...], folds: int = 1, columns: int = 1
) -> GpuAttentionConfig:
    """Return the config with a thread for each first butterfly, and a wave of 32 at least."""
    threads = max(32, length // (folds * columns) // radices[0])
    return GpuAttentionConfig(num_features, head_dim, length, radices, threads, folds, columns)
