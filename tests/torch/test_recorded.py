"""Gradients that autograd records past torch.library's layers, and the operators where something more looks on."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpe_tvm.errors import SecondGradientError
from rpe_tvm.torch import NPRF, kernelized_attention
from rpe_tvm.torch.layouts import scratch_sides, scratch_tensor

N, D, M = 10, 8, 4


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def _leaves() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = (
        *torch.randn(3, 2, 3, N, D, generator=g).unbind(),
        torch.randn(3, 2 * N - 1, generator=g),
        torch.randn(M, D, generator=g),
    )
    return [x.requires_grad_() for x in tensors]


def _attend(leaves: list[torch.Tensor]) -> torch.Tensor:
    return kernelized_attention(*leaves[:4], feature_map=NPRF(leaves[4]), is_causal=True)


@pytest.mark.parametrize("learned", [range(5), range(4), [1], [3, 4]], ids=str)
def test_gradients_are_those_of_the_operator(reference_operator, learned) -> None:
    leaves = _leaves()
    for i, x in enumerate(leaves):
        x.requires_grad_(i in learned)
    wanted = [leaves[i] for i in learned]
    out, expected = _attend(leaves), torch.ops.rpe_tvm.kernelized_attention(*leaves, "nprf", True)
    assert type(out.grad_fn) is not type(expected.grad_fn)
    assert torch.equal(out, expected)
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), wanted) for x in (out, expected)), strict=True):
        assert torch.equal(got, want) and got.any()


def test_what_looks_on_sees_the_operators(reference_operator) -> None:
    leaves = _leaves()
    with _Mode() as mode:
        torch.autograd.grad(_attend(leaves).sum(), leaves)
    assert {"rpe_tvm::kernelized_attention", "rpe_tvm::kernelized_attention_backward"} <= mode.seen
    out = _attend(leaves)
    with _Mode() as mode:
        torch.autograd.grad(out.sum(), leaves)
    assert "rpe_tvm::kernelized_attention_backward" in mode.seen


def test_gradients_of_gradients_are_refused(reference_operator) -> None:
    leaves = _leaves()
    (grad,) = torch.autograd.grad(_attend(leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(SecondGradientError):
        grad.sum().backward()


def test_no_gradients_are_kept_of_what_was_changed_since(reference_operator) -> None:
    leaves = _leaves()
    query = leaves[0] * 1
    out = _attend([query, *leaves[1:]])
    query.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_memory_made_in_inference_mode_serves_other_calls() -> None:
    with torch.inference_mode():
        made, (both, query, key) = scratch_tensor("test", (3, 5)), scratch_sides("test of sides", (2, 7))
    for x in (made, both, query, key):
        x.zero_()
    key += 1
    assert made.shape == (3, 5) and both.tolist() == [[0] * 7, [1] * 7]
    assert scratch_tensor("test", (3, 5)) is made and scratch_tensor("test", (5, 3)) is not made
    assert scratch_tensor("test", (100, 50)).shape == (100, 50)
    assert scratch_tensor("test", (3, 5)) is not made
