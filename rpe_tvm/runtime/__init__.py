"""Runs compiled operators: needs NumPy and apache-tvm-ffi, neither TVM nor PyTorch."""

from rpe_tvm.runtime.load import load
from rpe_tvm.runtime.operator import Attention, Instance, run

__all__ = ["Attention", "Instance", "load", "run"]
