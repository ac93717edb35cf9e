"""Toeplitz-weighted linear attention on ready features: what every feature map of a user's own goes through."""

from __future__ import annotations

import torch
from torch import Tensor


def toeplitz_attention(
    phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, *, is_causal: bool = False
) -> Tensor:
    """Attention whose features are given (Luo 2021, Eq. 10), with gradients for all four tensors.

    ``out_i = sum_j c[j-i] (phi_q_i . phi_k_j) v_j / sum_j c[j-i] (phi_q_i . phi_k_j)`` with ``c = exp(rpe_bias)``.
    A row whose denominator is exactly 0 (no key is left) is 0 and passes no gradient.

    Parameters
    ----------
    phi_q : Tensor
        ``[B, H, n_q, m]``, float32, on the CPU.
    phi_k : Tensor
        ``[B, H, n_k, m]``. A key whose features are 0 is not attended to.
    value : Tensor
        ``[B, H, n_k, d]``.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``; entry ``(j - i) + n_q - 1`` belongs to query i and key j.
    is_causal : bool
        Whether query i sees only keys j <= i.

    Returns
    -------
    Tensor
        ``[B, H, n_q, d]``.
    """
    # Placeholder in plain torch until the compiled backward is in.
    n_q, n_k = phi_q.shape[2], phi_k.shape[2]
    size = n_q + n_k
    c = torch.exp(rpe_bias - rpe_bias.amax(-1, keepdim=True).detach())
    if is_causal:
        c = torch.cat([c[:, :n_q], torch.zeros_like(c[:, n_q:])], -1)
    column = torch.cat([c[:, :n_q].flip(-1), c.new_zeros(c.shape[0], 1), c[:, n_q:].flip(-1)], -1)
    spectrum = torch.fft.rfft(column, size)[:, None, None]
    ones = torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1)
    x = phi_k.mT[:, :, :, None] * ones.mT[:, :, None]
    y = torch.fft.irfft(torch.fft.rfft(x, size) * spectrum, size)[..., :n_q]
    num = (phi_q.mT[:, :, :, None] * y).sum(2).mT
    den = num[..., -1:]
    return torch.where(den == 0, 0.0, num[..., :-1] / torch.where(den == 0, 1.0, den))
