"""Attention on grids and with a class token on a GPU, against the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from rpe_tvm.torch import class_token_attention, elu_features, grid_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compile,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
BATCH, HEADS, M = 2, 3, 8


def _check(function, tensors, rtol=1e-4):
    """Compare values and all gradients."""
    grad = None
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in tensors]
        out = function(*leaves)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if grad is None else grad
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(device, out.dtype))])
    for want, got in zip(*results, strict=True):
        assert got.is_cuda and got.dtype == want.dtype
        want, got = want.detach().double(), got.detach().double().cpu()
        assert ((got - want).norm() / want.norm()).item() < rtol


def _numbers(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grid_attention(is_causal, masked):
    height, width = 9, 14
    mask = torch.arange(width).expand(BATCH, height, width) < torch.tensor([11, 14])[:, None, None]
    bias = (HEADS, 2 * height - 1, 2 * width - 1)
    _check(
        lambda *x: grid_attention(
            *x, feature_map=elu_features, is_causal=is_causal, key_mask=mask.to(x[0].device) if masked else None
        ),
        _numbers(*[(BATCH, HEADS, height, width, M)] * 3, bias),
        rtol=2e-3 if is_causal else 1e-4,  # by FFT the first rows of causal attention lose digits
    )


@pytest.mark.parametrize("bias", [(HEADS, 125), (HEADS, 13, 17)])
def test_class_token_attention(bias):
    """On a sequence and on a grid of 7 x 9 tokens."""
    shapes = [(BATCH, HEADS, 64, M)] * 3
    _check(
        lambda *x: class_token_attention(*x, feature_map=elu_features),
        _numbers(*shapes, bias, (HEADS, 3)),
    )


def test_tensors_on_two_devices():
    query, bias = _numbers((BATCH, HEADS, 3, 4, M), (HEADS, 5, 7))
    with pytest.raises(ValueError, match="device of rpe_bias: expected cuda:0"):
        grid_attention(*[query.cuda()] * 3, bias, feature_map=elu_features)
