"""The compiled Toeplitz product of one length, for callers that have checked their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.runtime.operator import FloatArray, Functions, aligned_copy, scratch

FUNCTIONS = ("weights", "matmul", "correlation")


@dataclass(frozen=True)
class ToeplitzInstance:
    """One compiled length.

    Attributes
    ----------
    config
        What was compiled.
    functions
        The kernels by name, see `FUNCTIONS`.
    tables
        Constant tables that the kernels take.
    """

    config: ToeplitzConfig
    functions: Functions
    tables: FloatArray

    @classmethod
    def of(cls, config: ToeplitzConfig, functions: Functions) -> ToeplitzInstance:
        """An instance with the tables of `config`."""
        return cls(config, functions, aligned_copy(twiddles.fft_tables(config)))

    def matmul(self, weights: Any, x: Any, out: Any) -> None:
        """Write ``out_i = sum_j w[j-i] x_j``.

        Parameters
        ----------
        weights
            ``[H, n_out + n - 1]``, contiguous.
        x, out
            ``[B, H, n, d]`` and ``[B, H, n_out, d]``, contiguous in the last axis, not empty, at most as long as the
            compiled length.
        """
        spectrum = scratch("spectrum", (x.shape[1], 2, self.config.length, 2))
        self.functions["weights"](weights, out.shape[2], x.shape[2], self.tables, spectrum)
        self.functions["matmul"](x, spectrum, self.tables, out)

    def correlation(self, grad: Any, x: Any, sums: Any) -> None:
        """Write the transform of the gradient of the weights, summed over channels.

        Parameters
        ----------
        grad, x
            ``[B, H, n_out, d]`` and ``[B, H, n, d]``, as `out` and `x` of `matmul`.
        sums
            ``[B, H, 2, P, 2]``, contiguous: complex, position k is frequency `twiddles.frequencies(config)[k]` (plus
            1/2 at index 1 of the third axis) of P.
        """
        self.functions["correlation"](grad, x, self.tables, sums)
