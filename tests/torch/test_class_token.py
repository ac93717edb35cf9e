from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import class_token_attention

B, H, D, DV = 2, 3, 8, 6  # compiled for other tests, too
# Grids whose products have one length, that of a bucket: each length is compiled.
GRIDS = st.sampled_from([(h, w) for h in range(1, 10) for w in range(1, 10) if (h - 1) * (2 * w - 1) + w <= 64])


def elu_features(query, key):
    return F.elu(query) + 1, F.elu(key) + 1


def dense_bias(rpe_bias, class_bias, n):
    """``[H, 1 + n, 1 + n]``, entry by entry from the definition."""
    if rpe_bias.dim() == 3:
        height, width = (rpe_bias.shape[1] + 1) // 2, (rpe_bias.shape[2] + 1) // 2
        places = [(r, c) for r in range(height) for c in range(width)]
        offset = [[rpe_bias[:, s - r + height - 1, d - c + width - 1] for s, d in places] for r, c in places]
    else:
        offset = [[rpe_bias[:, j - i + n - 1] for j in range(n)] for i in range(n)]
    to_others, to_class, to_itself = class_bias.unbind(1)
    rows = [[to_itself, *[to_others] * n], *([to_class, *row] for row in offset)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def dense_attention(query, key, value, rpe_bias, class_bias, key_mask=None):
    phi_q, phi_k = elu_features(query, key)
    bias = dense_bias(rpe_bias, class_bias, query.shape[2] - 1)
    scores = (phi_q @ phi_k.mT) * (bias - bias.detach().amax(-1, keepdim=True)).exp()
    if key_mask is not None:
        scores = scores * key_mask[:, None, None]
    den = scores.sum(-1, keepdim=True)
    return scores @ value / torch.where(den == 0, 1.0, den)


def inputs(n, grid=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets = (max(2 * n - 1, 0),) if grid is None else tuple(2 * size - 1 for size in grid)
    shapes = [(B, H, 1 + n, D)] * 2 + [(B, H, 1 + n, DV), (H, *offsets), (H, 3)]
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def compare(tensors, key_mask=None, rtol=1e-4):
    """Values and gradients against float64."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    got = class_token_attention(*tensors, feature_map=elu_features, key_mask=key_mask)
    want = dense_attention(*doubles, key_mask=key_mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol / 10)
    weight = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got_grads = torch.autograd.grad(got, tensors, weight.float(), materialize_grads=True)
    want_grads = torch.autograd.grad(want, doubles, weight, materialize_grads=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        size = want_grad.abs().max().item() if want_grad.numel() else 0.0
        torch.testing.assert_close(got_grad.double(), want_grad, rtol=rtol, atol=rtol / 5 * (1 + size))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 40), masked=st.booleans())
def test_sequences(n, masked):
    mask = torch.rand(B, 1 + n, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    compare(inputs(n), mask)


@pytest.mark.parametrize("n", [1, 2, 63])
def test_sizes(n):
    compare(inputs(n))


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS, masked=st.booleans())
def test_grids(grid, masked):
    n = grid[0] * grid[1]
    mask = torch.rand(B, 1 + n, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    compare(inputs(n, grid), mask)


@pytest.mark.parametrize("grid", [None, (3, 4)])
@pytest.mark.parametrize("shift", [-200.0, -20.0, 20.0, 200.0])
def test_biases_of_very_different_size(shift, grid):
    # exp of the difference would overflow: 200 > log(3e38) = 88
    query, key, value, rpe_bias, class_bias = (x.detach() for x in inputs(12, grid))
    for changed in (
        [query, key, value, rpe_bias + shift, class_bias],
        [query, key, value, rpe_bias, class_bias + shift],
    ):
        compare([x.requires_grad_() for x in changed])


def test_a_number_added_to_all_biases_of_a_head_cancels():
    query, key, value, rpe_bias, class_bias = (x.detach() for x in inputs(9))
    want = class_token_attention(query, key, value, rpe_bias, class_bias, feature_map=elu_features)
    shift = torch.tensor([300.0, -300.0, 7.0])[:, None]
    got = class_token_attention(query, key, value, rpe_bias + shift, class_bias + shift, feature_map=elu_features)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_class_token_that_nobody_sees():
    query, key, value, rpe_bias, class_bias = (x.detach() for x in inputs(9))
    class_bias[:, 1] = -torch.inf
    got = class_token_attention(query, key, value, rpe_bias, class_bias, feature_map=elu_features)
    value[:, :, 0] += 100
    other = class_token_attention(query, key, value, rpe_bias, class_bias, feature_map=elu_features)
    torch.testing.assert_close(got[:, :, 1:], other[:, :, 1:])
    assert (got[:, :, 0] - other[:, :, 0]).abs().min() > 0.1


def test_masks():
    tensors = inputs(6)
    nothing = torch.zeros(B, 7, dtype=torch.bool)
    out = class_token_attention(*tensors, feature_map=elu_features, key_mask=nothing)
    assert not out.any()
    out.sum().backward()
    assert all(not x.grad.any() for x in tensors)
    lengths = torch.tensor([1, 4])  # the class token alone; with three tokens
    compare(inputs(6), torch.arange(7) < lengths[:, None])
    without_class = torch.ones(B, 7, dtype=torch.bool)
    without_class[:, 0] = False
    compare(inputs(6), without_class)


def test_views_and_an_empty_batch():
    tensors = [x.detach() for x in inputs(6, (2, 3))]
    want = class_token_attention(*tensors, feature_map=elu_features)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]]
    assert not views[0].is_contiguous()
    got = class_token_attention(*views, *tensors[3:], feature_map=elu_features)
    torch.testing.assert_close(got, want)
    none = [x[:0] for x in tensors[:3]]
    assert class_token_attention(*none, *tensors[3:], feature_map=elu_features).shape == (0, H, 7, DV)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(6, (2, 3))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = class_token_attention(*tensors, feature_map=elu_features)
    assert out.dtype == dtype
    want = dense_attention(*(x.detach().double() for x in tensors))
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    out.sum().backward()
    assert all(x.grad.dtype == dtype for x in tensors)


def test_compile():
    torch._dynamo.reset()

    def attend(*tensors):
        return class_token_attention(*tensors, feature_map=elu_features)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    tensors = inputs(12, (3, 4))
    got, want = compiled(*tensors), attend(*tensors)
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(want.sum(), tensors), strict=True)
    for got_grad, want_grad in pairs:
        torch.testing.assert_close(got_grad, want_grad)


def test_errors():
    query, key, value, rpe_bias, class_bias = (x.detach() for x in inputs(12))

    def attend(query=query, rpe_bias=rpe_bias, class_bias=class_bias, **others):
        return class_token_attention(query, key, value, rpe_bias, class_bias, feature_map=elu_features, **others)

    with pytest.raises(ShapeError, match=r"query: expected \[B, H, 1 \+ n, d\], got \[2, 3, 13\]"):
        attend(query=query[..., 0])
    with pytest.raises(ShapeError, match=r"rpe_bias: expected .* = \[3, 23\], got \[3, 25\]"):
        attend(rpe_bias=torch.zeros(H, 25))
    for shape in ((H, 5, 5), (H, 4, 7), (H, 5, 8)):
        with pytest.raises(ShapeError, match=r"height \* width = 12 tokens beside the class token, got"):
            attend(rpe_bias=torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"rpe_bias: expected .* = \[3, 5, 7\], got \[2, 5, 7\]"):
        attend(rpe_bias=torch.zeros(2, 5, 7))
    with pytest.raises(ShapeError, match=r"class_bias: expected \[H, 3\] = \[3, 3\], got \[3, 2\]"):
        attend(class_bias=class_bias[:, :2])
    with pytest.raises(ShapeError, match=r"key_mask: expected .* = \[2, 13\], got \[2, 12\]"):
        attend(key_mask=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(DTypeError, match="class_bias"):
        attend(class_bias=class_bias.double())
    with pytest.raises(ShapeError, match="got no token"):
        nothing = query[:, :, :0]
        class_token_attention(nothing, nothing, nothing, rpe_bias, class_bias, feature_map=elu_features)
