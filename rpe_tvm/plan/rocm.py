"""The rule for the config of attention on AMD GPUs.

Nothing here was measured: it follows from what code objects say of registers and local memory (docs/decisions.md).
"""

from __future__ import annotations

from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.rocm_limits import wave

# The radices of a row of that many points: 8 points of a thread take 102 to 238 registers with m = 32 and d = 64, and a
# block has twice the threads that it would have with 16. A small radix in the middle takes the least local memory.
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
