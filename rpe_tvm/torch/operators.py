"""The operator ``torch.ops.rpe_tvm.kernelized_attention``: schemas, CPU, GPU and fake kernels, gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.plan import gpu_backward_choice
from rpe_tvm.plan.twiddles import feature_shape
from rpe_tvm.runtime import run
from rpe_tvm.torch import cuda, cuda_backward
from rpe_tvm.torch.backward import argument_gradients, attention_backward, refuse_second_gradients
from rpe_tvm.torch.devices import check_device
from rpe_tvm.torch.dispatch import get_backward, get_gpu_backward, get_gpu_operator, get_operator
from rpe_tvm.torch.feature_maps import check_feature_map
from rpe_tvm.torch.layouts import Sides, feature_memory, last_axis_contiguous

torch.library.define(
    "rpe_tvm::kernelized_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor rpe_bias, Tensor projection, str feature_map, "
    "bool is_causal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.define(
    "rpe_tvm::kernelized_attention_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor rpe_bias, Tensor projection, Tensor out, "
    "str feature_map, bool is_causal, bool of_projection, Tensor? denominators=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_tensor(name: str, x: Tensor, dims: str, first: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise unless x is a tensor of `dtype` with as many axes as `dims` names, such as ``[B, H, n, d]``, where `first`
    is: on the CPU or an NVIDIA GPU.
    """
    check_device(name, x, first)
    if x.dtype != dtype:
        raise DTypeError(f"Invalid dtype of {name}: expected {dtype}, got {x.dtype}. Convert it with .to({dtype}).")
    if x.dim() != dims.count(",") + 1:
        raise ShapeError(f"Invalid shape of {name}: expected {dims}, got {list(x.shape)}.")


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, rpe_bias: Tensor, projection: Tensor, feature_map: str
) -> None:
    """Raise `ShapeError`, `DTypeError` or ``ValueError`` unless the arguments fit together.

    Shapes: query ``[B, H, n_q, d]``, key and value ``[B, H, n_k, d]``, rpe_bias ``[H, n_q + n_k - 1]``,
    projection ``[m, d]``.
    """
    check_feature_map(feature_map)
    # 16-bit numbers where tensor cores take them
    dtype = query.dtype if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else torch.float32
    check_tensor("query", query, "[B, H, n_q, d]", query, dtype)
    check_tensor("key", key, "[B, H, n_k, d]", query, dtype)
    check_tensor("value", value, "[B, H, n_k, d]", query, dtype)
    check_tensor("rpe_bias", rpe_bias, "[H, n_q + n_k - 1]", query)
    check_tensor("projection", projection, "[m, d]", query)
    batch, heads, n_q, head_dim = query.shape
    n_k = key.shape[2]
    if head_dim == 0 or projection.shape[0] == 0:
        raise ShapeError(
            f"Invalid shape: expected head_dim and num_features of at least 1, got query {list(query.shape)} "
            f"and projection {list(projection.shape)}."
        )
    if key.shape[0] != batch or key.shape[1] != heads or key.shape[3] != head_dim:
        raise ShapeError(
            f"Invalid shape of key: expected [{batch}, {heads}, n_k, {head_dim}] as query has, got {list(key.shape)}."
        )
    if value.shape != key.shape:
        raise ShapeError(f"Invalid shape of value: expected {list(key.shape)} as key has, got {list(value.shape)}.")
    check_projection(projection, head_dim)
    offsets = max(n_q + n_k - 1, 0)
    if rpe_bias.shape[0] != heads or rpe_bias.shape[1] != offsets:
        raise ShapeError(
            f"Invalid shape of rpe_bias: expected [H, n_q + n_k - 1] = [{heads}, {offsets}], got "
            f"{list(rpe_bias.shape)}. Entry (j - i) + n_q - 1 of a row belongs to query i and key j."
        )


def check_projection(projection: Tensor, head_dim: int) -> None:
    """Raise `ShapeError` unless the projection ``[m, d]`` is one for vectors of `head_dim` channels."""
    if projection.shape[1] != head_dim:
        raise ShapeError(
            f"Invalid shape of projection: expected [m, {head_dim}] for this query, got {list(projection.shape)}."
        )


def empty_output(query: Tensor) -> Tensor:
    """An uninitialised output ``[B, H, n_q, d]`` whose axes lie in memory as those of query do.

    A query that is ``[B, n, H, d]`` in memory gets such an output, so that a following
    ``out.transpose(1, 2).reshape(B, n, H * d)`` copies nothing. The last axis is contiguous, as kernels ask.
    """
    strides = query.stride()
    if strides[3] != 1 or query.is_contiguous():
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    # Not empty_like: its rule for axes of size 0 and 1 differs between real and fake tensors.
    order = sorted(range(3), key=lambda axis: strides[axis], reverse=True)  # outermost axis first
    out = query.new_empty([*(query.shape[axis] for axis in order), query.shape[3]])
    return out.permute([*(order.index(axis) for axis in range(3)), 3])


def _kernelized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    feature_map: str,
    is_causal: bool,
) -> Tensor:
    check_inputs(query, key, value, rpe_bias, projection, feature_map)
    return attention_on_cpu(query, key, value, rpe_bias, projection, feature_map, is_causal)


def attention_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    feature_map: str,
    is_causal: bool,
    kept: Sides | None = None,
) -> Tensor:
    """The operator's kernel for CPUs, on arguments that fit as `check_inputs` asks; its features go to `kept`."""
    out = empty_output(query)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_()  # no keys: zeros, as scaled_dot_product_attention gives
    instance = get_operator(max(query.shape[2], key.shape[2]), projection.shape[0], query.shape[3])
    # The kernels' functions take torch tensors as they are.
    run(
        instance.functions,
        instance.config,
        instance.tables,
        last_axis_contiguous(query),
        last_axis_contiguous(key),
        last_axis_contiguous(value),
        rpe_bias.contiguous(),
        projection.contiguous(),
        out,
        feature_map=feature_map,
        is_causal=is_causal,
        phi=None if kept is None else kept[1:],
    )
    return out


def recorded_on_cpu(
    feature_map: str, is_causal: bool, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """`attention_on_cpu`, and what the gradients take of it: its features, or nothing."""
    query, key, *_, projection = tensors
    kept = kept_features(query, key, projection)
    out = attention_on_cpu(*tensors, feature_map, is_causal, kept)
    return out, None if kept is None else kept.both


def kept_features(query: Tensor, key: Tensor, projection: Tensor) -> Sides | None:
    """Memory in which `attention_on_cpu` leaves its features for the gradients: where these are by tiles, too.

    Of a short sequence they are little memory, and to compute them again 4 % of a training step.
    """
    (batch, heads, n_q, d), n_k = query.shape, key.shape[2]
    if 0 in (batch, heads, n_q, n_k):
        return None
    config = get_operator(max(n_q, n_k), projection.shape[0], d).config
    if config.algorithm != "direct":
        return None
    both = torch.empty((2, *feature_shape(config, batch, heads, n_q, n_k)))
    return Sides(both, both[0], both[1])


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in configs, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _kernelized_attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    feature_map: str,
    is_causal: bool,
) -> Tensor:
    check_inputs(query, key, value, rpe_bias, projection, feature_map)
    return attention_on_gpu(query, key, value, rpe_bias, projection, feature_map, is_causal)


def attention_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    feature_map: str,
    is_causal: bool,
) -> Tensor:
    """The operator's kernel for GPUs, on arguments that fit as `check_inputs` asks."""
    out = empty_output(query)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_()
    n = max(query.shape[2], key.shape[2])
    cuda.attention(
        get_gpu_operator(query.device.index, n, projection.shape[0], query.shape[3], dtype_name(query.dtype)),
        last_axis_contiguous(query),
        last_axis_contiguous(key),
        last_axis_contiguous(value),
        rpe_bias.contiguous(),
        projection.contiguous(),
        out,
        feature_map=feature_map,
        is_causal=is_causal,
    )
    return out


def _kernelized_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    feature_map: str,
    is_causal: bool,
) -> Tensor:
    check_inputs(query, key, value, rpe_bias, projection, feature_map)
    return empty_output(query)


def _kernelized_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
    denominators: Tensor | None = None,
) -> tuple[Tensor, ...]:
    grads = attention_backward_on_cpu(
        grad_out, query, key, value, rpe_bias, projection, out, feature_map, is_causal, of_projection
    )
    return tuple(torch.zeros(projection.shape) if grad is None else grad for grad in grads)


def attention_backward_on_cpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients' kernel for CPUs, of query, key, value, rpe_bias and projection; a projection's may be None.

    `kept` are the features that the forward pass left, see `kept_features`.
    """
    n_q, n_k = query.shape[2], key.shape[2]
    if out.numel() == 0 or n_k == 0:
        return tuple(torch.zeros(x.shape) for x in (query, key, value, rpe_bias, projection))
    instance = get_backward(max(n_q, n_k), projection.shape[0], query.shape[3])
    projection = projection.contiguous()
    query, key = last_axis_contiguous(query), last_axis_contiguous(key)
    phi = feature_memory(instance.config, query.shape[0], query.shape[1], n_q, n_k)
    if kept is not None and instance.config.algorithm == "direct" and kept.shape[4] >= phi.both.shape[4]:
        phi = Sides(kept, kept[0], kept[1])
    else:
        features = instance.functions[f"features_{feature_map}"]
        features(query, projection, phi.query)
        features(key, projection, phi.key)
    found = attention_backward(
        instance, grad_out, out, phi, last_axis_contiguous(value), rpe_bias.contiguous(), is_causal
    )
    of_query, of_key, of_weights = argument_gradients(
        instance, feature_map, (query, key), projection, phi, found.phi, of_projection
    )
    return of_query, of_key, found.value, found.rpe_bias, of_weights


def attention_backward_on_gpu(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
    denominators: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients' kernel for GPUs, of query, key, value, rpe_bias and projection.

    denominators are what the forward pass has kept, if it has; CPUs compute them again.
    """
    n = max(query.shape[2], key.shape[2])
    if out.numel() == 0 or key.shape[2] == 0:
        return tuple(x.new_zeros(x.shape) for x in (query, key, value, rpe_bias, projection))
    m, d, dtype = projection.shape[0], query.shape[3], dtype_name(query.dtype)
    if not gpu_backward_choice.is_direct(m, d, dtype):
        cuda_backward.check_length(n)
        dtype = "float32"
    return cuda_backward.attention_backward(
        get_gpu_backward(query.device.index, n, m, d, dtype),
        grad_out,
        query,
        key,
        value,
        rpe_bias,
        projection,
        out,
        feature_map=feature_map,
        is_causal=is_causal,
        of_projection=of_projection,
        denominators=denominators,
    )


def _kernelized_attention_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
    denominators: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value, rpe_bias, projection))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.feature_map, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.rpe_tvm.kernelized_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.feature_map, ctx.is_causal, ctx.needs_input_grad[4]
    )
    return (*grads, None, None)


# CompositeExplicitAutograd: one kernel for all devices but GPUs, so that a tensor on another device gets our message.
# The dispatcher resolves conj and neg bits before it calls a kernel.
torch.library.impl("rpe_tvm::kernelized_attention", "CompositeExplicitAutograd", _kernelized_attention)
torch.library.impl("rpe_tvm::kernelized_attention", "CUDA", _kernelized_attention_cuda)
torch.library.impl("rpe_tvm::kernelized_attention_backward", "CUDA", attention_backward_on_gpu)
torch.library.impl(
    "rpe_tvm::kernelized_attention_backward", "CompositeExplicitAutograd", _kernelized_attention_backward
)
torch.library.register_fake("rpe_tvm::kernelized_attention", _kernelized_attention_fake)
torch.library.register_fake("rpe_tvm::kernelized_attention_backward", _kernelized_attention_backward_fake)
torch.library.register_autograd("rpe_tvm::kernelized_attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("rpe_tvm::kernelized_attention_backward", refuse_second_gradients)
