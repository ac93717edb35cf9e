"""From a config for GPUs to the functions of whole calls."""

from __future__ import annotations

import tvm

from rpe_tvm.build.device_code import CALLS_ATTRIBUTE
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.te.features import FEATURE_MAPS
from rpe_tvm.te.gpu_forward import forward


def forward_functions(config: GpuConfig) -> dict[str, tvm.tirx.PrimFunc]:
    """Return `forward_prf` and `forward_nprf`."""
    return {f"forward_{name}": forward(config, name).with_attr(CALLS_ATTRIBUTE, 1) for name in FEATURE_MAPS}
