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
from rpe_tvm.torch.layouts import Sides
from rpe_tvm.torch.plain import is_plain

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # query, key, value, rpe_bias, projection


def recorded(
    forward: Callable[[Tensors], Tensor],
    tensors: Tensors,
    feature_map: str,
    is_causal: bool,
    kept: Sides | None = None,
) -> Tensor:
    """``forward(tensors)`` with the operator's gradients; where nothing but autograd sees the call (`plain.is_plain`).

    Parameters
    ----------
    forward : callable
        Computes attention by its kernels.
    tensors : tuple of Tensor
        query, key, value, rpe_bias and projection, which fit together.
    feature_map, is_causal
        As of the operator.
    kept : Sides, optional
        Where forward leaves the features for the gradients, `operators.kept_features`.
    """
    record: Any = _Attention.apply
    return cast(Tensor, record(*tensors, feature_map, is_causal, forward, kept))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, (ctx.feature_map, ctx.is_causal, forward, kept) = arguments[:5], arguments[5:]
        out: Tensor = forward(tensors)
        ctx.save_for_backward(*tensors, out, None if kept is None else kept.both)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        arguments = [grad_out, *tensors, ctx.feature_map, ctx.is_causal, ctx.needs_input_grad[4]]
        # where gradients of these gradients are asked for, the operator says that there are none
        kernel: Any = torch.ops.rpe_tvm.kernelized_attention_backward
        if not torch.is_grad_enabled() and is_plain(grad_out):
            kernel = operators.attention_backward_on_gpu
            if not grad_out.is_cuda:
                kernel, arguments = operators.attention_backward_on_cpu, [*arguments, kept]
        return (*kernel(*arguments), None, None, None, None)
