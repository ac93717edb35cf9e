import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import reference
from rpe_tvm.errors import ShapeError

MAPS = ("nprf", "prf")


def make_inputs(seed, n_q, n_k, heads=2, batch=1, head_dim=4, num_features=3, value_dim=5):
    rng = np.random.default_rng(seed)
    return {
        "query": rng.normal(size=(batch, heads, n_q, head_dim)),
        "key": rng.normal(size=(batch, heads, n_k, head_dim)),
        "value": rng.normal(size=(batch, heads, n_k, value_dim)),
        "rpe_bias": rng.normal(size=(heads, max(n_q + n_k - 1, 0))),
        "projection": rng.normal(size=(num_features, head_dim)),
    }


@given(
    seed=st.integers(0, 2**32 - 1),
    n_q=st.integers(1, 70),
    n_k=st.integers(1, 70),
    heads=st.integers(1, 3),
    batch=st.integers(1, 2),
    num_features=st.integers(1, 9),
    feature_map=st.sampled_from(MAPS),
    is_causal=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_dense_and_fft_agree(seed, n_q, n_k, heads, batch, num_features, feature_map, is_causal):
    inputs = make_inputs(seed, n_q, n_k, heads, batch, num_features=num_features)
    dense = reference.attention(**inputs, feature_map=feature_map, is_causal=is_causal)
    fft = reference.attention(**inputs, feature_map=feature_map, is_causal=is_causal, method="fft")
    # The error of a Toeplitz product by FFT is relative to its largest terms, not to each entry.
    phi_q, phi_k = (getattr(reference, feature_map)(inputs[x], inputs["projection"]) for x in ("query", "key"))
    c = reference.weights(inputs["rpe_bias"], n_q, is_causal)
    largest = phi_q.max() * phi_k.max() * num_features * c.sum(axis=-1).max()
    for got, expected, scale in zip(fft[:2], dense[:2], (np.abs(inputs["value"]).max(), 1.0), strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * largest * scale)


@pytest.mark.parametrize("n", [1, 2, 63, 500])
@pytest.mark.parametrize("feature_map", MAPS)
def test_out_agrees_to_1e_12(n, feature_map):
    inputs = make_inputs(n, n, n)
    dense = reference.attention(**inputs, feature_map=feature_map)[2]
    fft = reference.attention(**inputs, feature_map=feature_map, method="fft")[2]
    np.testing.assert_allclose(fft, dense, rtol=0, atol=1e-12 * np.abs(dense).max())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_q, n_k", [(4, 4), (3, 6), (6, 3)])
def test_definition(n_q, n_k, is_causal):
    """Luo 2021, Eq. 10, written as loops."""
    inputs = make_inputs(1, n_q, n_k, heads=1)
    phi_q, phi_k = (reference.nprf(inputs[x], inputs["projection"])[0, 0] for x in ("query", "key"))
    bias = inputs["rpe_bias"][0]
    for i in range(n_q):
        num, den = 0.0, 0.0
        for j in range(i + 1 if is_causal else n_k):
            if j < n_k:
                weight = np.exp(bias[j - i + n_q - 1]) * (phi_q[i] @ phi_k[j])
                num, den = num + weight * inputs["value"][0, 0, j], den + weight
        got_num, got_den, out = reference.attention(**inputs, is_causal=is_causal)
        np.testing.assert_allclose(out[0, 0, i], num / den, rtol=1e-12)
        np.testing.assert_allclose(got_num[0, 0, i] * np.exp(bias.max()), num, rtol=1e-12)
        np.testing.assert_allclose(got_den[0, 0, i] * np.exp(bias.max()), den, rtol=1e-12)


@given(
    seed=st.integers(0, 2**32 - 1),
    n_q=st.integers(1, 50),
    n_k=st.integers(0, 50),
    feature_map=st.sampled_from(MAPS),
    is_causal=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_those_of_attention(seed, n_q, n_k, feature_map, is_causal, data):
    inputs = make_inputs(seed, n_q, n_k, batch=2)
    rows = data.draw(st.lists(st.integers(0, n_q - 1), max_size=8))
    options = {"feature_map": feature_map, "is_causal": is_causal}
    got = reference.attention_rows(rows, **inputs, **options)
    expected = reference.attention(**inputs, **options)[2][:, :, rows]
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-13)


def test_rows_in_blocks(monkeypatch):
    inputs = make_inputs(0, 90, 70)
    whole = reference.attention_rows(range(90), **inputs)
    module = sys.modules[reference.attention_rows.__module__]  # reference.attention is the function
    monkeypatch.setattr(module, "_SCORES_PER_BLOCK", 2 * 70 * 7)
    np.testing.assert_allclose(reference.attention_rows(range(90), **inputs), whole, rtol=1e-13)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_adding_a_number_to_the_bias_changes_nothing(feature_map, is_causal):
    inputs = make_inputs(0, 17, 11)
    shifted = dict(inputs, rpe_bias=inputs["rpe_bias"] + np.array([[300.0], [-1e4]]))
    for got, expected in zip(
        reference.attention(**shifted, feature_map=feature_map, is_causal=is_causal),
        reference.attention(**inputs, feature_map=feature_map, is_causal=is_causal),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_nprf_ignores_the_length_of_queries_and_keys():
    inputs = make_inputs(0, 17, 11)
    scaled = dict(inputs, query=inputs["query"] * 7.5, key=inputs["key"] * 0.01)
    np.testing.assert_allclose(
        reference.attention(**scaled)[2], reference.attention(**inputs)[2], rtol=1e-11, atol=1e-13
    )


def test_many_features_approach_softmax_attention():
    """Luo 2021, Eq. 6 is the limit of Eq. 10 with PRF."""
    inputs = make_inputs(3, 12, 9, num_features=100_000)
    inputs["query"] *= 0.5
    inputs["key"] *= 0.5
    offset = np.arange(9) - np.arange(12)[:, None]
    scores = inputs["query"] @ inputs["key"].swapaxes(-1, -2) / 2 + inputs["rpe_bias"][:, offset + 11]
    alpha = np.exp(scores)
    expected = alpha / alpha.sum(axis=-1, keepdims=True) @ inputs["value"]
    np.testing.assert_allclose(reference.attention(**inputs, feature_map="prf")[2], expected, atol=0.03)


@pytest.mark.parametrize("method", ["dense", "fft"])
def test_causal_output_ignores_later_keys(method):
    inputs = make_inputs(0, 9, 9)
    changed = {name: inputs[name].copy() for name in ("key", "value", "rpe_bias")}
    changed["key"][:, :, 5:] += 1.0
    changed["value"][:, :, 5:] += 1.0
    before = reference.attention(**inputs, is_causal=True, method=method)[2]
    after = reference.attention(**{**inputs, **changed}, is_causal=True, method=method)[2]
    np.testing.assert_allclose(after[:, :, :5], before[:, :, :5], rtol=1e-10)
    np.testing.assert_allclose(before[:, :, 0], inputs["value"][:, :, 0], rtol=1e-10)


def test_weights():
    bias = np.array([[0.0, 1.0, 3.0, 2.0], [5.0, -np.inf, 5.0, 5.0]])
    c = np.exp([[-3.0, -2.0, 0.0, -1.0], [0.0, -np.inf, 0.0, 0.0]])
    np.testing.assert_allclose(reference.weights(bias, 3), c)
    np.testing.assert_allclose(reference.weights(bias, 2, True), c * [1, 1, 0, 0])
    assert reference.weights(np.zeros((2, 0)), 0).shape == (2, 0)


@pytest.mark.parametrize("method", ["dense", "fft"])
@pytest.mark.parametrize("n_q, n_k", [(0, 0), (0, 3), (3, 0)])
def test_zero_lengths(method, n_q, n_k):
    inputs = make_inputs(0, n_q, n_k)
    num, den, out = reference.attention(**inputs, method=method)
    assert num.shape == out.shape == (1, 2, n_q, 5)
    assert den.shape == (1, 2, n_q)
    assert not out.any()


@pytest.mark.parametrize("method", ["dense", "fft"])
def test_non_finite_input_stays_non_finite(method):
    inputs = make_inputs(0, 6, 6)
    inputs["value"][0, 0, 2, 1] = np.nan
    out = reference.attention(**inputs, method=method)[2]
    assert np.isnan(out[0, 0, :, 1]).all()
    assert np.isfinite(out[0, 1]).all()


def test_wrong_input_is_refused():
    inputs = make_inputs(0, 6, 7)

    def refused(match, error=ShapeError, **changes):
        for function in (reference.attention, lambda **kw: reference.attention_rows([0], **kw)):
            with pytest.raises(error, match=match):
                function(**{**inputs, **changes})

    refused(r"query: expected \[B, H, n_q, d\], got \[2, 6, 4\]; ", query=inputs["query"][0])
    refused(r"key: expected \[1, 2, n_k, 4\], got \[1, 2, 7, 3\]; ", key=inputs["key"][..., :3])
    refused(r"value: expected \[1, 2, 7, d_v\], got \[1, 2, 6, 5\]; ", value=inputs["value"][:, :, :6])
    refused(r"rpe_bias: expected \[2, 12\], got \[2, 13\]; .*n_q = 6", rpe_bias=np.zeros((2, 13)))
    refused(r"projection: expected \[m, 4\], got \[3, 5\]; ", projection=np.zeros((3, 5)))
    refused("Unknown feature map: expected 'nprf' or 'prf', got 'relu'", ValueError, feature_map="relu")
    with pytest.raises(ValueError, match="Unknown method: expected 'dense' or 'fft', got 'fast'"):
        reference.attention(**inputs, method="fast")
    for rows in ([6], [-1]):
        with pytest.raises(ValueError, match=r"Invalid rows: expected 0 \.\. 5, got"):
            reference.attention_rows(rows, **inputs)
    with pytest.raises(ShapeError, match=r"rows: expected \[r\], got \[1, 1\]"):
        reference.attention_rows([[0]], **inputs)
