"""Whether an operator's kernel can be called past torch's dispatcher, which may take longer than a call's kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_KINDS = {Tensor, nn.Parameter}


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether the dispatcher would do nothing but call the kernel; `is_plain`, and no gradients are recorded."""
    return is_plain(*tensors) and not records_gradients(*tensors)


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing but autograd sees the call.

    Not where something traces or transforms it (torch.compile, functorch, modes of a user's own), or a tensor is more
    than strided memory (a subclass, a pending negation, another layout).
    """
    if torch.compiler.is_compiling() or _is_watched():
        return False
    if not _KINDS.issuperset(map(type, tensors)):
        return False
    return not any([x.is_neg() or x.layout is not torch.strided for x in tensors])  # noqa: C419  as below


def records_gradients(*tensors: Tensor) -> bool:
    """Whether autograd records a call with these tensors."""
    if not torch.is_grad_enabled():
        return False
    return any([x.requires_grad for x in tensors])  # noqa: C419  a list is faster than a generator


def _is_watched() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
