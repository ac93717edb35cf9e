"""Gradients of kernelized attention with relative positional encoding, dense, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rpe_tvm.reference.attention import checked, features_of, weights
from rpe_tvm.reference.feature_maps import nprf, prf
from rpe_tvm.reference.toeplitz import Array, as_float64, check_shape, toeplitz_matrix


class Gradients(NamedTuple):
    """Gradients of sum(grad_out * out), each of the shape of its argument."""

    query: Array
    key: Array
    value: Array
    rpe_bias: Array
    projection: Array


class CoreGradients(NamedTuple):
    """The same where features are the arguments."""

    phi_q: Array
    phi_k: Array
    value: Array
    rpe_bias: Array


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
    query, key, value, rpe_bias = checked(query, key, value, rpe_bias)
    projection = as_float64("projection", projection)
    grad_out = as_float64("grad_out", grad_out)
    shape = (*query.shape[:3], value.shape[3])
    check_shape("grad_out", grad_out, shape, "it is the gradient of attention's out")
    if key.shape[2] == 0:
        return Gradients(*(np.zeros_like(each) for each in (query, key, value, rpe_bias, projection)))
    phi_q, phi_k = features_of(query, key, projection, feature_map)
    of_core = core_gradients(grad_out, phi_q, phi_k, value, rpe_bias, is_causal)
    grad_query, from_query = feature_gradients(of_core.phi_q, query, projection, feature_map)
    grad_key, from_key = feature_gradients(of_core.phi_k, key, projection, feature_map)
    return Gradients(grad_query, grad_key, of_core.value, of_core.rpe_bias, from_query + from_key)


def core_gradients(
    grad_out: Array, phi_q: Array, phi_k: Array, value: Array, rpe_bias: Array, is_causal: bool = False
) -> CoreGradients:
    """Gradients of attention on ready features, `[B, H, n_q, m]` and `[B, H, n_k, m]`.

    The other arguments are those of `attention_gradients`. A row whose denominator is 0 is 0, and passes no gradient.
    """
    (heads, n_q), n_k = phi_q.shape[1:3], phi_k.shape[2]
    toeplitz = toeplitz_matrix(weights(rpe_bias, n_q, is_causal), n_q, n_k)
    scores = (phi_q @ phi_k.swapaxes(-1, -2)) * toeplitz
    den = np.sum(scores, axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(den == 0.0, 0.0, grad_out / den)
        out = np.where(den == 0.0, 0.0, scores @ value / den)
    grad_scores = scaled @ value.swapaxes(-1, -2) - np.sum(scaled * out, axis=-1, keepdims=True)
    grad_products = grad_scores * toeplitz
    by_position = np.sum(grad_scores * scores, axis=0)
    grad_bias = np.stack([np.trace(by_position, t, axis1=1, axis2=2) for t in range(1 - n_q, n_k)], axis=-1)
    return CoreGradients(
        grad_products @ phi_k,
        grad_products.swapaxes(-1, -2) @ phi_q,
        scores.swapaxes(-1, -2) @ scaled,
        grad_bias.reshape(heads, -1),
    )


def feature_gradients(grad_phi: Array, x: Array, projection: Array, feature_map: str) -> tuple[Array, Array]:
    """Gradients of a feature map's argument x and of its projection from that of its features.

    Parameters
    ----------
    grad_phi
        `[B, H, n, m]`.
    x, projection, feature_map
        `[B, H, n, d]`, `[m, d]`, and which map, as in `attention`.
    """
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
