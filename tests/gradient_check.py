"""Whether compiled gradients of attention are those of the float64 reference."""

from __future__ import annotations

import numpy as np
import torch

from rpe_tvm import reference
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
    for name, x, y in zip(want._fields, got, want, strict=True):
        assert np.linalg.norm(x.numpy() - y) < 2e-5 * np.linalg.norm(y), name
