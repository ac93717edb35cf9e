"""The compiled attention operator of one length on GPUs, for callers that have checked their arguments."""

from __future__ import annotations

from dataclasses import dataclass

from rpe_tvm.plan import gpu_direct
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_backward_choice import AnyBackwardConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.runtime.operator import FEATURE_MAPS, Functions

_FEATURES = tuple(f"features_{name}" for name in FEATURE_MAPS)
_FUSED = tuple(f"fused_{name}" for name in FEATURE_MAPS)
_CLUSTERED = tuple(f"clustered_{name}" for name in FEATURE_MAPS)
_FORWARD = tuple(f"forward_{name}" for name in FEATURE_MAPS)
_RECORDED = tuple(f"recorded_{name}" for name in FEATURE_MAPS)
_BACKWARD = tuple(f"backward_{name}" for name in FEATURE_MAPS)
_SHORT_BACKWARD = (
    "denominators",
    "channels",
    "backward",
    "value_sums",
    "grad_value",
    "correlation_sums",
    "weight_sums",
    "grad_bias",
)
_LONG_BACKWARD = ("channels", "columns_backward", "rows_backward", "dots_backward", "grad_value")
_GRAD_FEATURES = tuple(f"grad_features_{name}" for name in FEATURE_MAPS)
# Where a transform fits into shared memory, and where its columns and rows take turns.
_SHORT = ("spectrum", "attention")
_LONG = ("spectrum_columns", "spectrum_rows", "columns", "rows", "back_columns")
_SHORT_TOEPLITZ = ("spectrum", "product", "correlation", "matmul")
_LONG_TOEPLITZ = (*_LONG, "correlation_rows")


def function_names(config: GpuConfig | AnyBackwardConfig) -> tuple[str, ...]:
    """The names of the functions that are compiled for a config."""
    if isinstance(config, GpuToeplitzConfig):
        return _SHORT_TOEPLITZ if config.columns == 1 else _LONG_TOEPLITZ
    if isinstance(config, GpuBackwardConfig):
        if config.columns == 1:
            launches = (*_FEATURES, "largest", "spectrum", *_SHORT_BACKWARD, *_GRAD_FEATURES)
            return (*launches, "gradients", *_BACKWARD)
        return (*_FEATURES, "largest", *_LONG, *_LONG_BACKWARD, *_GRAD_FEATURES)
    if isinstance(config, TensorCoreBackwardConfig):
        return (*_FEATURES, "weights", "grad_queries", "grad_keys", "grad_bias", *_BACKWARD)
    if isinstance(config, TileBackwardConfig):
        launches = (*_FEATURES, "weights", "grad_queries", "grad_keys", "grad_bias", *_GRAD_FEATURES)
        return (*launches, "gradients", *_BACKWARD)
    if isinstance(config, TileConfig):
        return (*_FEATURES, "weights", "attention", *_FORWARD, *_RECORDED)
    if isinstance(config, TensorCoreConfig):
        fused = _FUSED if gpu_direct.fused(config) else ()
        clustered = _CLUSTERED if gpu_direct.clustered(config) else ()
        kernels = (*_FEATURES, "weights", "attention", "recorded_attention")
        return (*kernels, *_FORWARD, *_RECORDED, *fused, *clustered)
    if config.columns == 1:
        return (*_FEATURES, "largest", *_SHORT, "normalise", *_FORWARD)
    return (*_FEATURES, "largest", *_LONG, "normalise")


def kernel_functions(config: GpuConfig) -> tuple[str, ...]:
    """The names of those functions that launch kernels: all that is compiled for AMD GPUs."""
    return tuple(name for name in function_names(config) if name not in _FORWARD)


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

    config: GpuConfig | AnyBackwardConfig
    functions: Functions
