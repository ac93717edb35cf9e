"""The compiled attention operator of one length on GPUs, for callers that have checked their arguments."""

from __future__ import annotations

from dataclasses import dataclass

from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.runtime.operator import FEATURE_MAPS, Functions

FFT_FUNCTIONS = (*(f"features_{name}" for name in FEATURE_MAPS), "largest", "spectrum", "attention", "normalise")


@dataclass(frozen=True)
class GpuInstance:
    """One compiled length.

    Attributes
    ----------
    config
        What was compiled.
    functions
        The functions by name, see `FFT_FUNCTIONS`. They take tensors of one GPU, launch kernels on the current stream
        of torch there and do not wait for them. They make that GPU the current one and leave it so.
    """

    config: GpuAttentionConfig
    functions: Functions
