"""Which algorithm serves a call on a GPU: tensor cores 16-bit numbers up to some length, else the FFT in float32."""

from __future__ import annotations

import functools

from rpe_tvm.plan import gpu, gpu_direct
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig

GpuConfig = GpuAttentionConfig | TensorCoreConfig

# From here on the FFT has fewer operations to do, counted at the rates of the H100's prototypes; not yet measured.
LONGEST_DIRECT = 32768


def is_direct(n: int, num_features: int, head_dim: int, dtype: str) -> bool:
    """Return whether tensor cores serve up to `n` positions of `dtype`, a name such as ``bfloat16``."""
    return dtype != "float32" and n <= LONGEST_DIRECT and _has_tiles(num_features, head_dim, dtype)


@functools.cache
def _has_tiles(num_features: int, head_dim: int, dtype: str) -> bool:
    try:
        for n in (1024, 2048, LONGEST_DIRECT):
            gpu_direct.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def choose(n: int, num_features: int, head_dim: int, dtype: str = "float32") -> GpuConfig:
    """Return the config for up to `n` positions.

    Raises
    ------
    ValueError
        If there is none: for too many positions, and for 16-bit numbers that `is_direct` denies.
    """
    if dtype == "float32":
        return gpu.choose(n, num_features, head_dim)
    if not is_direct(n, num_features, head_dim, dtype):
        raise ValueError(
            f"No kernel for {dtype}: expected at most {LONGEST_DIRECT} positions, a head_dim that is a multiple of 8, "
            f"and head_dim / 2 + num_features / 4 <= 160, got n = {n}, head_dim {head_dim} and num_features "
            f"{num_features}. Use float32."
        )
    return gpu_direct.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]


def bucket(n: int, dtype: str) -> int:
    """Return the length that an operator for `n` positions is compiled for."""
    return gpu.gpu_bucket(n) if dtype == "float32" else bucket_length(n)
