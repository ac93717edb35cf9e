"""Toeplitz products and their gradients on a GPU, against the float64 reference. Skipped where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpe_tvm import reference
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.plan import gpu_toeplitz
from rpe_tvm.torch import FastRPB, FastRPB2d, grid_toeplitz_matmul, toeplitz_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compile,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
# one kernel up to 8192 positions, columns and rows beyond
SIZES = [(1, 1), (63, 64), (100, 37), (37, 100), (1000, 1000), (3000, 4097), (8001, 8192), (10_000, 9_000)]


def _inputs(n, n_out, d=16, batch=2, heads=3, device="cuda"):
    g = torch.Generator().manual_seed(n + n_out)
    weights = torch.randn(heads, n_out + n - 1, generator=g)
    return weights.to(device), torch.randn(batch, heads, n, d, generator=g).to(device)


def _float64(x):
    return x.detach().double().cpu().numpy()


def _weight_gradient(grad, x):
    """dw[t] = sum of g_i x_{i+t}, by transforms of twice the length, in float64."""
    n_out, n = grad.shape[2], x.shape[2]
    spectra = [np.fft.rfft(_float64(each), n_out + n, axis=2) for each in (grad, x)]
    lags = np.fft.irfft((spectra[0].conj() * spectra[1]).sum((0, 3)), n_out + n)
    return np.concatenate([lags[:, lags.shape[1] - (n_out - 1) :], lags[:, :n]], -1)


def _error(found, expected):
    found = _float64(found)
    assert np.isfinite(found).all()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("d", [16, 5])
@pytest.mark.parametrize(("n", "n_out"), SIZES)
def test_values_and_gradients(n, n_out, d, poisoned):
    tensors = [x.requires_grad_() for x in _inputs(n, n_out, d)]
    weights, x = tensors
    out = toeplitz_matmul(weights, x, n_out)
    assert _error(out, reference.toeplitz_fft(_float64(weights), _float64(x), n_out)) < 2e-6
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda()
    found = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    assert _error(found[0], _weight_gradient(grad, x)) < 4e-6
    flipped = _float64(weights)[:, ::-1]
    assert _error(found[1], reference.toeplitz_fft(flipped, _float64(grad), n)) < 2e-6
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(out, tensors, grad), strict=True))


def test_a_long_sequence_of_many_heads(poisoned):
    """More heads than columns and rows take at once, and the longest rows."""
    n, heads = 100_000, 10
    config = gpu_toeplitz.choose(n, 64)
    assert gpu_toeplitz.heads_at_once(config, heads) < heads
    tensors = [x.requires_grad_() for x in _inputs(n, n, 64, batch=1, heads=heads)]
    weights, x = tensors
    out = toeplitz_matmul(weights, x)
    assert _error(out, reference.toeplitz_fft(_float64(weights), _float64(x), n)) < 4e-6
    (found,) = torch.autograd.grad(out.square().sum(), weights)
    assert _error(found, _weight_gradient(2 * out, x)) < 1e-5


@pytest.mark.parametrize("n", [131_072, 262_144])
def test_the_longest(n, poisoned):
    weights, x = _inputs(n, n, 2, batch=1, heads=1)
    assert _error(toeplitz_matmul(weights, x), reference.toeplitz_fft(_float64(weights), _float64(x), n)) < 4e-6
    with pytest.raises(ShapeError, match="at most 262144 inputs and outputs on a GPU"):
        toeplitz_matmul(torch.empty(1, 262_145, device="cuda"), x[:, :, :1], 262_145)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    weights, x = _inputs(300, 300)
    half = x.to(dtype).requires_grad_()
    out = toeplitz_matmul(weights, half)
    assert out.dtype == dtype
    expected = reference.toeplitz_fft(_float64(weights), _float64(half), 300)
    assert _error(out, expected) < torch.finfo(dtype).eps
    out.float().square().sum().backward()
    assert half.grad.dtype == dtype
    again = reference.toeplitz_fft(_float64(weights)[:, ::-1], _float64(2 * out.float().to(dtype)), 300)
    assert _error(half.grad, again) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("n", [300, 9000])
def test_views_give_the_same(n):
    weights, x = _inputs(n, n)
    want = toeplitz_matmul(weights, x)
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.nn.functional.pad(x, (1, 0))[..., 1:],
        torch.stack([x, x], -1)[..., 0],
    ]
    for view in views:
        assert torch.equal(toeplitz_matmul(weights, view), want)
    expanded = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(toeplitz_matmul(weights, expanded)[2], toeplitz_matmul(weights, x[:1])[0])


def test_empty_inputs_and_nan():
    weights, x = _inputs(5, 5)
    assert torch.equal(toeplitz_matmul(weights[:, :4], x[:, :, :0], 5), torch.zeros_like(x))
    assert toeplitz_matmul(weights, x[:0]).shape == (0, 3, 5, 16)
    x[1, 2, 3, 4] = torch.nan
    out = toeplitz_matmul(weights, x)
    assert out[1, 2, :, 4].isnan().all() and out[0].isfinite().all() and out[1, :2].isfinite().all()


@pytest.mark.parametrize("n", [300, 9000])
def test_another_stream(n):
    """The input is written late on a stream of its own, and the calls there see it."""
    weights, x = _inputs(n, n)
    want = toeplitz_matmul(weights, x)
    want_grad = torch.ops.rpe_tvm.toeplitz_weight_grad(want, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = toeplitz_matmul(weights, late)
        grad = torch.ops.rpe_tvm.toeplitz_weight_grad(out, late)
    assert not stream.query()  # nothing has waited
    stream.synchronize()
    assert torch.equal(out, want) and torch.equal(grad, want_grad)


@pytest.mark.parametrize("n", [300, 9000])
def test_a_cuda_graph(n):
    weights, x = _inputs(n, n)

    def calls():
        out = toeplitz_matmul(weights, x)
        return out, torch.ops.rpe_tvm.toeplitz_weight_grad(out, x)

    want = calls()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch.fft sets up its plans in the first call on a stream
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = calls()
    for each in found:
        each.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU")
def test_another_gpu():
    weights, x = _inputs(300, 300, device="cuda:1")
    out = toeplitz_matmul(weights, x)
    assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert _error(out, reference.toeplitz_fft(_float64(weights), _float64(x), 300)) < 2e-6
    with pytest.raises(ValueError, match=r"device of weights: expected cuda:1.*got cuda:0"):
        toeplitz_matmul(weights.to("cuda:0"), x)


def test_opcheck():
    weights, x = (each.requires_grad_() for each in _inputs(7, 12))
    close = {"rtol": 1e-4, "atol": 1e-4}
    result = torch.library.opcheck(torch.ops.rpe_tvm.toeplitz_matmul.default, (weights, x, 12), **close)
    assert set(result.values()) == {"SUCCESS"}
    grad = _inputs(12, 12)[1].requires_grad_()
    result = torch.library.opcheck(torch.ops.rpe_tvm.toeplitz_weight_grad.default, (grad, x), **close)
    assert set(result.values()) == {"SUCCESS"}


def test_second_gradients_as_on_the_cpu():
    found = []
    for device in ("cuda", "cpu"):
        tensors = [x.requires_grad_() for x in _inputs(30, 40, device=device)]
        first = torch.autograd.grad(toeplitz_matmul(*tensors, 40).square().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(x.square().sum() for x in first), tensors))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here.cpu(), there, rtol=1e-4, atol=1e-4 * float(there.abs().max()))


def test_fullgraph_compile():
    weights, x = _inputs(100, 100)
    compiled = torch.compile(lambda *args: toeplitz_matmul(*args) + x, fullgraph=True)
    assert torch.equal(compiled(weights, x), toeplitz_matmul(weights, x) + x)


@pytest.mark.parametrize("kind", ["full", "symmetric"])
def test_modules_as_on_the_cpu(kind):
    results = []
    values = torch.randn(2, 3, 12 * 20, 16, generator=torch.Generator().manual_seed(0))
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        line, grid = FastRPB(3, 200, kind, is_causal=kind == "full"), FastRPB2d(3, 20, kind)
        for module in (line, grid):
            torch.nn.init.normal_(module.weights)
            module.to(device)
        value = values.to(device).requires_grad_()
        out = line(value) + grid(value, 12, 20)
        results.append([out, *torch.autograd.grad(out.square().sum(), (value, line.weights, grid.weights))])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here.cpu(), there, rtol=1e-4, atol=1e-5 * float(there.abs().max()))


def test_a_grid_as_on_the_cpu():
    g = torch.Generator().manual_seed(0)
    weights, x = torch.randn(3, 2 * 12 - 1, 2 * 20 - 1, generator=g), torch.randn(2, 3, 12, 20, 16, generator=g)
    found = grid_toeplitz_matmul(weights.cuda(), x.cuda()).cpu()
    torch.testing.assert_close(found, grid_toeplitz_matmul(weights, x), rtol=1e-4, atol=1e-4)


def test_errors():
    weights, x = _inputs(10, 10)
    with pytest.raises(ValueError, match=r"device of weights: expected cuda:0.*got cpu"):
        toeplitz_matmul(weights.cpu(), x)
    with pytest.raises(DTypeError, match="dtype of x: expected torch.float32, got torch.float64"):
        toeplitz_matmul(weights, x.double())
    with pytest.raises(ShapeError, match=r"= \[3, 19\], got \[3, 18\]"):
        toeplitz_matmul(weights[:, 1:], x)
