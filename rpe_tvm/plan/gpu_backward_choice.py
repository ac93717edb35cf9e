"""Which algorithm and config serves the gradients on a GPU."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from rpe_tvm.plan import gpu_backward, gpu_choice, gpu_direct_backward, gpu_tiles_backward
from rpe_tvm.plan.config import fields_from_json
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig

AnyBackwardConfig = GpuBackwardConfig | TensorCoreBackwardConfig | TileBackwardConfig


@functools.lru_cache(maxsize=4096)
def is_direct(num_features: int, head_dim: int, dtype: str) -> bool:
    """Return whether tensor cores serve tensors of `dtype`, a name such as ``bfloat16``; elsewhere all is float32."""
    if dtype == "float32":
        return False
    try:
        for n in (1024, 2048, 4096):
            gpu_direct_backward.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def choose(
    n: int, num_features: int, head_dim: int, dtype: str = "float32", shared_bytes: int = gpu_backward.HOPPER
) -> AnyBackwardConfig:
    """Return the config for up to `n` positions, on GPUs whose blocks may have `shared_bytes` of shared memory.

    Raises
    ------
    ValueError
        If there is none: for too many positions by FFT, and for 16-bit numbers that `is_direct` denies.
    """
    if dtype == "float32":
        if n <= gpu_choice.LONGEST_TILES:
            with contextlib.suppress(ValueError):  # too many features and channels for tiles
                return gpu_tiles_backward.choose(n, num_features, head_dim, shared_bytes)
        return gpu_backward.choose(n, num_features, head_dim, shared_bytes)
    return gpu_direct_backward.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]


def bucket(n: int, dtype: str) -> int:
    """Return the length that an operator for `n` positions is compiled for."""
    return gpu_choice.bucket(n, dtype)


def config_from_json(fields: dict[str, Any]) -> AnyBackwardConfig:
    """Return the config that `to_json` wrote: that of the FFT has radices, that of float32 tiles rows of a block."""
    if "radices" in fields:
        return GpuBackwardConfig(**fields_from_json(fields))
    if "rows" in fields:
        return TileBackwardConfig.from_json(fields)
    return TensorCoreBackwardConfig.from_json(fields)
