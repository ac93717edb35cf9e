"""Products with a rectangular Toeplitz matrix, dense and by FFT, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rpe_tvm.errors import DTypeError, ShapeError

Array = npt.NDArray[np.float64]


def as_float64(name: str, array: npt.ArrayLike) -> Array:
    """`array` as float64; complex numbers are refused, for their imaginary part would be lost."""
    found = np.asarray(array)
    if found.dtype.kind not in "fiub":
        raise DTypeError(f"Invalid dtype of {name}: expected real numbers, got {found.dtype}; convert it first")
    return found.astype(np.float64, copy=False)


def check_shape(name: str, array: Array, expected: tuple[int | str, ...], advice: str) -> None:
    """Raise `ShapeError` unless `array` has the `expected` axes; an axis given by name may have any size."""
    fits = array.ndim == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, array.shape, strict=True)
    )
    if not fits:
        axes = ", ".join(str(axis) for axis in expected)
        raise ShapeError(f"Invalid shape of {name}: expected [{axes}], got {list(array.shape)}; {advice}")


def offset_count(n_q: int, n_k: int) -> int:
    """Number of diagonals of an n_q x n_k matrix: n_q + n_k - 1, and 0 where both are 0."""
    return max(n_q + n_k - 1, 0)


def toeplitz_matrix(c: npt.ArrayLike, n_q: int, n_k: int) -> Array:
    """The matrix T with T[h, i, j] = c_{j-i}.

    Parameters
    ----------
    c
        Weights by offset, `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1.
    n_q, n_k
        Rows (queries) and columns (keys).

    Returns
    -------
    ndarray
        `[H, n_q, n_k]`, a read-only view of `c`: it takes no memory of its own.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eqs. 11-13, made rectangular for cross-attention.
    """
    c = as_float64("c", c)
    advice = "one weight is needed for each offset j - i from -(n_q - 1) to n_k - 1"
    check_shape("c", c, ("H", offset_count(n_q, n_k)), advice)
    if n_q == 0 or n_k == 0:
        return np.zeros((c.shape[0], n_q, n_k))
    # Row i is the window of n_k weights that starts at offset -i, so the windows come last row first.
    return np.lib.stride_tricks.sliding_window_view(c, n_k, axis=-1)[:, ::-1, :]


def toeplitz_dense(c: npt.ArrayLike, x: npt.ArrayLike, n_q: int) -> Array:
    """y_i = sum_j c_{j-i} x_j by a dense matrix product, O(n_q n_k) per channel.

    Parameters
    ----------
    c
        Weights by offset, `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1.
    x
        `[B, H, n_k, channels]`.
    n_q
        Rows of the result.

    Returns
    -------
    ndarray
        `[B, H, n_q, channels]`.

    Notes
    -----
    Luo et al. 2021, Eqs. 11-13.
    """
    c, x = _checked(c, x, n_q)
    result: Array = toeplitz_matrix(c, n_q, x.shape[2]) @ x
    return result


def toeplitz_fft(c: npt.ArrayLike, x: npt.ArrayLike, n_q: int) -> Array:
    """y_i = sum_j c_{j-i} x_j by one padded FFT, O(n log n) per channel.

    The matrix is the corner of a circulant matrix of size N >= n_q + n_k - 1 whose first column g holds
    g[u] = c_{-u} for u = 0 .. n_q-1 and g[N-t] = c_t for t = 1 .. n_k-1; the product with it is a cyclic
    convolution: y = irfft(rfft(g) * rfft(x, N))[:n_q].

    Parameters
    ----------
    c
        Weights by offset, `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1.
    x
        `[B, H, n_k, channels]`.
    n_q
        Rows of the result.

    Returns
    -------
    ndarray
        `[B, H, n_q, channels]`.

    Notes
    -----
    Luo et al. 2021, Algorithm 1 (FFTMatrixMul).
    """
    c, x = _checked(c, x, n_q)
    heads, n_k = c.shape[0], x.shape[2]
    if x.size == 0 or n_q == 0:
        return np.zeros((*x.shape[:2], n_q, x.shape[3]))
    size = 1 << (n_q + n_k - 2).bit_length()
    column = np.zeros((heads, size))
    column[:, :n_q] = c[:, n_q - 1 :: -1]
    column[:, size - n_k + 1 :] = c[:, : n_q - 1 : -1]
    spectrum = np.fft.rfft(column, axis=-1)[:, :, None] * np.fft.rfft(x, size, axis=2)
    return np.fft.irfft(spectrum, size, axis=2)[:, :, :n_q, :]


def _checked(c: npt.ArrayLike, x: npt.ArrayLike, n_q: int) -> tuple[Array, Array]:
    c, x = as_float64("c", c), as_float64("x", x)
    if n_q < 0:
        raise ShapeError(f"Invalid n_q: expected a length of at least 0, got {n_q}; pass the number of queries")
    check_shape("x", x, ("B", "H", "n_k", "channels"), "add axes for batch, heads or channels")
    heads, n_k = x.shape[1:3]
    advice = f"x has {heads} heads and {n_k} keys, and one weight is needed for each offset j - i"
    check_shape("c", c, (heads, offset_count(n_q, n_k)), advice)
    return c, x
