"""The compiled attention operator of one length on GPUs, for callers that have checked their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_choice import GpuConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.runtime.operator import FEATURE_MAPS, Functions

_FEATURES = tuple(f"features_{name}" for name in FEATURE_MAPS)
_FORWARD = tuple(f"forward_{name}" for name in FEATURE_MAPS)
# Where a transform fits into shared memory, and where its columns and rows take turns.
_SHORT = ("spectrum", "attention")
_LONG = ("spectrum_columns", "spectrum_rows", "columns", "rows", "back_columns")


def function_names(config: GpuConfig) -> tuple[str, ...]:
    """The names of the functions that are compiled for a config."""
    if isinstance(config, TensorCoreConfig):
        if config.fused:
            return _FORWARD
        return (*_FEATURES, "weights", "attention")
    return (*_FEATURES, "largest", *(_SHORT if config.columns == 1 else _LONG), "normalise")


def config_from_json(fields: dict[str, Any]) -> GpuConfig:
    """The config of a manifest: that of the FFT has radices."""
    return GpuAttentionConfig.from_json(fields) if "radices" in fields else TensorCoreConfig.from_json(fields)


@dataclass(frozen=True)
class GpuInstance:
    """One compiled length.

    Attributes
    ----------
    config
        What was compiled.
    functions
        The functions by name, see `function_names`. They take tensors of one GPU, launch kernels on the current stream
        of torch there and do not wait for them. They make that GPU the current one and leave it so.
    """

    config: GpuConfig
    functions: Functions
