"""Gradients of attention on a GPU, against the float64 reference. Skipped where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpe_tvm import build, reference, targets
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.runtime import load_gpu_backward
from rpe_tvm.runtime.gpu import gpus
from rpe_tvm.torch import NPRF, PRF, cuda_backward, elu_features, gaussian_projection, kernelized_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compile,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
M, D = 8, 16


def _tensors(n_q, n_k, batch=2, heads=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(n_q + n_k)
    query = torch.randn(batch, heads, n_q, D, generator=g)
    key, value = torch.randn(2, batch, heads, n_k, D, generator=g).unbind()
    bias = torch.randn(heads, n_q + n_k - 1, generator=g)
    tensors = [
        *(x.to("cuda", dtype) for x in (query, key, value)),
        bias.cuda(),
        gaussian_projection(M, D, seed=0).cuda(),
    ]
    return [x.requires_grad_() for x in tensors]


def _errors(tensors, want):
    for tensor, expected in zip(tensors, want, strict=True):
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.isfinite().all()
        yield np.linalg.norm(tensor.grad.double().cpu().numpy() - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kind", [PRF, NPRF])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(63, 64), (100, 37), (500, 700), (2000, 1999), (4096, 3000)])
def test_values(n_q, n_k, is_causal, kind):
    tensors = _tensors(n_q, n_k)
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).cuda()
    # the first causal rows have few terms and carry the rounding errors of the longest sums, see docs/operators.md
    if is_causal:
        grad_out[:, :, : n_q // 4] = 0
    arrays = [x.detach().double().cpu().numpy() for x in (grad_out, *tensors)]
    want = reference.attention_gradients(*arrays, kind(tensors[4]).name, is_causal)
    for _ in range(2):  # an equal call keeps its denominators
        for x in tensors:
            x.grad = None
        kernelized_attention(*tensors[:4], feature_map=kind(tensors[4]), is_causal=is_causal).backward(grad_out)
        assert max(_errors(tensors, want)) < (1e-4 if is_causal else 1e-5)


@pytest.mark.parametrize("config", [(64, 128, 1), (64, 64, 2), (64, 64, 1), (32, 64, 1), (64, 32, 1), (32, 32, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles(config, is_causal):
    """Features from 1e-8 to 1e7: every number is as exact as those of the dense formula in float32."""
    m, d, n_q, n_k = 32, 64, 500, 430
    instance = load_gpu_backward(
        build.compile_operator(TileBackwardConfig(m, d, 512, *config), targets.preset(gpus()[0].arch))
    )
    g = torch.Generator().manual_seed(0)
    phi_q, phi_k = (10 ** (15 * torch.rand(2, 3, n, m, generator=g) - 8) for n in (n_q, n_k))
    value, grad_out = (torch.randn(2, 3, n, d, generator=g) for n in (n_k, n_q))
    bias = torch.randn(3, n_q + n_k - 1, generator=g)
    offset = torch.arange(n_k) - torch.arange(n_q)[:, None]

    def dense(dtype):
        leaves = [x.to("cuda", dtype).requires_grad_() for x in (phi_q, phi_k, value, bias)]
        largest = leaves[3][:, : n_q if is_causal else None].amax(1, keepdim=True).detach()
        weights = (leaves[3] - largest).exp()[:, (offset + n_q - 1).cuda()]
        scores = leaves[0] @ leaves[1].mT * weights
        scores = scores.where(offset.cuda() <= 0, 0.0) if is_causal else scores
        out = scores @ leaves[2] / scores.sum(-1, keepdim=True)
        return out.detach(), torch.autograd.grad(out, leaves, grad_out.to("cuda", dtype))

    (out, in_float32), (_, exact) = dense(torch.float32), dense(torch.float64)
    given = (x.cuda() for x in (grad_out, phi_q, phi_k, value, bias))
    found = cuda_backward.attention_on_features_backward(instance, *given, out, is_causal=is_causal)
    for x, y, want in zip(found, in_float32, exact, strict=True):
        of_rows = [(each - want).norm(dim=-1) / want.norm(dim=-1) for each in (x, y)]
        of_rows = [each[want.norm(dim=-1) > 1e-6 * want.norm(dim=-1).median()] for each in of_rows]
        for quantile in (0.5, 0.9):
            errors = [each.quantile(quantile).item() for each in of_rows]
            assert errors[0] < 2 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [PRF, NPRF])
@pytest.mark.parametrize(
    ("n_q", "n_k", "is_causal"), [(300, 200, False), (37, 700, True), (1500, 1501, True), (3000, 1, False)]
)
def test_sixteen_bits(n_q, n_k, is_causal, kind, dtype):
    tensors = _tensors(n_q, n_k, dtype=dtype)
    out = kernelized_attention(*tensors[:4], feature_map=kind(tensors[4]), is_causal=is_causal)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    out.backward(grad_out)
    arrays = [x.detach().double().cpu().numpy() for x in (grad_out, *tensors)]
    want = reference.attention_gradients(*arrays, kind(tensors[4]).name, is_causal)
    # of one key all gradients but the value's are 0, and rounding errors what is found
    pairs = list(zip(tensors, want, strict=True))
    used = pairs if n_k > 1 else pairs[2:3]
    assert max(_errors(*zip(*used, strict=True))) < 8 * torch.finfo(dtype).eps


def test_sixteen_bits_have_gradients_of_long_sequences_too():
    n = 4096 + 77
    tensors = _tensors(n, n, batch=1, heads=1, dtype=torch.bfloat16)
    out = kernelized_attention(*tensors[:4], feature_map=NPRF(tensors[4]))
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    grads = [torch.autograd.grad(out, tensors, grad_out, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    arrays = [x.detach().double().cpu().numpy() for x in (grad_out, *tensors)]
    for tensor, grad in zip(tensors, grads[0], strict=True):
        tensor.grad = grad
    assert max(_errors(tensors, reference.attention_gradients(*arrays, "nprf"))) < 8 * torch.finfo(torch.bfloat16).eps


# one kernel up to 8192 positions, columns and rows beyond
@pytest.mark.parametrize("n", [600, 8000, 9000, 70_000])
@pytest.mark.parametrize("of_ones_own", [True, False])
def test_as_on_the_cpu(n, of_ones_own):
    *tensors, projection = _tensors(n, n - 10, batch=1, heads=2)
    on_cpu = [x.detach().cpu().requires_grad_() for x in tensors]
    for inputs in (tensors, on_cpu):
        feature_map = elu_features if of_ones_own else NPRF(projection.detach().to(inputs[0].device))
        kernelized_attention(*inputs, feature_map=feature_map).square().sum().backward()
    for x, y in zip(tensors, on_cpu, strict=True):
        error = (x.grad.cpu() - y.grad).norm() / y.grad.norm()
        assert error < 1e-4


def test_twice_the_same_bits():
    tensors = _tensors(300, 300)
    grads = []
    for _ in range(2):
        out = kernelized_attention(*tensors[:4], feature_map=NPRF(tensors[4]))
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
