"""Runs compiled operators: needs NumPy and apache-tvm-ffi, neither TVM nor PyTorch."""

from rpe_tvm.runtime.gpu_operator import GpuInstance
from rpe_tvm.runtime.load import (
    load,
    load_backward,
    load_gpu,
    load_gpu_backward,
    load_gpu_toeplitz,
    load_hip,
    load_toeplitz,
)
from rpe_tvm.runtime.operator import Attention, Instance, run
from rpe_tvm.runtime.toeplitz import ToeplitzInstance

__all__ = [
    "Attention",
    "GpuInstance",
    "Instance",
    "ToeplitzInstance",
    "load",
    "load_backward",
    "load_gpu",
    "load_gpu_backward",
    "load_gpu_toeplitz",
    "load_hip",
    "load_toeplitz",
    "run",
]
