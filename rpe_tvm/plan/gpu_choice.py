"""Which algorithm and config serves a call on a GPU: what was measured, and a rule where nothing was."""

from __future__ import annotations

import functools
from dataclasses import replace

from rpe_tvm.plan import cuda_limits, gpu, gpu_direct, gpu_tiles, gpu_wisdom, rocm
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.plan.rocm_limits import is_rocm

# The rule: from here on the FFT has fewer operations to do, counted at the rates of the H100's prototypes.
LONGEST_DIRECT = 32768
# The same in float32, where tensor cores have no part.
LONGEST_TILES = 2048
# On all GPUs the algorithm is the one that was faster on these.
MEASURED = "cuda-sm_90"


def is_direct(n: int, num_features: int, head_dim: int, dtype: str) -> bool:
    """Return whether tensor cores serve up to `n` positions of `dtype`, a name such as ``bfloat16``."""
    if dtype == "float32" or not _has_tiles(num_features, head_dim, dtype):
        return False
    measured = gpu_wisdom.nearest(MEASURED, n, num_features, head_dim, dtype)
    return n <= LONGEST_DIRECT if measured is None else isinstance(measured.config, TensorCoreConfig)


@functools.cache
def _has_tiles(num_features: int, head_dim: int, dtype: str) -> bool:
    try:
        for n in (1024, 2048, LONGEST_DIRECT):
            gpu_direct.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _tiles(n: int, num_features: int, head_dim: int, target_id: str) -> TileConfig | None:
    try:
        return gpu_tiles.choose(n, num_features, head_dim, cuda_limits.shared_bytes(target_id))
    except ValueError:
        return None


def rule(n: int, num_features: int, head_dim: int, dtype: str = "float32", target_id: str = MEASURED) -> GpuConfig:
    """Return the config for up to `n` positions of `dtype` where nothing was measured.

    Raises
    ------
    ValueError
        If there is none: for too many positions. Sixteen-bit numbers that tensor cores do not serve are converted, and
        the config is that of float32.
    """
    if is_rocm(target_id):
        return rocm.choose(n, num_features, head_dim, target_id)
    if dtype != "float32" and n <= LONGEST_DIRECT and _has_tiles(num_features, head_dim, dtype):
        return gpu_direct.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]
    tiles = _tiles(n, num_features, head_dim, target_id) if dtype == "float32" and n <= LONGEST_TILES else None
    return tiles or gpu.choose(n, num_features, head_dim)


def choose(n: int, num_features: int, head_dim: int, dtype: str = "float32", target_id: str = MEASURED) -> GpuConfig:
    """Return the config for up to `n` positions.

    In float32 a measured choice for the same bucket, features and head dimension is taken as it is. Tiles of tensor
    cores do not depend on the length: those of the nearest measured one are taken.

    Parameters
    ----------
    n : int
        The larger of the numbers of queries and keys.
    num_features, head_dim : int
        Features m and channels d.
    dtype : str
        Of query, key, value and the output.
    target_id : str
        As ``cuda-sm_90`` or ``rocm-gfx942``.

    Raises
    ------
    ValueError
        If there is none: for too many positions, and for 16-bit numbers that `is_direct` denies.
    """
    if is_rocm(target_id) and dtype != "float32":
        raise ValueError(f"No kernel for {dtype} on {target_id}: AMD GPUs are served in float32. Convert to that.")
    if dtype != "float32" and not is_direct(n, num_features, head_dim, dtype):
        raise ValueError(
            f"No kernel for {dtype}: expected a head_dim that is a multiple of 8, head_dim / 2 + num_features / 4 <= "
            f"160, and not so many positions that the FFT in float32 is faster (by rule {LONGEST_DIRECT}), got n = "
            f"{n}, head_dim {head_dim} and num_features {num_features}. Use float32."
        )
    length = bucket(n, dtype)
    measured = gpu_wisdom.nearest(target_id, length, num_features, head_dim, dtype)
    if measured is not None and measured.config.length == length and measured.config.dtype == dtype:
        return measured.config
    if dtype == "float32":
        return rule(n, num_features, head_dim, dtype, target_id)
    if measured is not None and isinstance(measured.config, TensorCoreConfig):
        return replace(measured.config, length=length)
    return gpu_direct.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]


def bucket(n: int, dtype: str) -> int:
    """Return the length that an operator for `n` positions is compiled for."""
    return gpu.gpu_bucket(n) if dtype == "float32" else bucket_length(n)
