"""Attention whose gradients autograd records, called without the layers that torch.library puts around an operator.

Those take a few hundred microseconds of a training step, as caches that kernels have filled hold none of their code: on
two cores of a CPU a tenth of a step at n = 512.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rpe_tvm.torch import operators
from rpe_tvm.torch.plain import is_plain

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # query, key, value, rpe_bias, projection
# The output, and what the gradients take of the forward pass: denominators on GPUs, features on CPUs.
Forward = Callable[[Tensors], tuple[Tensor, Tensor | None]]


def recorded(forward: Forward, tensors: Tensors, feature_map: str, is_causal: bool) -> Tensor:
    """``forward(tensors)[0]`` with the operator's gradients; where nothing but autograd sees the call
    (`plain.is_plain`).

    Parameters
    ----------
    forward : callable
        Computes attention by its kernels; returns the output, and what it keeps for the gradients, if anything.
    tensors : tuple of Tensor
        query, key, value, rpe_bias and projection, which fit together.
    feature_map, is_causal
        As of the operator.
    """
    record: Any = _Attention.apply
    return cast(Tensor, record(*tensors, feature_map, is_causal, forward))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, (ctx.feature_map, ctx.is_causal, forward) = arguments[:5], arguments[5:]
        out, kept = cast(Forward, forward)(cast(Tensors, tensors))
        ctx.save_for_backward(*tensors, out, kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        arguments = [grad_out, *tensors, ctx.feature_map, ctx.is_causal, ctx.needs_input_grad[4]]
        kernel: Any = torch.ops.rpe_tvm.kernelized_attention_backward
        # where gradients of these gradients are asked for, the operator says that there are none
        if not torch.is_grad_enabled() and is_plain(grad_out):
            on_gpu = grad_out.is_cuda
            kernel = operators.attention_backward_on_gpu if on_gpu else operators.attention_backward_on_cpu
            arguments.append(kept)
        grads = kernel(*arguments)
        return (*grads, None, None, None)
