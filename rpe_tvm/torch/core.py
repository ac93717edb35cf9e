"""Toeplitz-weighted linear attention on ready features: what every feature map of a user's own goes through."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from rpe_tvm.errors import ShapeError
from rpe_tvm.plan.twiddles import weight_table_shape
from rpe_tvm.torch import cuda, cuda_backward
from rpe_tvm.torch.backward import attention_backward, refuse_second_gradients
from rpe_tvm.torch.dispatch import get_backward, get_gpu_backward, get_gpu_operator, get_operator
from rpe_tvm.torch.layouts import feature_memory, last_axis_contiguous, pack_features, scratch_tensor, unpack_features
from rpe_tvm.torch.operators import check_tensor

torch.library.define(
    "rpe_tvm::toeplitz_attention",
    "(Tensor phi_q, Tensor phi_k, Tensor value, Tensor rpe_bias, bool is_causal) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "rpe_tvm::toeplitz_attention_backward",
    "(Tensor grad_out, Tensor phi_q, Tensor phi_k, Tensor value, Tensor rpe_bias, Tensor out, Tensor sees_none, "
    "bool is_causal) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def toeplitz_attention(
    phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, *, is_causal: bool = False
) -> Tensor:
    """Attention whose features are given (Luo 2021, Eq. 10), with gradients for all four tensors.

    ``out_i = sum_j c[j-i] (phi_q_i . phi_k_j) v_j / sum_j c[j-i] (phi_q_i . phi_k_j)`` with ``c = exp(rpe_bias)``.
    A row whose denominator is 0, because no key that it sees has a feature in common with it, is 0 and passes no
    gradient.

    Parameters
    ----------
    phi_q : Tensor
        ``[B, H, n_q, m]``, float32, on the CPU or an NVIDIA GPU, which all four tensors share.
    phi_k : Tensor
        ``[B, H, n_k, m]``. A key whose features are 0 is not attended to.
    value : Tensor
        ``[B, H, n_k, d]``.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``; entry ``(j - i) + n_q - 1`` belongs to query i and key j.
    is_causal : bool
        Whether query i sees only keys j <= i.

    Returns
    -------
    Tensor
        ``[B, H, n_q, d]``.

    Raises
    ------
    ShapeError, DTypeError, ValueError
        If the arguments do not fit together or are on another device.
    """
    out, _ = torch.ops.rpe_tvm.toeplitz_attention(phi_q, phi_k, value, rpe_bias, is_causal)
    return cast(Tensor, out)


def _check(phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor) -> None:
    dims = {"phi_q": "[B, H, n_q, m]", "phi_k": "[B, H, n_k, m]", "value": "[B, H, n_k, d]", "rpe_bias": "[H, n]"}
    for (name, expected), x in zip(dims.items(), (phi_q, phi_k, value, rpe_bias), strict=True):
        check_tensor(name, x, expected, phi_q)
    batch, heads, n_q, m = phi_q.shape
    n_k, d = value.shape[2:]
    if m == 0 or d == 0:
        raise ShapeError(
            f"Invalid shape: expected at least one feature and one channel, got phi_q {list(phi_q.shape)} and value "
            f"{list(value.shape)}."
        )
    for name, x, shape in (("phi_k", phi_k, (batch, heads, n_k, m)), ("value", value, (batch, heads, n_k, d))):
        if x.shape != shape:
            raise ShapeError(f"Invalid shape of {name}: expected {list(shape)}, got {list(x.shape)}.")
    offsets = (heads, max(n_q + n_k - 1, 0))
    if rpe_bias.shape != offsets:
        raise ShapeError(
            f"Invalid shape of rpe_bias: expected [H, n_q + n_k - 1] = {list(offsets)}, got {list(rpe_bias.shape)}."
        )


def _sees_none(phi_q: Tensor, phi_k: Tensor, is_causal: bool) -> Tensor:
    """Which queries have no features or see only keys without, `[B, H, n_q, 1]`.

    Told from the features: by FFT the denominator of such a row is a rounding error of others, not 0.
    """
    n_q = phi_q.shape[2]
    has_key = phi_k.ne(0).any(-1, keepdim=True)
    if is_causal:
        has_key = has_key.cummax(2).values
        missing = n_q - has_key.shape[2]
        if missing > 0:
            has_key = torch.cat((has_key, has_key[:, :, -1:].expand(-1, -1, missing, -1)), 2)
        has_key = has_key[:, :, :n_q]
    else:
        has_key = has_key.any(2, keepdim=True)
    return ~(has_key & phi_q.ne(0).any(-1, keepdim=True))


def _is_zero_over_zero(out: Tensor, phi_q: Tensor, phi_k: Tensor, value: Tensor) -> Tensor:
    """Which rows are NaN though what they are made from is finite, `[B, H, n_q, 1]`."""
    finite = phi_k.isfinite().all((2, 3), keepdim=True) & value.isfinite().all((2, 3), keepdim=True)
    return out.isnan().all(-1, keepdim=True) & finite & phi_q.isfinite().all(-1, keepdim=True)


def _forward(phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    _check(phi_q, phi_k, value, rpe_bias)
    batch, heads, n_q, m = phi_q.shape
    n_k, d = value.shape[2:]
    out = value.new_zeros(batch, heads, n_q, d)
    if out.numel() == 0 or n_k == 0:
        return out, torch.ones(batch, heads, n_q, 1, dtype=torch.bool)
    instance = get_operator(max(n_q, n_k), m, d)
    config, functions, tables = instance.config, instance.functions, instance.tables
    phi = feature_memory(config, batch, heads, n_q, n_k)
    pack_features(config, phi_q, phi.query)
    pack_features(config, phi_k, phi.key)
    table = scratch_tensor("table", weight_table_shape(config, heads, n_q, n_k))
    functions["weights"](rpe_bias.contiguous(), n_q, n_k, int(is_causal), tables, table)
    functions["attention"](phi.query, phi.key, last_axis_contiguous(value), table, tables, out)
    sees_none = _sees_none(phi_q, phi_k, is_causal)
    out.masked_fill_(sees_none, 0.0)
    if out.isnan().any():
        sees_none |= _is_zero_over_zero(out, phi_q, phi_k, value)
        out.masked_fill_(sees_none, 0.0)
    return out, sees_none


def _forward_cuda(
    phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    _check(phi_q, phi_k, value, rpe_bias)
    batch, heads, n_q, m = phi_q.shape
    n_k, d = value.shape[2:]
    out = value.new_zeros(batch, heads, n_q, d)
    if out.numel() == 0 or n_k == 0:
        return out, out.new_ones(batch, heads, n_q, 1, dtype=torch.bool)
    instance = get_gpu_operator(value.device.index, max(n_q, n_k), m, d)
    bias = rpe_bias.contiguous()
    cuda.attention_on_features(instance, phi_q, phi_k, last_axis_contiguous(value), bias, out, is_causal=is_causal)
    # always, not only where out has a NaN: to look would wait for the GPU
    sees_none = _sees_none(phi_q, phi_k, is_causal) | _is_zero_over_zero(out, phi_q, phi_k, value)
    return out.masked_fill_(sees_none, 0.0), sees_none


def _backward(
    grad_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    sees_none: Tensor,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    batch, heads, n_q, m = phi_q.shape
    n_k, d = value.shape[2:]
    if out.numel() == 0 or n_k == 0:
        return tuple(torch.zeros(x.shape) for x in (phi_q, phi_k, value, rpe_bias))
    grad_out = grad_out.masked_fill(sees_none, 0.0)
    instance = get_backward(max(n_q, n_k), m, d)
    phi = feature_memory(instance.config, batch, heads, n_q, n_k)
    pack_features(instance.config, phi_q, phi.query)
    pack_features(instance.config, phi_k, phi.key)
    found = attention_backward(
        instance,
        grad_out,
        out,
        phi,
        last_axis_contiguous(value),
        rpe_bias.contiguous(),
        is_causal,
    )
    of_query = unpack_features(instance.config, found.phi.query, n_q).contiguous()
    of_key = unpack_features(instance.config, found.phi.key, n_k).contiguous()
    return of_query, of_key, found.value, found.rpe_bias


def _backward_cuda(
    grad_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    sees_none: Tensor,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    n = max(phi_q.shape[2], value.shape[2])
    if out.numel() == 0 or value.shape[2] == 0:
        return tuple(x.new_zeros(x.shape) for x in (phi_q, phi_k, value, rpe_bias))
    cuda_backward.check_length(n)
    return cuda_backward.attention_on_features_backward(
        get_gpu_backward(value.device.index, n, phi_q.shape[3], value.shape[3]),
        grad_out.masked_fill(sees_none, 0.0),
        phi_q,
        phi_k,
        value,
        rpe_bias,
        out,
        is_causal=is_causal,
    )


def _fake_forward(
    phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    _check(phi_q, phi_k, value, rpe_bias)
    rows = phi_q.shape[:3]
    return value.new_empty(*rows, value.shape[3]), value.new_empty(*rows, 1, dtype=torch.bool)


def _fake_backward(
    grad_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    sees_none: Tensor,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (phi_q, phi_k, value, rpe_bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.rpe_tvm.toeplitz_attention_backward(grad_out, *ctx.saved_tensors, ctx.is_causal)
    return (*found, None)


torch.library.impl("rpe_tvm::toeplitz_attention", "CompositeExplicitAutograd", _forward)
torch.library.impl("rpe_tvm::toeplitz_attention", "CUDA", _forward_cuda)
torch.library.impl("rpe_tvm::toeplitz_attention_backward", "CompositeExplicitAutograd", _backward)
torch.library.impl("rpe_tvm::toeplitz_attention_backward", "CUDA", _backward_cuda)
torch.library.register_fake("rpe_tvm::toeplitz_attention", _fake_forward)
torch.library.register_fake("rpe_tvm::toeplitz_attention_backward", _fake_backward)
torch.library.register_autograd("rpe_tvm::toeplitz_attention", _gradients, setup_context=_setup_context)
torch.library.register_autograd("rpe_tvm::toeplitz_attention_backward", refuse_second_gradients)
