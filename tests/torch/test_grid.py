from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import grid_attention, grid_toeplitz_matmul

B, H, D, DV = 2, 3, 8, 6  # compiled for other tests, too
# Grids whose products have one length, that of a bucket: each length is compiled.
GRIDS = st.sampled_from([(h, w) for h in range(1, 10) for w in range(1, 10) if (h - 1) * (2 * w - 1) + w <= 64])


def elu_features(query, key):
    return F.elu(query) + 1, F.elu(key) + 1


def table(weights, height, width):
    """``[H, 2h - 1, 2w - 1]`` -> ``[H, hw, hw]``, from the definition."""
    row, column = (x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return weights[:, row - row[:, None] + height - 1, column - column[:, None] + width - 1]


def dense_attention(query, key, value, rpe_bias, is_causal=False, key_mask=None):
    height, width = query.shape[2:4]
    query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    phi_q, phi_k = elu_features(query, key)
    scores = (phi_q @ phi_k.mT) * table(rpe_bias, height, width).exp()
    if is_causal:
        scores = scores.tril()
    if key_mask is not None:
        scores = scores * key_mask.flatten(1)[:, None, None]
    den = scores.sum(-1, keepdim=True)
    out = scores @ value / torch.where(den == 0, 1.0, den)
    return out.unflatten(2, (height, width))


def inputs(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, height, width, D)] * 2 + [(B, H, height, width, DV), (H, 2 * height - 1, 2 * width - 1)]
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def both(got_of, want_of, tensors, rtol=1e-4):
    """Compare values and gradients with those in float64."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    got, want = got_of(*tensors), want_of(*doubles)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol / 10)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got_grads = torch.autograd.grad(got, tensors, weight.float())
    want_grads = torch.autograd.grad(want, doubles, weight)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        size = want_grad.abs().max().item() if want_grad.numel() else 0.0
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=rtol, atol=rtol / 5 * (1 + size))


@settings(max_examples=25, deadline=None)
@given(grid=GRIDS, is_causal=st.booleans(), masked=st.booleans())
def test_attention_is_the_dense_formula(grid, is_causal, masked):
    tensors = inputs(*grid)
    mask = torch.rand(B, *grid, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    both(
        lambda *x: grid_attention(*x, feature_map=elu_features, is_causal=is_causal, key_mask=mask),
        lambda *x: dense_attention(*x, is_causal=is_causal, key_mask=mask),
        tensors,
        rtol=2e-3 if is_causal else 1e-4,  # by FFT the first rows of causal attention lose digits
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 63), (63, 1), (2, 2), (9, 18), (5, 11)])
def test_sizes(height, width):
    both(lambda *x: grid_attention(*x, feature_map=elu_features), dense_attention, inputs(height, width))


@settings(max_examples=25, deadline=None)
@given(grid=GRIDS)
def test_toeplitz_matmul_is_the_dense_product(grid):
    x, _, _, weights = inputs(*grid)

    def dense(weights, x):
        return (table(weights, *grid) @ x.flatten(2, 3)).unflatten(2, grid)

    both(grid_toeplitz_matmul, dense, [weights, x])


def test_a_separable_table_is_the_sum_of_fastrpb():
    height, width = 4, 6
    x, _, _, _ = inputs(height, width)
    x = x.detach().double()
    w = torch.randn(H, 11, dtype=torch.float64)
    weights = w[:, 2:9, None] + w[:, None, :]  # offsets -3 .. 3 and -5 .. 5
    rows = table(w[:, 2:9, None], height, 1) @ x.sum(3)
    columns = table(w[:, None], 1, width) @ x.sum(2)
    want = rows[:, :, :, None] + columns[:, :, None]
    torch.testing.assert_close(grid_toeplitz_matmul(weights.float(), x.float()).double(), want, rtol=1e-4, atol=1e-4)


def test_tokens_of_a_vit_and_views():
    height, width = 3, 5
    query, key, value, rpe_bias = (x.detach() for x in inputs(height, width))
    want = grid_attention(query, key, value, rpe_bias, feature_map=elu_features)
    tokens = [x.flatten(2, 3).transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    grids = [x.unflatten(2, (height, width)) for x in tokens]
    assert not grids[0].is_contiguous()
    wide = torch.randn(H, 20, 30)
    view = wide[:, 3 : 3 + 5, 4 : 4 + 9].copy_(rpe_bias)
    got = grid_attention(*grids, view, feature_map=elu_features)
    torch.testing.assert_close(got, want)
    flipped = grid_attention(
        *(x.flip(2, 3).mT.mT for x in (query, key, value)), rpe_bias.flip(1, 2), feature_map=elu_features
    )
    torch.testing.assert_close(flipped.flip(2, 3), want)


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 3), (3, 0)])
def test_empty_grids(height, width):
    x = torch.zeros(B, H, height, width, D, requires_grad=True)
    weights = torch.zeros(H, max(2 * height - 1, 0), max(2 * width - 1, 0))
    assert grid_attention(x, x, x, weights, feature_map=elu_features).shape == x.shape
    out = grid_toeplitz_matmul(weights, x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


def test_an_empty_batch():
    x = torch.zeros(0, H, 2, 3, D)
    assert grid_attention(x, x, x, torch.zeros(H, 3, 5), feature_map=elu_features).shape == x.shape
    assert grid_toeplitz_matmul(torch.zeros(H, 3, 5), x).shape == x.shape


def test_a_masked_key_changes_nothing():
    query, key, value, rpe_bias = (x.detach() for x in inputs(3, 4))
    mask = torch.ones(B, 3, 4, dtype=torch.bool)
    mask[0, 2] = mask[1, :, 3] = False
    want = grid_attention(query, key, value, rpe_bias, feature_map=elu_features, key_mask=mask)
    key[0, :, 2], value[0, :, 2], key[1, :, :, 3], value[1, :, :, 3] = 7.0, -9.0, 5.0, 3.0
    got = grid_attention(query, key, value, rpe_bias, feature_map=elu_features, key_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    key[0, :, 2], value[1, :, :, 3] = torch.nan, torch.inf
    key.requires_grad_()
    out = grid_attention(query, key, value, rpe_bias, feature_map=elu_features, key_mask=mask)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), key)
    assert gradient.isfinite().all() and not gradient[0, :, 2].any() and gradient[0, :, 1].any()
    key = key.detach().nan_to_num()
    value = value.nan_to_num(posinf=1.0)
    nothing = torch.zeros_like(mask)
    key.requires_grad_()
    out = grid_attention(query, key, value, rpe_bias, feature_map=elu_features, key_mask=nothing)
    assert not out.any()
    out.sum().backward()
    assert not key.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(4, 3)]
    out = grid_attention(*tensors, feature_map=elu_features)
    assert out.dtype == dtype
    want = dense_attention(*(x.detach().double() for x in tensors))
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    out.sum().backward()
    assert all(x.grad.dtype == dtype for x in tensors)


def test_compile():
    torch._dynamo.reset()

    def attend(query, key, value, rpe_bias, key_mask):
        return grid_attention(query, key, value, rpe_bias, feature_map=elu_features, is_causal=True, key_mask=key_mask)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors, mask = inputs(3, 4), torch.rand(B, 3, 4) < 0.7
    got, want = compiled(*tensors, mask), attend(*tensors, mask)
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors), strict=True)
    for got_grad, want_grad in pairs:
        torch.testing.assert_close(got_grad, want_grad)


def test_errors():
    query, key, value, rpe_bias = (x.detach() for x in inputs(3, 4))

    def attend(query=query, key=key, value=value, rpe_bias=rpe_bias, feature_map=elu_features, key_mask=None):
        return grid_attention(query, key, value, rpe_bias, feature_map=feature_map, key_mask=key_mask)

    with pytest.raises(ShapeError, match=r"query: expected \[B, H, height, width, d\], got \[2, 3, 12, 8\]"):
        attend(query=query.flatten(2, 3))
    with pytest.raises(ShapeError, match=r"key: expected \[2, 3, 3, 4, 8\] as query has, got \[2, 3, 2, 4, 8\]"):
        attend(key=key[:, :, :2])
    with pytest.raises(ShapeError, match=r"value: expected \[2, 3, 3, 4, 'd'\] as key has"):
        attend(value=value[:, :, :, :2])
    with pytest.raises(ShapeError, match=r"rpe_bias: expected .* = \[3, 5, 7\], got \[3, 7, 5\]"):
        attend(rpe_bias=rpe_bias.mT)
    with pytest.raises(DTypeError, match="query: expected float32, bfloat16 or float16"):
        attend(query=query.double())
    with pytest.raises(DTypeError, match="value: expected .* the same"):
        attend(value=value.half())
    with pytest.raises(DTypeError, match="rpe_bias"):
        attend(rpe_bias=rpe_bias.long())
    with pytest.raises(ValueError, match="device of key"):
        attend(key=key.to("meta"))
    with pytest.raises(ValueError, match="device of rpe_bias"):
        attend(rpe_bias=rpe_bias.to("meta"))
    with pytest.raises(TypeError, match="expected a callable"):
        attend(feature_map="nprf")
    with pytest.raises(ShapeError, match=r"Invalid features: expected two tensors \[2, 3, 12, 'm'\]"):
        attend(feature_map=lambda q, k: (q, k[:, :, 1:]))
    with pytest.raises(ShapeError, match=r"key_mask: expected .* = \[2, 3, 4\], got \[2, 12\]"):
        attend(key_mask=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(DTypeError, match="key_mask: expected torch.bool"):
        attend(key_mask=torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match=r"x: expected \[B, H, height, width, d\]"):
        grid_toeplitz_matmul(rpe_bias, value.flatten(2, 3))
    with pytest.raises(ShapeError, match=r"weights: expected .* = \[3, 5, 7\]"):
        grid_toeplitz_matmul(rpe_bias[:2], value)
