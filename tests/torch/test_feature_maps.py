"""Every feature map against its formula, vector by vector in float64, values and gradients."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import reference
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import (
    NPRF,
    PRF,
    RFA,
    T2R,
    TRF,
    FeatureMap,
    elu_features,
    gaussian_projection,
    make_feature_map,
    relu_features,
    sikf_features,
)

H = 3


def t2r(m, d):
    torch.manual_seed(0)
    return T2R(H, d, m)


def rfa(m, d):
    made = RFA(H, gaussian_projection(m, d, seed=1))
    torch.nn.init.uniform_(made.scale, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return made


MAPS = {
    "prf": lambda m, d: PRF(gaussian_projection(m, d, seed=1).requires_grad_()),
    "nprf": lambda m, d: NPRF(gaussian_projection(m, d, seed=1).requires_grad_()),
    "trf": lambda m, d: TRF(gaussian_projection(m, d, seed=1).requires_grad_()),
    "elu": lambda m, d: elu_features,
    "relu": lambda m, d: relu_features,
    "sikf": lambda m, d: sikf_features,
    "t2r": t2r,
    "rfa": rfa,
}


def weights_of(feature_map):
    """The tensors that a map is made of and that are learned."""
    if isinstance(feature_map, FeatureMap):
        return [feature_map.projection]
    return list(feature_map.parameters()) if isinstance(feature_map, torch.nn.Module) else []


def formula(name, x, head, weights, feature_map):
    """phi of one vector x ``[d]`` of a head, from the definition, in the dtype of its arguments."""
    d = len(x)
    if name in ("prf", "trf"):
        (w,), scaled = weights, x / d**0.25
        dots = torch.stack([row.dot(scaled) for row in w])
        if name == "prf":
            return torch.exp(dots - scaled.dot(scaled) / 2) / math.sqrt(len(w))
        both = torch.cat([dots.sin(), dots.cos()])
        return torch.exp(scaled.dot(scaled) / 2) * both / math.sqrt(len(w))
    if name in ("nprf", "rfa"):
        unit = x / x.dot(x).sqrt()
        if name == "nprf":
            return torch.stack([torch.exp(row.dot(unit) - 0.5) for row in weights[0]]) / math.sqrt(len(weights[0]))
        w = feature_map.projection.double()
        dots = torch.stack([row.dot(weights[0][head] * unit) for row in w])
        return torch.cat([dots.sin(), dots.cos()]) / math.sqrt(len(w))
    if name == "elu":
        return torch.stack([entry + 1 if entry > 0 else entry.exp() for entry in x])
    if name == "relu":
        return torch.stack([entry.clamp(min=0) + 0.001 for entry in x])
    if name == "sikf":
        return x.exp()
    w, b = weights
    return (w[head] @ x + b[head]).clamp(min=0)


def expected(name, query, key, weights, feature_map):
    """phi(query) and phi(key) by `formula`, and SIKF's shifts."""
    pair = [
        torch.stack(
            [
                torch.stack(
                    [torch.stack([formula(name, x, h, weights, feature_map) for x in one[h]]) for h in range(H)]
                )
                for one in vectors
            ]
        )
        for vectors in (query, key)
    ]
    if name == "sikf":
        pair[0] = pair[0] / query.detach().exp().amax(-1, keepdim=True)
        pair[1] = pair[1] / key.detach().exp().amax((-2, -1), keepdim=True)
    return tuple(pair)


def gradients(pair, tensors, seed):
    """Gradients of a random linear form of phi(query) and phi(key)."""
    g = torch.Generator().manual_seed(seed)
    loss = sum((phi * torch.randn(phi.shape, generator=g).to(phi.dtype)).sum() for phi in pair)
    return torch.autograd.grad(loss, tensors)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(MAPS)),
    n_q=st.integers(1, 4),
    n_k=st.integers(1, 4),
    m=st.integers(1, 5),
    d=st.integers(1, 6),
    seed=st.integers(0, 999),
    transposed=st.booleans(),
)
def test_values_and_gradients(name, n_q, n_k, m, d, seed, transposed):
    g = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, n, H, d, generator=g).transpose(1, 2) for n in (n_q, n_k))
    if not transposed:
        query, key = query.contiguous(), key.contiguous()
    feature_map = MAPS[name](m, d)
    tensors = [query.requires_grad_(), key.requires_grad_(), *weights_of(feature_map)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    pair = feature_map(query, key)
    want = expected(name, *exact[:2], exact[2:], feature_map)
    for got, phi in zip(pair, want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), phi, rtol=2e-5, atol=3e-6 * (1 + phi.abs().max().item()))
    for got, grad in zip(gradients(pair, tensors, seed), gradients(want, exact, seed), strict=True):
        torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-5 * (1 + grad.abs().max().item()))


@pytest.mark.parametrize(("kind", "definition"), [(PRF, reference.prf), (NPRF, reference.nprf)])
def test_prf_and_nprf_are_the_reference(kind, definition):
    query, key = torch.randn(2, H, 63, 8), torch.randn(2, H, 5, 8)
    query[0, 0, 0] = 0
    w = gaussian_projection(4, 8, seed=0)
    for got, x in zip(kind(w)(query, key), (query, key), strict=True):
        want = torch.from_numpy(definition(x.numpy(), w.numpy()))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_trf_estimates_the_exponential_of_the_scaled_product():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g, dtype=torch.float64).unbind()
    m = 100_000
    phi_q, phi_k = TRF(gaussian_projection(m, 8, seed=0))(q, k)
    # A term is exp(|x|^2/2 + |y|^2/2) cos(w . (x - y)), x = q / d^(1/4), so its deviation is at most that factor.
    bound = torch.exp((q.square().sum() + k.square().sum()) / (2 * 8**0.5))
    error = (phi_q * phi_k).sum() - torch.exp((q * k).sum() / 8**0.5)
    assert error.abs() < 5 * bound / m**0.5


@pytest.mark.parametrize("name", ["nprf", "rfa"])
def test_a_zero_vector_has_no_direction_and_no_gradient(name):
    feature_map = MAPS[name](4, 6)
    query, key = torch.randn(2, 1, H, 5, 6).requires_grad_().unbind()
    query = query.detach().clone()
    query[:, :, 2] = 0
    query.requires_grad_()
    phi_q, phi_k = feature_map(query, key)
    at_zero = math.exp(-0.5) / 2 if name == "nprf" else torch.tensor([0.0] * 4 + [0.5] * 4)
    torch.testing.assert_close(phi_q[:, :, 2], torch.zeros_like(phi_q[:, :, 2]) + at_zero)
    grads = gradients((phi_q, phi_k), [query, *weights_of(feature_map)], 0)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :, 2].any() and grads[0][:, :, 3].all()


@pytest.mark.parametrize("name", ["nprf", "rfa"])
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_only_the_direction_counts_however_long_the_vector(name, factor):
    feature_map = MAPS[name](4, 6)
    query, key = torch.randn(2, 1, H, 5, 6).unbind()
    for got, want in zip(feature_map(query * factor, key * factor), feature_map(query, key), strict=True):
        torch.testing.assert_close(got, want)


def test_sikf_takes_large_entries():
    query, key = torch.randn(2, 1, H, 5, 6).unbind()
    for got, want in zip(sikf_features(query + 1000, key - 1000), sikf_features(query, key), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(1, 0, 3), (1, 3, 0), (0, 3, 3)])
def test_nothing_gives_nothing(name, batch, n_q, n_k):
    phi_q, phi_k = MAPS[name](4, 6)(torch.randn(batch, H, n_q, 6), torch.randn(batch, H, n_k, 6))
    assert phi_q.shape[:3] == (batch, H, n_q) and phi_k.shape[:3] == (batch, H, n_k)
    assert phi_q.shape[3] == phi_k.shape[3]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_stays_nan_and_touches_no_other_query(name, bad):
    query, key = torch.randn(2, 1, H, 5, 6).unbind()
    feature_map = MAPS[name](4, 6)
    want, _ = feature_map(query, key)
    query = query.clone()
    query[0, 1, 2, 3] = bad
    got, _ = feature_map(query, key)
    others = torch.ones(1, H, 5, dtype=torch.bool)
    others[0, 1, 2] = False
    assert torch.equal(got[others], want[others])
    if math.isnan(bad) or name in ("nprf", "rfa", "prf", "trf"):
        assert not got[0, 1, 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [PRF, NPRF, TRF])
def test_a_projection_in_half_precision(kind, dtype):
    w = gaussian_projection(4, 6, seed=0).to(dtype)
    query, key = torch.randn(2, 1, H, 5, 6).unbind()
    for got, want in zip(kind(w)(query, key), kind(w.float())(query, key), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["t2r", "rfa"])
def test_modules_are_kept_and_moved_as_modules_are(name):
    feature_map, (query, key) = MAPS[name](4, 6), torch.randn(2, 1, H, 5, 6).unbind()
    want = feature_map(query, key)
    fresh = copy.deepcopy(feature_map)
    for x in fresh.state_dict().values():
        x.zero_()
    fresh.load_state_dict(feature_map.state_dict())
    for twin in (fresh, copy.deepcopy(feature_map), pickle.loads(pickle.dumps(feature_map))):
        assert all(torch.equal(x, y) for x, y in zip(twin(query, key), want, strict=True))
    assert "num_heads=3, head_dim=6" in repr(feature_map)


def test_names_and_sizes():
    w = gaussian_projection(16, 8, seed=0)
    assert (PRF(w).name, NPRF(w).name, TRF(w).name) == ("prf", "nprf", "trf")
    assert PRF(w).num_features == 16 and PRF(w).head_dim == 8
    assert type(make_feature_map("nprf", w)) is NPRF and type(make_feature_map("trf", w)) is TRF
    assert torch.equal(pickle.loads(pickle.dumps(PRF(w))).projection, w)
    with pytest.raises(AttributeError):
        PRF(w).projection = w


def test_an_unknown_feature_map_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown feature map 'relu': expected one of 'prf', 'nprf', 'trf'"):
        make_feature_map("relu", torch.zeros(2, 2))
    with pytest.raises(TypeError, match="base class"):
        FeatureMap(torch.zeros(2, 2))


@pytest.mark.parametrize("make", [PRF, NPRF, TRF, lambda w: RFA(H, w)])
def test_projections_are_checked(make):
    with pytest.raises(ShapeError, match=r"expected \[num_features, head_dim\], got \[3\]"):
        make(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"expected \[num_features, head_dim\], got \[0, 3\]"):
        make(torch.zeros(0, 3))
    with pytest.raises(DTypeError, match=r"expected torch.float32, .* got torch.float64"):
        make(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected a torch.Tensor"):
        make([[1.0]])


@pytest.mark.parametrize("name", ["prf", "nprf", "trf", "t2r", "rfa"])
def test_vectors_are_checked(name):
    feature_map, fits = MAPS[name](4, 6), torch.zeros(1, H, 5, 6)
    with pytest.raises(ShapeError, match=r"query: expected .*6\].* got \[1, 3, 5, 7\]"):
        feature_map(torch.zeros(1, H, 5, 7), fits)
    with pytest.raises(ShapeError, match=r"key: expected .*6\].* got \[6\]"):
        feature_map(fits, torch.zeros(6))
    if name in ("t2r", "rfa"):
        with pytest.raises(ShapeError, match=r"key: expected \[B, 3, n, 6\].* got \[1, 1, 5, 6\]"):
            feature_map(fits, torch.zeros(1, 1, 5, 6))


@pytest.mark.parametrize("wrong", ["num_heads", "head_dim", "num_features"])
def test_sizes_are_checked(wrong):
    with pytest.raises(ShapeError, match=f"Invalid {wrong}: expected a positive integer, got 0"):
        T2R(**{"num_heads": 2, "head_dim": 2, "num_features": 2, wrong: 0})
    with pytest.raises(ShapeError, match="Invalid num_heads"):
        RFA(0, torch.zeros(2, 2))
