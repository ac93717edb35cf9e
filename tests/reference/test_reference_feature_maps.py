import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import reference
from rpe_tvm.errors import ShapeError

MAPS = {"prf": reference.prf, "nprf": reference.nprf}


def exact_kernel(name, q, k):
    if name == "nprf":
        return np.exp(q @ k / np.linalg.norm(q) / np.linalg.norm(k))
    return np.exp(q @ k / np.sqrt(q.size))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("seed", range(3))
def test_unbiased_with_the_papers_variance(name, seed):
    """Luo 2021, Lemma 2: mean exp(x.y), variance (exp(|x+y|^2) - 1) exp(x.y)^2 / m."""
    rng = np.random.default_rng(seed)
    head_dim, num_features, draws = 8, 16, 20_000
    q, k = rng.normal(size=(2, head_dim))
    projections = rng.normal(size=(draws * num_features, head_dim))
    phi_q, phi_k = (
        # One call with every draw's rows; sqrt(draws) turns 1/sqrt(all rows) into 1/sqrt(m).
        MAPS[name](x[None], projections).reshape(draws, num_features) * np.sqrt(draws)
        for x in (q, k)
    )
    estimates = np.sum(phi_q * phi_k, axis=-1)
    x, y = (q / np.linalg.norm(q), k / np.linalg.norm(k)) if name == "nprf" else (q, k) / np.sqrt(head_dim**0.5)
    variance = np.expm1(np.sum((x + y) ** 2)) * np.exp(2 * x @ y) / num_features
    assert abs(estimates.mean() - exact_kernel(name, q, k)) < 5 * np.sqrt(variance / draws)
    if name == "nprf":  # the tails of PRF are too heavy for a sharp check of the sample variance
        assert estimates.var() == pytest.approx(variance, rel=0.5)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_nprf_ignores_the_length_of_x(seed, scale):
    rng = np.random.default_rng(seed)
    x, projection = rng.normal(size=(2, 3, 7, 5)), rng.normal(size=(4, 5))
    np.testing.assert_allclose(reference.nprf(scale * x, projection), reference.nprf(x, projection), rtol=1e-12)


def test_formulas_with_plain_numbers():
    x, projection = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0], [0.5, -1.0]])
    unit = np.exp(np.array([[0.6 - 0.5, 0.3 - 0.8 - 0.5]])) / np.sqrt(2)
    np.testing.assert_allclose(reference.nprf(x, projection), unit, rtol=1e-14)
    root = 2**0.25
    plain = np.exp(np.array([[3 / root, (1.5 - 4) / root]]) - 25 / 2 / root**2) / np.sqrt(2)
    np.testing.assert_allclose(reference.prf(x, projection), plain, rtol=1e-14)


def test_zero_vector_and_non_finite_input():
    projection = np.ones((3, 2))
    np.testing.assert_allclose(reference.nprf(np.zeros((1, 2)), projection), np.exp(-0.5) / np.sqrt(3))
    np.testing.assert_allclose(reference.prf(np.zeros((1, 2)), projection), 1 / np.sqrt(3))
    for feature_map in MAPS.values():
        bad = feature_map(np.array([[np.nan, 1.0], [1.0, 1.0], [np.inf, -np.inf]]), projection)
        assert np.isnan(bad[0]).all() and np.isfinite(bad[1]).all() and np.isnan(bad[2]).all()


@pytest.mark.parametrize("feature_map", MAPS.values())
def test_shapes(feature_map):
    assert feature_map(np.ones((2, 3, 0, 5)), np.ones((4, 5))).shape == (2, 3, 0, 4)
    with pytest.raises(ShapeError, match=r"projection: expected \[m, 5\], got \[4, 6\]; its last axis"):
        feature_map(np.ones((3, 5)), np.ones((4, 6)))
    with pytest.raises(ShapeError, match=r"projection: expected m >= 1 and d >= 1, got \[0, 5\]"):
        feature_map(np.ones((3, 5)), np.ones((0, 5)))
    with pytest.raises(ShapeError, match=r"x: expected \[\.\.\., n, d\], got \[5\]"):
        feature_map(np.ones(5), np.ones((4, 5)))
