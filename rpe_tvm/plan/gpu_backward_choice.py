"""Which algorithm and config serves the gradients on a GPU."""

from __future__ import annotations

import functools
from typing import Any, cast

from rpe_tvm.plan import gpu_backward, gpu_choice, gpu_direct_backward
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig

AnyBackwardConfig = GpuBackwardConfig | TensorCoreBackwardConfig


@functools.lru_cache(maxsize=4096)
def is_direct(num_features: int, head_dim: int, dtype: str) -> bool:
    """Return whether tensor cores serve tensors of `dtype`, a name such as ``bfloat16``; by FFT all is float32."""
    if dtype == "float32":
        return False
    try:
        for n in (1024, 2048, 4096):
            gpu_direct_backward.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def choose(n: int, num_features: int, head_dim: int, dtype: str = "float32") -> AnyBackwardConfig:
    """Return the config for up to `n` positions.

    Raises
    ------
    ValueError
        If there is none: for too many positions by FFT, and for 16-bit numbers that `is_direct` denies.
    """
    if dtype == "float32":
        return gpu_backward.choose(n, num_features, head_dim)
    return gpu_direct_backward.choose(n, num_features, head_dim, dtype)  # type: ignore[arg-type]


def bucket(n: int, dtype: str) -> int:
    """Return the length that an operator for `n` positions is compiled for."""
    return gpu_choice.bucket(n, dtype)


def config_from_json(fields: dict[str, Any]) -> AnyBackwardConfig:
    """Return the config that `to_json` wrote: that of the FFT has radices."""
    if "radices" in fields:
        return cast(GpuBackwardConfig, GpuBackwardConfig.from_json(fields))
    return TensorCoreBackwardConfig.from_json(fields)
