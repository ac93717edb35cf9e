import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import reference
from rpe_tvm.errors import DTypeError, RpeTvmError, ShapeError

LENGTHS = st.integers(1, 70)


def draw_arrays(seed, heads, n_q, n_k, channels, batch=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(heads, n_q + n_k - 1)), rng.normal(size=(batch, heads, n_k, channels))


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), LENGTHS, LENGTHS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_dense_and_fft_agree(seed, heads, n_q, n_k, channels):
    c, x = draw_arrays(seed, heads, n_q, n_k, channels, batch=2)
    dense = reference.toeplitz_dense(c, x, n_q)
    fft = reference.toeplitz_fft(c, x, n_q)
    assert dense.shape == fft.shape == (2, heads, n_q, channels)
    np.testing.assert_allclose(fft, dense, rtol=0, atol=1e-12 * np.abs(dense).max(initial=0.0))


@pytest.mark.parametrize("n_q, n_k", [(1, 1), (1, 5), (5, 1), (4, 3)])
def test_dense_is_the_definition(n_q, n_k):
    c, x = draw_arrays(0, 2, n_q, n_k, 3)
    expected = np.zeros((1, 2, n_q, 3))
    for i in range(n_q):
        for j in range(n_k):
            expected[:, :, i] += c[:, j - i + n_q - 1, None] * x[:, :, j]
    np.testing.assert_allclose(reference.toeplitz_dense(c, x, n_q), expected, rtol=1e-13)


@pytest.mark.parametrize("product", [reference.toeplitz_dense, reference.toeplitz_fft])
@pytest.mark.parametrize("n_q, n_k", [(0, 0), (0, 4), (4, 0)])
def test_zero_lengths(product, n_q, n_k):
    y = product(np.ones((2, max(n_q + n_k - 1, 0))), np.ones((3, 2, n_k, 5)), n_q)
    assert y.shape == (3, 2, n_q, 5)
    assert not y.any()


@given(st.integers(0, 2**32 - 1), LENGTHS, LENGTHS, st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_toeplitz_is_half_a_circulant_plus_half_a_twisted_circulant(seed, n_q, n_k, slack):
    """docs/operators.md: T = 1/2 (C+ + D* C- D) for every P >= max(n_q, n_k)."""
    c, x = draw_arrays(seed, 1, n_q, n_k, 1)
    size = max(n_q, n_k) + slack
    offset = np.zeros(2 * size)  # c by offset modulo 2P; -P .. P-1, zero where the matrix has no diagonal
    for t in range(-(n_q - 1), n_k):
        offset[t] = c[0, t + n_q - 1]
    s = np.arange(size)
    twist = np.exp(1j * np.pi * s / size)
    plus = offset[s] + offset[s - size]
    minus = (offset[s] - offset[s - size]) / twist
    index = (s[None, :] - s[:, None]) % size
    split = 0.5 * (plus[index] + twist.conj()[:, None] * minus[index] * twist[None, :])
    np.testing.assert_allclose(split[:n_q, :n_k], reference.toeplitz_matrix(c, n_q, n_k)[0], atol=1e-13)

    # The two spectra are those of all offsets at the frequencies k/P and (k - 1/2)/P.
    t = np.arange(-size, size)
    for table, shift in ((plus, 0.0), (minus, 0.5)):
        phases = np.exp(2j * np.pi * np.outer(s - shift, t) / size)
        np.testing.assert_allclose(size * np.fft.ifft(table), phases @ offset[t], atol=1e-11)


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_float32_fft_keeps_the_documented_error_bound(size):
    """docs/operators.md: |y^ - y| <= 23 u log2(P) sqrt(2P) |c| |x| with Euclidean norms."""
    torch = pytest.importorskip("torch")
    unit = 2.0**-24
    rng = np.random.default_rng(size)
    c = np.exp(3 * rng.normal(size=(1, 2 * size - 1))).astype(np.float32)
    x = rng.normal(size=(1, 1, size, 1)).astype(np.float32)
    by_offset = np.append(np.float32(0), c[0])  # offsets -P .. P-1
    behind, ahead = by_offset[:size], by_offset[size:]
    twist = np.exp(1j * np.pi * np.arange(size) / size).astype(np.complex64)
    y = np.zeros(size, np.complex64)
    for table, phases in ((ahead + behind, np.ones_like(twist)), ((ahead - behind) / twist, twist)):
        spectrum = size * torch.fft.ifft(torch.from_numpy(table.astype(np.complex64)))
        product = torch.fft.ifft(spectrum * torch.fft.fft(torch.from_numpy(phases * x[0, 0, :, 0])))
        assert product.dtype == torch.complex64
        y += 0.5 * phases.conj() * product.numpy()
    error = np.linalg.norm(y - reference.toeplitz_dense(c, x, size)[0, 0, :, 0])
    scale = np.sqrt(2 * size) * np.linalg.norm(c.astype(float)) * np.linalg.norm(x.astype(float))
    assert 0 < error <= 23 * unit * np.log2(size) * scale


@pytest.mark.parametrize("product", [reference.toeplitz_dense, reference.toeplitz_fft])
def test_wrong_shapes_are_refused(product):
    c, x = draw_arrays(0, 2, 4, 6, 3)
    with pytest.raises(ShapeError, match=r"Invalid shape of c: expected \[2, 10\], got \[2, 9\]; .*6 keys"):
        product(c, x, 5)
    with pytest.raises(ShapeError, match=r"Invalid shape of x: expected \[B, H, n_k, channels\], got \[2, 6"):
        product(c, x[0], 4)
    with pytest.raises(ShapeError, match="Invalid n_q: expected a length of at least 0, got -1"):
        product(c, x, -1)
    with pytest.raises(DTypeError, match="Invalid dtype of x: expected real numbers, got complex128"):
        product(c, x + 1j, 4)


def test_errors_are_the_expected_builtin_ones():
    assert issubclass(ShapeError, ValueError) and issubclass(ShapeError, RpeTvmError)
    assert issubclass(DTypeError, TypeError) and issubclass(DTypeError, RpeTvmError)


def test_toeplitz_matrix_takes_no_memory_of_its_own():
    c = np.arange(2.0 * 2000 - 1)[None]
    matrix = reference.toeplitz_matrix(c, 2000, 2000)
    assert np.shares_memory(matrix, c)
    assert matrix[0, 3, 10] == c[0, 10 - 3 + 1999]
