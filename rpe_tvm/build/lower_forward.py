"""From a config for GPUs to the functions of whole calls."""

from __future__ import annotations

import tvm

from rpe_tvm.build.device_code import CALLS_ATTRIBUTE
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.te.features import FEATURE_MAPS
from rpe_tvm.te.gpu_forward import forward, recorded


def forward_functions(config: GpuConfig) -> dict[str, tvm.tirx.PrimFunc]:
    """Return `forward_prf` and `forward_nprf`, by tiles also `recorded_prf` and `recorded_nprf`."""
    functions = {f"forward_{name}": forward(config, name) for name in FEATURE_MAPS}
    if isinstance(config, TensorCoreConfig | TileConfig):
        functions |= {f"recorded_{name}": recorded(config, name) for name in FEATURE_MAPS}
    return {name: function.with_attr(CALLS_ATTRIBUTE, 1) for name, function in functions.items()}
