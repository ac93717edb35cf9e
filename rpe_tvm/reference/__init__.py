"""Float64 NumPy definitions of the operators: the truth that every other implementation is compared with."""

from rpe_tvm.reference.attention import attention, attention_rows, weights
from rpe_tvm.reference.feature_maps import nprf, prf
from rpe_tvm.reference.gradients import CoreGradients, Gradients, attention_gradients, core_gradients
from rpe_tvm.reference.toeplitz import toeplitz_dense, toeplitz_fft, toeplitz_matrix

__all__ = [
    "CoreGradients",
    "Gradients",
    "attention",
    "attention_gradients",
    "attention_rows",
    "core_gradients",
    "nprf",
    "prf",
    "toeplitz_dense",
    "toeplitz_fft",
    "toeplitz_matrix",
    "weights",
]
