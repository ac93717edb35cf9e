"""The FastRPB modules against their definition in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import FastRPB, FastRPB2d

pytestmark = pytest.mark.compile

B, H, D, LENGTH = 2, 3, 8, 12


def filled(module):
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weights)
    return module


def weight(module, t):
    """w[t] of all heads, 0 past the range."""
    if abs(t) >= module.max_length or (module.is_causal and t > 0):
        return torch.zeros(H, dtype=torch.float64)
    index = t + module.max_length - 1 if module.kind == "full" else abs(t)
    return module.weights[:, index].double()


def matrix(module, n):
    return torch.stack([torch.stack([weight(module, j - i) for j in range(n)], -1) for i in range(n)], 1)


@pytest.mark.parametrize("n", [1, 2, 11, 12, 13, 40])
@pytest.mark.parametrize("kind", ["full", "symmetric"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_values_and_gradients(kind, is_causal, n):
    module = filled(FastRPB(H, LENGTH, kind, is_causal))
    value = torch.randn(B, H, n, D)
    expected = matrix(module, n) @ value.double()
    got = module(value)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=2e-5)
    upstream = torch.randn(got.shape)
    (one,) = torch.autograd.grad(got, module.weights, upstream)
    (other,) = torch.autograd.grad(expected, module.weights, upstream.double())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (5, 3), (2, 20)])
@pytest.mark.parametrize("kind", ["full", "symmetric"])
def test_two_dimensions(kind, height, width):
    module = filled(FastRPB2d(H, LENGTH, kind))
    value = torch.randn(B, H, height * width, D)
    rows, columns = matrix(module, height), matrix(module, width)
    w = (rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten(3).flatten(1, 2)
    expected = w @ value.double()
    got = module(value, height, width)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=2e-5)
    upstream = torch.randn(got.shape)
    (one,) = torch.autograd.grad(got, module.weights, upstream)
    (other,) = torch.autograd.grad(expected, module.weights, upstream.double())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-4)


def test_training_starts_at_plain_attention_and_moves():
    module, value = FastRPB(H, LENGTH), torch.randn(B, H, 9, D)
    plain = torch.nn.functional.scaled_dot_product_attention(value, value, value)
    out = plain + module(value)
    assert torch.equal(out, plain)
    out.square().sum().backward()
    assert module.weights.grad[:, LENGTH - 9 : LENGTH + 8].abs().min() > 0
    assert torch.equal(module.weights.grad[:, : LENGTH - 9], torch.zeros(H, LENGTH - 9))


@pytest.mark.parametrize("module", [FastRPB(H, LENGTH), FastRPB(H, LENGTH, "symmetric", is_causal=True)], ids=repr)
def test_copies_state_and_compile(module):
    module = filled(module)
    value = torch.randn(B, H, 9, D)
    expected = module(value)
    again = FastRPB(H, LENGTH, module.kind, module.is_causal)
    again.load_state_dict(module.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again, compiled):
        assert torch.equal(each(value), expected)
    compiled(value).sum().backward()
    assert module.weights.grad.isfinite().all()


def test_repr():
    assert repr(FastRPB(2, 5)) == "FastRPB(num_heads=2, max_length=5, kind='full')"
    assert repr(FastRPB2d(2, 5, "symmetric")) == "FastRPB2d(num_heads=2, max_length=5, kind='symmetric')"
    assert repr(FastRPB(2, 5, is_causal=True)).endswith("is_causal=True)")


def test_no_positions():
    assert FastRPB(H, LENGTH)(torch.zeros(B, H, 0, D)).shape == (B, H, 0, D)
    assert FastRPB2d(H, LENGTH)(torch.zeros(B, H, 0, D), 0, 4).shape == (B, H, 0, D)


def test_errors():
    with pytest.raises(ValueError, match="kind: expected 'full' or 'symmetric', got 'half'"):
        FastRPB(H, LENGTH, "half")
    with pytest.raises(ShapeError, match="max_length: expected a positive integer, got 0"):
        FastRPB(H, 0)
    with pytest.raises(ShapeError, match=r"value: expected \[B, 3, n, d\], got \[2, 4, 5, 8\]"):
        FastRPB(H, LENGTH)(torch.zeros(B, 4, 5, D))
    with pytest.raises(ShapeError, match=r"height \* width = 6, d\], got \[2, 3, 5, 8\]"):
        FastRPB2d(H, LENGTH)(torch.zeros(B, H, 5, D), 2, 3)
    with pytest.raises(DTypeError, match="dtype of x: expected torch.float32, got torch.float64"):
        FastRPB(H, LENGTH)(torch.zeros(B, H, 5, D, dtype=torch.float64))
