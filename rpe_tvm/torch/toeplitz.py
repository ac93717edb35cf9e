"""Products with Toeplitz matrices, the operator of FastRPB."""

from __future__ import annotations

import torch
from torch import Tensor


def toeplitz_matmul(weights: Tensor, x: Tensor, n_out: int | None = None) -> Tensor:
    """Multiply by a Toeplitz matrix: ``y_i = sum_j w[j-i] x_j``, with gradients for both tensors.

    Parameters
    ----------
    weights : Tensor
        ``[H, n_out + n - 1]``, float32, on the CPU; entry ``(j - i) + n_out - 1`` belongs to output i and input j.
    x : Tensor
        ``[B, H, n, d]``.
    n_out : int, optional
        Positions of the output; n by default.

    Returns
    -------
    Tensor
        ``[B, H, n_out, d]``.
    """
    # Placeholder in plain torch until the compiled operator is in.
    n = x.shape[2]
    n_out = n if n_out is None else n_out
    size = n_out + n
    w = weights
    column = torch.cat([w[:, :n_out].flip(-1), w.new_zeros(w.shape[0], 1), w[:, n_out:].flip(-1)], -1)
    spectrum = torch.fft.rfft(column, size)[:, :, None]
    return torch.fft.irfft(torch.fft.rfft(x, size, dim=2) * spectrum, size, dim=2)[:, :, :n_out]
