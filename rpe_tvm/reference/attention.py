"""Kernelized attention with relative positional encoding, in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from rpe_tvm.errors import ShapeError
from rpe_tvm.reference.feature_maps import nprf, prf
from rpe_tvm.reference.toeplitz import (
    Array,
    as_float64,
    check_shape,
    offset_count,
    toeplitz_fft,
    toeplitz_matrix,
)

FEATURE_MAPS = {"nprf": nprf, "prf": prf}

# attention_rows works on blocks of at most this many scores: 32 MiB in float64.
_SCORES_PER_BLOCK = 1 << 22


def weights(rpe_bias: npt.ArrayLike, n_q: int, is_causal: bool = False) -> Array:
    """Toeplitz weights c_t = exp(b_t - max b) of each head; causal: c_t = 0 for t > 0.

    The maximum cancels between numerator and denominator; it keeps exp from overflowing.

    Parameters
    ----------
    rpe_bias
        b, `[H, n_q + n_k - 1]`; offset t = j - i (key minus query) stands at index t + n_q - 1.
        -inf gives an offset the weight 0.
    n_q
        Number of queries.
    is_causal
        Whether keys after the query (t > 0) get the weight 0.

    Returns
    -------
    ndarray
        c, `[H, n_q + n_k - 1]`.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eqs. 10-11; causal: its footnote 3.
    """
    rpe_bias = as_float64("rpe_bias", rpe_bias)
    check_shape("rpe_bias", rpe_bias, ("H", "n_q + n_k - 1"), "give one row of biases per head")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and so it shall stay
        c: Array = np.exp(rpe_bias - rpe_bias.max(axis=-1, keepdims=True, initial=-np.inf))
    if is_causal:
        c[:, n_q:] = 0.0  # offset 1 stands at index n_q
    return c


def attention(
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    value: npt.ArrayLike,
    rpe_bias: npt.ArrayLike,
    projection: npt.ArrayLike,
    feature_map: str = "nprf",
    is_causal: bool = False,
    method: Literal["dense", "fft"] = "dense",
) -> tuple[Array, Array, Array]:
    """Kernelized attention with relative positional encoding.

    num_i = sum_j c_{j-i} (phi(q_i) . phi(k_j)) v_j; den_i is the same sum without v_j; out = num / den.

    Parameters
    ----------
    query
        `[B, H, n_q, d]`.
    key
        `[B, H, n_k, d]`.
    value
        `[B, H, n_k, d_v]`.
    rpe_bias
        b, `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1. c = `weights(rpe_bias, n_q)`.
    projection
        Random projection of the feature map, `[m, d]`.
    feature_map
        `"nprf"` or `"prf"`.
    is_causal
        Whether query i sees keys j <= i only.
    method
        `"dense"`: all n_q x n_k scores. `"fft"`: two Toeplitz products by FFT. They agree to rounding.

    Returns
    -------
    num, den, out : tuple of ndarray
        `[B, H, n_q, d_v]`, `[B, H, n_q]`, `[B, H, n_q, d_v]`. Without any key (n_k = 0) all are 0, as in
        `scaled_dot_product_attention`.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eq. 10; `"fft"` is its Algorithm 1.
    """
    query, key, value, rpe_bias = checked(query, key, value, rpe_bias)
    phi_q, phi_k = features_of(query, key, projection, feature_map)
    n_q, n_k = query.shape[2], key.shape[2]
    c = weights(rpe_bias, n_q, is_causal)
    num: Array
    den: Array
    if method == "dense":
        scores = (phi_q @ phi_k.swapaxes(-1, -2)) * toeplitz_matrix(c, n_q, n_k)
        num = scores @ value
        den = scores.sum(axis=-1)
    elif method == "fft":
        num = np.zeros((*query.shape[:3], value.shape[3]))
        for feature in range(phi_k.shape[-1]):  # one feature at a time: memory of the size of value
            one = slice(feature, feature + 1)
            num += phi_q[..., one] * toeplitz_fft(c, phi_k[..., one] * value, n_q)
        den = np.sum(phi_q * toeplitz_fft(c, phi_k, n_q), axis=-1)
    else:
        raise ValueError(f"Unknown method: expected 'dense' or 'fft', got {method!r}; choose one of the two")
    return num, den, _divide(num, den, n_k)


def attention_rows(
    rows: npt.ArrayLike,
    query: npt.ArrayLike,
    key: npt.ArrayLike,
    value: npt.ArrayLike,
    rpe_bias: npt.ArrayLike,
    projection: npt.ArrayLike,
    feature_map: str = "nprf",
    is_causal: bool = False,
) -> Array:
    """Rows of `attention(...)`'s `out`, dense, without any array of n_q x n_k numbers: for long sequences.

    Parameters
    ----------
    rows
        Query positions, `[r]`, each in 0 .. n_q-1.
    query, key, value, rpe_bias, projection, feature_map, is_causal
        As in `attention`.

    Returns
    -------
    ndarray
        `out[:, :, rows]`, `[B, H, r, d_v]`.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eq. 10.
    """
    query, key, value, rpe_bias = checked(query, key, value, rpe_bias)
    (batch, heads, n_q, _), n_k = query.shape, key.shape[2]
    rows = np.asarray(rows, dtype=np.int64)
    if rows.ndim != 1:
        raise ShapeError(f"Invalid shape of rows: expected [r], got {list(rows.shape)}; pass a flat list")
    if np.any((rows < 0) | (rows >= n_q)):
        raise ValueError(f"Invalid rows: expected 0 .. {n_q - 1}, got {rows.min()} .. {rows.max()}; query has {n_q}")
    phi_q, phi_k = features_of(query[:, :, rows], key, projection, feature_map)
    c = weights(rpe_bias, n_q, is_causal)
    out = np.empty((batch, heads, rows.size, value.shape[3]))
    step = max(1, _SCORES_PER_BLOCK // max(1, batch * heads * n_k))
    for start in range(0, rows.size, step):
        block = slice(start, start + step)
        index = np.arange(n_k) - rows[block, None] + n_q - 1
        scores = (phi_q[:, :, block] @ phi_k.swapaxes(-1, -2)) * c[:, index]
        out[:, :, block] = _divide(scores @ value, scores.sum(axis=-1), n_k)
    return out


def checked(
    query: npt.ArrayLike, key: npt.ArrayLike, value: npt.ArrayLike, rpe_bias: npt.ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """query, key, value and rpe_bias as float64, or `ShapeError` where they do not fit together."""
    query, key, value = as_float64("query", query), as_float64("key", key), as_float64("value", value)
    rpe_bias = as_float64("rpe_bias", rpe_bias)
    check_shape("query", query, ("B", "H", "n_q", "d"), "add axes for batch or heads")
    batch, heads, n_q, head_dim = query.shape
    check_shape("key", key, (batch, heads, "n_k", head_dim), "batch, heads and head size are those of query")
    n_k = key.shape[2]
    check_shape("value", value, (batch, heads, n_k, "d_v"), "batch, heads and length are those of key")
    advice = f"one bias per head for each offset j - i, with n_q = {n_q} and n_k = {n_k}"
    check_shape("rpe_bias", rpe_bias, (heads, offset_count(n_q, n_k)), advice)
    return query, key, value, rpe_bias


def features_of(query: Array, key: Array, projection: npt.ArrayLike, feature_map: str) -> tuple[Array, Array]:
    """phi(query) and phi(key)."""
    if feature_map not in FEATURE_MAPS:
        known = " or ".join(repr(name) for name in FEATURE_MAPS)
        raise ValueError(f"Unknown feature map: expected {known}, got {feature_map!r}; choose one of these")
    phi = FEATURE_MAPS[feature_map]
    return phi(query, projection), phi(key, projection)


def _divide(num: Array, den: Array, n_k: int) -> Array:
    if n_k == 0:
        return np.zeros_like(num)
    with np.errstate(divide="ignore", invalid="ignore"):  # a row without weight is 0 / 0 = NaN
        result: Array = num / den[..., None]
    return result
