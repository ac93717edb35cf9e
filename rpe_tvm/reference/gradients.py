"""Gradients of kernelized attention with relative positional encoding, dense, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rpe_tvm.reference.attention import attention, checked, features_of, weights
from rpe_tvm.reference.feature_maps import nprf, prf
from rpe_tvm.reference.toeplitz import Array, as_float64, check_shape, toeplitz_matrix


class Gradients(NamedTuple):
    """Gradients of sum(grad_out * out), each of the shape of its argument."""

    query: Array
    key: Array
    value: Array
    rpe_bias: Array
    projection: Array


def attention_gradients(
    grad_out: npt.ArrayLike,
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    value: npt.ArrayLike,
    rpe_bias: npt.ArrayLike,
    projection: npt.ArrayLike,
    feature_map: str = "nprf",
    is_causal: bool = False,
) -> Gradients:
    """Gradients of `attention(...)`'s `out`.

    With A_ij = c_{j-i} (phi(q_i) . phi(k_j)), den_i = sum_j A_ij and g_i = grad_out_i / den_i:
    dA_ij = g_i . (v_j - out_i), dv_j = sum_i A_ij g_i, d phi(q_i) = sum_j dA_ij c_{j-i} phi(k_j), d phi(k_j) =
    sum_i dA_ij c_{j-i} phi(q_i), and db_t is the sum of dA_ij A_ij along the diagonal t = j - i, because c = exp(b)
    up to a factor that cancels in out.

    Parameters
    ----------
    grad_out
        `[B, H, n_q, d_v]`.
    query, key, value, rpe_bias, projection, feature_map, is_causal
        As in `attention`.

    Returns
    -------
    Gradients
        Without any key (n_k = 0) all are 0. A zero vector has no direction: NPRF's gradient is 0 there.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eq. 10, differentiated.
    """
    _, den, out = attention(query, key, value, rpe_bias, projection, feature_map, is_causal)
    query, key, value, rpe_bias = checked(query, key, value, rpe_bias)
    projection = as_float64("projection", projection)
    grad_out = as_float64("grad_out", grad_out)
    check_shape("grad_out", grad_out, out.shape, "it is the gradient of attention's out")
    (heads, n_q), n_k = query.shape[1:3], key.shape[2]
    if n_k == 0:
        return Gradients(*(np.zeros_like(each) for each in (query, key, value, rpe_bias, projection)))
    phi_q, phi_k = features_of(query, key, projection, feature_map)
    toeplitz = toeplitz_matrix(weights(rpe_bias, n_q, is_causal), n_q, n_k)
    scores = (phi_q @ phi_k.swapaxes(-1, -2)) * toeplitz
    scaled = grad_out / den[..., None]
    grad_scores = scaled @ value.swapaxes(-1, -2) - np.sum(scaled * out, axis=-1, keepdims=True)
    grad_value = scores.swapaxes(-1, -2) @ scaled
    grad_query, from_query = _feature_gradients(grad_scores * toeplitz @ phi_k, query, projection, feature_map)
    grad_key, from_key = _feature_gradients(
        (grad_scores * toeplitz).swapaxes(-1, -2) @ phi_q, key, projection, feature_map
    )
    by_position = np.sum(grad_scores * scores, axis=0)
    grad_bias = np.stack([np.trace(by_position, t, axis1=1, axis2=2) for t in range(1 - n_q, n_k)], axis=-1)
    return Gradients(grad_query, grad_key, grad_value, grad_bias.reshape(heads, -1), from_query + from_key)


def _feature_gradients(grad_phi: Array, x: Array, projection: Array, feature_map: str) -> tuple[Array, Array]:
    """Gradients of a feature map's argument x and of its projection."""
    if feature_map == "nprf":
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        inverse = np.where(norm == 0.0, 0.0, 1.0 / np.where(norm == 0.0, 1.0, norm))
        unit = x * inverse
        grad_exponent = grad_phi * nprf(x, projection)
        along = grad_exponent @ projection
        grad_x = (along - unit * np.sum(unit * along, axis=-1, keepdims=True)) * inverse
    else:
        unit = x * projection.shape[1] ** -0.25
        grad_exponent = grad_phi * prf(x, projection)
        along = grad_exponent @ projection - np.sum(grad_exponent, axis=-1, keepdims=True) * unit
        grad_x = along * projection.shape[1] ** -0.25
    grad_projection: Array = np.einsum("bhnm,bhnd->md", grad_exponent, unit)
    return grad_x, grad_projection
