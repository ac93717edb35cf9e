"""Gradients of attention on short sequences by tiles of rows, in torch: exact row by row, and fast where n is small."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# up to this length the tiles are faster than the gradients by FFT, or as fast
LONGEST = 512
TILE = 64


class DirectGradients(NamedTuple):
    """Gradients of attention on ready features, each of the shape of its argument."""

    phi_q: Tensor
    phi_k: Tensor
    value: Tensor
    rpe_bias: Tensor


def direct_backward(
    grad_out: Tensor, out: Tensor, phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> DirectGradients:
    """Gradients of ``sum(grad_out * out)`` (Luo 2021, Eq. 10, differentiated; see docs/operators.md, Gradients).

    A tile holds 64 rows of the weights: memory is O(n) for each head, time O(n^2).

    Parameters
    ----------
    grad_out, out : Tensor
        ``[B, H, n_q, d]``: the gradient and the result of the forward pass. Rows of grad_out whose denominator is 0
        must be 0.
    phi_q, phi_k : Tensor
        ``[B, H, n_q, m]`` and ``[B, H, n_k, m]``.
    value : Tensor
        ``[B, H, n_k, d]``.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``.
    is_causal : bool
        As in the forward pass.
    """
    grad_out, out, phi_q, phi_k, value = (x.contiguous() for x in (grad_out, out, phi_q, phi_k, value))
    n_q, n_k = phi_q.shape[2], phi_k.shape[2]
    weights = _weights(rpe_bias, n_q, is_causal)
    grad_q = torch.empty(phi_q.shape)
    grad_k, grad_value, grad_weights = torch.zeros(phi_k.shape), torch.zeros(value.shape), torch.zeros(weights.shape)
    for start in range(0, n_q, TILE):
        stop = min(start + TILE, n_q)
        last = min(stop, n_k) if is_causal else n_k
        # row i of the matrix is the window of weights that starts at offset -i, so windows come last row first
        first = n_q - stop
        offsets = slice(first, first + stop - start + last - 1)
        tile = weights[:, offsets].unfold(1, last, 1).flip(1)
        q, k, v = phi_q[:, :, start:stop], phi_k[:, :, :last], value[:, :, :last]

        scores = (q @ k.mT).mul_(tile)
        denominator = scores.sum(-1, keepdim=True)
        grad = grad_out[:, :, start:stop] * torch.where(denominator == 0, 0.0, 1.0 / denominator)
        grad_value[:, :, :last] += scores.mT @ grad
        grad_scores = (grad @ v.mT).sub_((grad * out[:, :, start:stop]).sum(-1, keepdim=True))
        grad_weights[:, offsets] += _sum_over_diagonals(scores.mul_(grad_scores).sum(0))
        grad_scores *= tile
        grad_q[:, :, start:stop] = grad_scores @ k
        grad_k[:, :, :last] += grad_scores.mT @ q
    return DirectGradients(grad_q, grad_k, grad_value, grad_weights)


def _weights(rpe_bias: Tensor, n_q: int, is_causal: bool) -> Tensor:
    """Return exp(b - max b), 0 for the offsets that a causal query does not see."""
    allowed = rpe_bias[:, :n_q] if is_causal else rpe_bias
    weights = torch.zeros(rpe_bias.shape)
    weights[:, : allowed.shape[1]] = torch.exp(allowed - allowed.amax(1, keepdim=True))
    return weights


def _sum_over_diagonals(tile: Tensor) -> Tensor:
    """``[H, rows, columns]`` -> ``[H, rows + columns - 1]``: entry t is the sum over j - i = t - (rows - 1)."""
    heads, rows, columns = tile.shape
    # last row first and each row one place further to the right: diagonals become columns
    padded = torch.nn.functional.pad(tile.flip(1), (0, rows))
    skewed = padded.flatten(1)[:, : rows * (rows + columns - 1)].view(heads, rows, rows + columns - 1)
    return skewed.sum(1)
