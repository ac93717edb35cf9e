"""`toeplitz_matmul` on compiled kernels against float64, its gradients, registration and errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import reference
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import grid_toeplitz_matmul, toeplitz_matmul

pytestmark = pytest.mark.compile

D = 8
LONG_D = 64  # of longer sequences, as README.md has it: examples there share the compiled product
EPS = torch.finfo(torch.float32).eps


def inputs(n, n_out, batch=2, heads=3, seed=0, d=D):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(heads, max(n_out + n - 1, 0), generator=g), torch.randn(batch, heads, n, d, generator=g)


def dense(weights, x, n_out):
    """The definition, differentiable: y_i = sum_j w[j-i] x_j."""
    offset = torch.arange(x.shape[2]) - torch.arange(n_out)[:, None]
    return weights[:, offset + n_out - 1] @ x


def check(got, expected, length):
    """The bound of docs/operators.md is of the Euclidean norm; in practice the error grows like log n."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    error = (got.double() - expected).norm() / expected.norm()
    assert error < EPS * (1 + np.log2(length + 1))


@pytest.mark.parametrize(
    ("n", "n_out", "d"), [(1, 1, D), (2, 2, D), (63, 63, D), (5, 60, D), (64, 1, D), (1000, 600, LONG_D)]
)
def test_values(n, n_out, d):
    weights, x = inputs(n, n_out, d=d)
    expected = reference.toeplitz_dense(weights.numpy(), x.numpy(), n_out)
    check(toeplitz_matmul(weights, x, n_out), torch.from_numpy(expected), max(n, n_out))


def test_values_of_a_long_sequence():
    weights, x = inputs(4097, 4097, batch=1, heads=1)
    expected = reference.toeplitz_dense(weights.numpy(), x.numpy(), 4097)
    check(toeplitz_matmul(weights, x), torch.from_numpy(expected), 4097)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 64), n_out=st.integers(1, 64), batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_any_sizes_of_a_bucket(n, n_out, batch, heads):
    weights, x = inputs(n, n_out, batch, heads, seed=n + 64 * n_out)
    check(toeplitz_matmul(weights, x, n_out), dense(weights.double(), x.double(), n_out), max(n, n_out))


@pytest.mark.parametrize(
    ("n", "n_out", "d"), [(1, 1, D), (2, 2, D), (63, 63, D), (7, 40, D), (40, 7, D), (1000, 600, LONG_D)]
)
def test_gradients(n, n_out, d):
    arguments = [each.requires_grad_() for each in inputs(n, n_out, d=d)]
    exact = [each.detach().double().requires_grad_() for each in arguments]
    upstream = torch.randn(2, 3, n_out, d)
    got = torch.autograd.grad(toeplitz_matmul(*arguments, n_out), arguments, upstream)
    expected = torch.autograd.grad(dense(*exact, n_out), exact, upstream.double())
    for one, other in zip(got, expected, strict=True):
        check(one, other, max(n, n_out))


def test_gradients_of_gradients():
    arguments = [each.requires_grad_() for each in inputs(20, 13)]
    exact = [each.detach().double().requires_grad_() for each in arguments]

    def second(product, arguments):
        y = product(*arguments, 13)
        first = torch.autograd.grad(y.square().sum(), arguments, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), arguments)

    for one, other in zip(second(toeplitz_matmul, arguments), second(dense, exact), strict=True):
        assert (one.double() - other).norm() < 1e-5 * other.norm()


def test_only_the_gradient_that_is_needed():
    weights, x = inputs(9, 9)
    toeplitz_matmul(weights.requires_grad_(), x).sum().backward()
    assert weights.grad is not None and x.grad is None


@pytest.mark.parametrize(("n", "n_out"), [(0, 5), (5, 0), (0, 0)])
def test_no_positions(n, n_out):
    weights, x = (each.requires_grad_() for each in inputs(n, n_out))
    y = toeplitz_matmul(weights, x, n_out)
    assert torch.equal(y, torch.zeros(2, 3, n_out, D))
    y.sum().backward()
    assert torch.equal(weights.grad, torch.zeros_like(weights)) and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(("batch", "heads"), [(0, 3), (2, 0)])
def test_no_batch_and_no_heads(batch, heads):
    assert toeplitz_matmul(*inputs(5, 5, batch, heads)).shape == (batch, heads, 5, D)


def test_views_give_what_copies_give():
    weights, x = inputs(40, 40)
    expected = toeplitz_matmul(weights, x)
    padded = torch.full((2, 40, 3, D + 3), torch.nan)
    padded[..., 1 : D + 1] = x.transpose(1, 2)
    sliced = padded[..., 1 : D + 1].transpose(1, 2)
    result = toeplitz_matmul(weights, sliced)
    assert torch.equal(result, expected) and result.transpose(1, 2).is_contiguous()
    assert torch.equal(toeplitz_matmul(weights, torch.stack([x, x], -1)[..., 0]), expected)
    assert torch.equal(toeplitz_matmul(weights.T.contiguous().T, x.mT.contiguous().mT), expected)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg() and torch.equal(toeplitz_matmul(weights, negated), expected)
    one = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(toeplitz_matmul(weights, one), toeplitz_matmul(weights, one.contiguous()))


def test_every_element_is_written():
    from rpe_tvm.torch.dispatch import get_toeplitz

    weights, x = inputs(50, 33)
    whole = torch.full((2, 3, 40, D), torch.nan)
    get_toeplitz(50, D).matmul(weights, x, whole[:, :, 2:35])
    assert torch.equal(whole[:, :, 2:35], toeplitz_matmul(weights, x, 33))
    assert whole[:, :, :2].isnan().all() and whole[:, :, 35:].isnan().all()


def test_what_is_not_finite_stays_so():
    weights, x = inputs(30, 30)
    x[1, 2, 7, 3] = torch.nan
    y = toeplitz_matmul(weights, x)
    assert y[1, 2, :, 3].isnan().all() and y[0].isfinite().all() and y[1, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    weights, x = inputs(30, 30)
    half = x.to(dtype).requires_grad_()
    y = toeplitz_matmul(weights, half)
    assert y.dtype == dtype and torch.equal(y, toeplitz_matmul(weights, half.float()).to(dtype))
    y.sum().backward()
    assert half.grad.dtype == dtype
    low = weights.to(dtype)
    assert torch.equal(toeplitz_matmul(low, x), toeplitz_matmul(low.float(), x))


def test_opcheck():
    def needs_grad(tensors):
        return [each.clone().requires_grad_() for each in tensors]

    for n, n_out in ((10, 10), (7, 12)):
        result = torch.library.opcheck(
            torch.ops.rpe_tvm.toeplitz_matmul.default, (*needs_grad(inputs(n, n_out)), n_out), rtol=1e-4, atol=1e-4
        )
        assert set(result.values()) == {"SUCCESS"}
    pair = needs_grad([inputs(10, 10)[1], inputs(10, 10, seed=1)[1]])
    result = torch.library.opcheck(torch.ops.rpe_tvm.toeplitz_weight_grad.default, tuple(pair), rtol=1e-4, atol=1e-4)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_forward_and_backward(dynamic):
    torch._dynamo.reset()

    def loss(weights, x):
        return (toeplitz_matmul(weights * 2, x) + x).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (10, 33):
        arguments = [each.requires_grad_() for each in inputs(n, n)]
        got = torch.autograd.grad(compiled(*arguments), arguments)
        for one, other in zip(got, torch.autograd.grad(loss(*arguments), arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, x: (w[:, 1:], x), ShapeError, r"weights: expected \[H, n_out \+ n - 1\] = \[3, 19\], got \[3, 18\]"),
        (lambda w, x: (w[:2], x), ShapeError, r"= \[3, 19\], got \[2, 19\]"),
        (lambda w, x: (w[0], x), ShapeError, r"weights: expected \[H, n_out \+ n - 1\], got \[19\]"),
        (lambda w, x: (w, x[0]), ShapeError, r"x: expected \[B, H, n, d\], got \[3, 10, 8\]"),
        (lambda w, x: (w, x, -1), ShapeError, r"n_out: expected a length of at least 0, got -1"),
        (lambda w, x: (w, x.double()), DTypeError, r"dtype of x: expected torch.float32, got torch.float64"),
        (lambda w, x: (w.double(), x), DTypeError, r"dtype of weights: expected torch.float32, got torch.float64"),
        (lambda w, x: (w, x.to("meta")), ValueError, r"device of x: expected a CPU tensor"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        toeplitz_matmul(*change(*inputs(10, 10)))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (6, 1), (5, 7), (7, 5)])
def test_two_dimensions(height, width):
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 2 * height - 1, 2 * width - 1, generator=g).requires_grad_()
    x = torch.randn(2, 3, height, width, D, generator=g).requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (weights, x)]

    rows, columns = (torch.arange(size) - torch.arange(size)[:, None] + size - 1 for size in (height, width))
    matrix = exact[0][:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)
    expected = (matrix @ exact[1].flatten(2, 3)).view(2, 3, height, width, D)
    got = grid_toeplitz_matmul(weights, x)
    check(got, expected, 2 * height * width)
    upstream = torch.randn(got.shape, generator=g)
    pairs = itertools.zip_longest(
        torch.autograd.grad(got, (weights, x), upstream), torch.autograd.grad(expected, exact, upstream.double())
    )
    for one, other in pairs:
        check(one, other, 2 * height * width)


def test_two_dimensions_without_positions_and_errors():
    assert grid_toeplitz_matmul(torch.zeros(3, 0, 7), torch.zeros(2, 3, 0, 4, D)).shape == (2, 3, 0, 4, D)
    with pytest.raises(ShapeError, match=r"weights: expected .* = \[3, 9, 7\], got \[3, 9, 9\]"):
        grid_toeplitz_matmul(torch.zeros(3, 9, 9), torch.zeros(2, 3, 5, 4, D))
    with pytest.raises(ShapeError, match=r"x: expected \[B, H, height, width, d\]"):
        grid_toeplitz_matmul(torch.zeros(3, 9, 9), torch.zeros(2, 3, 20, D))
