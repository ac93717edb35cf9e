"""Whether compiled gradients of attention are those of the float64 reference."""

from __future__ import annotations

import numpy as np
import torch

from rpe_tvm import reference
from rpe_tvm.peers import fft_length
from rpe_tvm.runtime import Instance


def check_gradients(instance: Instance, n_q: int, n_k: int, is_causal: bool = False) -> None:
    """Compare the gradients of ready features, values and biases with float64."""
    from rpe_tvm.torch.backward import attention_backward
    from rpe_tvm.torch.layouts import feature_memory, pack_features, unpack_features

    config = instance.config
    random = np.random.default_rng(0)
    m, d = config.num_features, config.head_dim
    phi_q, phi_k = (random.uniform(0.5, 1.5, (2, 3, n, m)) for n in (n_q, n_k))
    value, grad_out = random.standard_normal((2, 3, n_k, d)), random.standard_normal((2, 3, n_q, d))
    rpe_bias = random.standard_normal((3, n_q + n_k - 1))
    toeplitz = reference.toeplitz_matrix(reference.weights(rpe_bias, n_q, is_causal), n_q, n_k)
    scores = (phi_q @ phi_k.swapaxes(-1, -2)) * toeplitz
    out = scores @ value / scores.sum(-1, keepdims=True)
    q, k, v, b, g, o = (torch.from_numpy(x).float() for x in (phi_q, phi_k, value, rpe_bias, grad_out, out))
    phi = feature_memory(config, 2, 3, n_q, n_k)
    for features, buffer in ((q, phi.query), (k, phi.key)):
        pack_features(config, features, buffer)
    found = attention_backward(instance, g, o, phi, v, b, is_causal)
    got = (unpack_features(config, found.phi.query, n_q), unpack_features(config, found.phi.key, n_k), *found[1:])
    want = reference.core_gradients(grad_out, phi_q, phi_k, value, rpe_bias, is_causal)
    by_torch = _gradients_by_torch_fft(q, k, v, b, g, is_causal)
    for name, x, plain, y in zip(want._fields, got, by_torch, want, strict=True):
        error, of_torch = (np.linalg.norm(gradient.numpy() - y) / np.linalg.norm(y) for gradient in (x, plain))
        # tiles lose no digits to cancellation, as FFTs do where denominators are small
        limit = min(2 * of_torch + 1e-6, 2e-5) if config.algorithm == "fft" else 2e-6
        assert error < limit, (name, error, of_torch)


def _gradients_by_torch_fft(
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    value: torch.Tensor,
    rpe_bias: torch.Tensor,
    grad_out: torch.Tensor,
    is_causal: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients by autograd through torch.fft in float32, of ready features as of `peers.torch_fft_attention`."""
    inputs = [x.clone().requires_grad_() for x in (phi_q, phi_k, value, rpe_bias)]
    q, k, v, bias = inputs
    n_q, n_k = q.shape[2], k.shape[2]
    weights = torch.exp(bias - bias.detach().amax(-1, keepdim=True))
    if is_causal:
        weights = weights * (torch.arange(-(n_q - 1), n_k) <= 0)
    size = fft_length(n_q + n_k - 1)
    between = weights.new_zeros(len(weights), size - (n_q + n_k - 1))
    # the first column of the circulant matrix: offsets 0, -1, ..., zeros, and from n_k - 1 down to 1
    column = torch.cat((weights[:, :n_q].flip(-1), between, weights[:, n_q:].flip(-1)), -1)
    spectrum = torch.fft.rfft(column)[..., None]

    def toeplitz(x: torch.Tensor) -> torch.Tensor:
        full: torch.Tensor = torch.fft.irfft(torch.fft.rfft(x, size, dim=2) * spectrum, size, dim=2)
        return full[:, :, :n_q]

    products = toeplitz((k[..., None] * v[..., None, :]).flatten(-2)).unflatten(-1, (k.shape[-1], -1))
    out = torch.einsum("bhnm,bhnmd->bhnd", q, products) / (q * toeplitz(k)).sum(-1, keepdim=True)
    return torch.autograd.grad(out, inputs, grad_out)
