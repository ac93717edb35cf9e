"""Positive random features of queries and keys, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rpe_tvm.errors import ShapeError
from rpe_tvm.reference.toeplitz import Array, as_float64, check_shape


def prf(x: npt.ArrayLike, projection: npt.ArrayLike) -> Array:
    """Positive random features: phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m) with x' = x d^(-1/4).

    With rows of W drawn from N(0, I_d), phi(q) . phi(k) is an unbiased estimate of exp(q . k / sqrt(d)).

    Parameters
    ----------
    x
        Queries or keys, `[..., n, d]`.
    projection
        W, `[m, d]`, shared by all heads.

    Returns
    -------
    ndarray
        `[..., n, m]`, positive.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eq. 5; the scaling by d^(-1/4) is that of softmax attention.
    """
    x, projection = _checked(x, projection)
    num_features, head_dim = projection.shape
    scaled = x * head_dim**-0.25
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and so it shall stay
        exponent = scaled @ projection.T - 0.5 * np.sum(scaled**2, axis=-1, keepdims=True)
    features: Array = np.exp(exponent) / np.sqrt(num_features)
    return features


def nprf(x: npt.ArrayLike, projection: npt.ArrayLike) -> Array:
    """Normalised positive random features: phi(x) = exp(W x^ - 1/2) / sqrt(m) with x^ = x / |x|_2.

    With rows of W drawn from N(0, I_d), phi(q) . phi(k) is an unbiased estimate of exp(q^ . k^). There is no
    temperature. A zero vector has no direction: x^ = 0 there.

    Parameters
    ----------
    x
        Queries or keys, `[..., n, d]`.
    projection
        W, `[m, d]`, shared by all heads.

    Returns
    -------
    ndarray
        `[..., n, m]`, positive.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Algorithm 1.
    """
    x, projection = _checked(x, projection)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, and so it shall stay
        unit = x / np.where(norm == 0.0, 1.0, norm)
    features: Array = np.exp(unit @ projection.T - 0.5) / np.sqrt(projection.shape[0])
    return features


def _checked(x: npt.ArrayLike, projection: npt.ArrayLike) -> tuple[Array, Array]:
    x, projection = as_float64("x", x), as_float64("projection", projection)
    if x.ndim < 2:
        raise ShapeError(f"Invalid shape of x: expected [..., n, d], got {list(x.shape)}; add an axis for positions")
    advice = "its last axis is that of the queries and keys, and every head shares it"
    check_shape("projection", projection, ("m", x.shape[-1]), advice)
    if projection.size == 0:
        raise ShapeError(
            f"Invalid shape of projection: expected m >= 1 and d >= 1, got {list(projection.shape)}; "
            "draw at least one random feature"
        )
    return x, projection
