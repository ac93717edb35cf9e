"""Gradients of attention on GPUs by compiled functions.

As `rpe_tvm.torch.backward` on CPUs: kept from the forward pass are its arguments and its output, the rest is computed
again. Everything is on the caller's stream; nothing waits. By FFT and by tiles without tensor cores all is float32; on
tensor cores (`attention_backward` with a `TensorCoreBackwardConfig`) one function makes all gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rpe_tvm.errors import GpuGradientError
from rpe_tvm.plan import gpu_backward, gpu_direct, gpu_direct_backward, gpu_workspace
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.torch import cuda_long_backward, hip
from rpe_tvm.torch.cuda import constant_tables, current_gpu, in_whole_pieces
from rpe_tvm.torch.layouts import last_axis_contiguous

Float32Config = GpuBackwardConfig | TileBackwardConfig


def check_length(n: int) -> None:
    """Raise `GpuGradientError` if there are no gradients for n positions, the larger of queries and keys, here."""
    if hip.is_hip():
        raise GpuGradientError(
            "There are no gradients of attention on AMD GPUs yet. Run it under torch.no_grad(), or move the tensors to "
            "the CPU (.cpu()), where gradients are compiled."
        )
    if n > gpu_backward.LONGEST:
        raise GpuGradientError(
            f"Gradients of attention on GPUs serve up to {gpu_backward.LONGEST} queries and keys so far, got {n}. Run "
            "it under torch.no_grad(), or move the tensors to the CPU (.cpu()), where gradients of all lengths are "
            "compiled."
        )


def attention_backward(
    instance: GpuInstance,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    *,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
    denominators: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(grad_out * out)``, features included, on arguments that are known to fit.

    Parameters
    ----------
    instance : GpuInstance
        The compiled gradients, `rpe_tvm.torch.dispatch.get_gpu_backward`.
    grad_out, out : Tensor
        ``[B, H, n_q, d]``: the gradient and the result of the forward pass.
    query, key, value : Tensor
        ``[B, H, n_q, d]``, ``[B, H, n_k, d]`` twice; not empty; of one dtype, that of the forward pass.
    rpe_bias, projection : Tensor
        ``[H, n_q + n_k - 1]``, ``[m, d]``; float32.
    feature_map : str
        ``"nprf"`` or ``"prf"``.
    is_causal : bool
        As in the forward pass.
    of_projection : bool
        Whether the projection's gradient is wanted; else it is 0.
    denominators : Tensor or None
        ``[B, H, n_q]``, float32: what a forward pass by tiles has kept (`rpe_tvm.torch.cuda.launch_recorded`); None:
        they are computed again.

    Returns
    -------
    tuple of Tensor
        The gradients of query, key, value, rpe_bias and projection, contiguous, in the dtypes of their tensors.
    """
    if isinstance(instance.config, TensorCoreBackwardConfig):
        tensors = grad_out, query, key, value, rpe_bias, projection, out
        flags = feature_map, is_causal, of_projection
        return _on_tensor_cores(instance, instance.config, *tensors, *flags, denominators)
    config, projection, rpe_bias = _config(instance), projection.contiguous(), rpe_bias.contiguous()
    dtype = query.dtype
    query, key, value, grad_out, out = (last_axis_contiguous(x.float()) for x in (query, key, value, grad_out, out))
    with current_gpu(query):
        workspace, views = _workspace(config, query, key)
        grads = [torch.empty(x.shape, device=x.device) for x in (query, key, value)]
        grad_bias = torch.empty_like(rpe_bias)
        if _is_one_call(config):
            inputs = query, key, value, rpe_bias, projection, *_tables(config, query), int(is_causal), grad_out, out
            sums = _denominators(config, denominators, out)
            instance.functions[f"backward_{feature_map}"](*inputs, *sums, workspace, *grads, grad_bias)
        else:
            phi, grad_phi = ([views(f"{kind}_{name}") for name in "qk"] for kind in ("phi", "grad_phi"))
            instance.functions[f"features_{feature_map}"](query, key, projection, *phi)
            cuda_long_backward.gradients(
                instance, phi, grad_phi, value, rpe_bias, grad_out, out, grads[2], grad_bias, is_causal
            )
            features_backward = instance.functions[f"grad_features_{feature_map}"]
            features_backward(query, key, projection, *phi, *grad_phi, *grads[:2])
        grad_projection = torch.zeros_like(projection)
        if of_projection:
            for x, name in ((query, "q"), (key, "k")):
                exponent = views(f"phi_{name}") * views(f"grad_phi_{name}").sum(3)  # features are exponentials
                grad_projection += _projection_gradient(feature_map, x, exponent[..., : x.shape[2]])
    return *(grad.to(dtype) for grad in grads), grad_bias, grad_projection


def _on_tensor_cores(
    instance: GpuInstance,
    config: TensorCoreBackwardConfig,
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
    denominators: Tensor | None,
) -> tuple[Tensor, ...]:
    """`attention_backward` by tiles; without gradient of the projection nothing but the compiled function runs."""
    (batch, heads, n_q, _), n_k = query.shape, key.shape[2]
    projection = projection.contiguous()
    with current_gpu(query):
        rows = [in_whole_pieces(last_axis_contiguous(x)) for x in (query, key, value, out, grad_out)]
        rows_q, rows_k = (gpu_direct.round_up(n, config.positions) for n in (n_q, n_k))
        places, size = _tile_places(config, batch, heads, rows_q, rows_k)
        between = torch.empty(size, dtype=torch.uint8, device=query.device)
        shape = gpu_direct_backward.diagonals_shape(config, batch, heads, n_q, n_k)
        diagonals = torch.empty(shape, dtype=torch.float32, device=query.device)
        tensors = query, key, value, rpe_bias
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        blocks = rows_q // config.positions, rows_k // config.positions
        inputs = *rows[:3], rpe_bias.contiguous(), projection, *rows[3:], *_denominators(config, denominators, out)
        flags = int(is_causal), int(of_projection), *blocks
        instance.functions[f"backward_{feature_map}"](*inputs, *flags, between, diagonals, *grads)
        grad_projection = torch.zeros_like(projection)
        if of_projection:
            for x, place in ((query, places["exponent_q"]), (key, places["exponent_k"])):
                end = place.offset + 4 * math.prod(place.shape)
                exponent = between[place.offset : end].view(torch.float32).view(place.shape)
                exponent = exponent[:, :, : x.shape[2], : config.num_features]
                grad_projection += _projection_gradient(feature_map, x.float(), exponent.mT)
    return *grads, grad_projection


@functools.lru_cache(maxsize=256)
def _tile_places(
    config: TensorCoreBackwardConfig, batch: int, heads: int, rows_q: int, rows_k: int
) -> tuple[dict[str, gpu_workspace.Place], int]:
    places, size = gpu_workspace.places(config, batch, heads, rows_q, rows_k)
    return places, int(size)


def attention_on_features_backward(
    instance: GpuInstance,
    grad_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    *,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    """Gradients of attention on ready features; as `attention_backward`, with phi_q ``[B, H, n_q, m]`` and phi_k
    ``[B, H, n_k, m]``. Rows of grad_out whose denominator is 0 must be 0.
    """
    config, rpe_bias = _config(instance), rpe_bias.contiguous()
    value, grad_out, out = (last_axis_contiguous(x) for x in (value, grad_out, out))
    with current_gpu(phi_q):
        workspace, views = _workspace(config, phi_q, phi_k)
        for given, name in ((phi_q, "q"), (phi_k, "k")):
            packed, n = views(f"phi_{name}"), given.shape[2]
            packed[..., :n] = given.mT
            packed[..., n:] = 0.0
        grad_value, grad_bias = torch.empty(value.shape, device=value.device), torch.empty_like(rpe_bias)
        if _is_one_call(config):
            inputs = value, rpe_bias, *_tables(config, value), int(is_causal), grad_out, out
            sums = _denominators(config, None, out)
            instance.functions["gradients"](*inputs, *sums, workspace, grad_value, grad_bias)
        else:
            phi, grad_phi = ([views(f"{kind}_{name}") for name in "qk"] for kind in ("phi", "grad_phi"))
            cuda_long_backward.gradients(
                instance, phi, grad_phi, value, rpe_bias, grad_out, out, grad_value, grad_bias, is_causal
            )
        grads = [
            views(f"grad_phi_{name}").sum(3)[..., : given.shape[2]].mT.contiguous()
            for given, name in ((phi_q, "q"), (phi_k, "k"))
        ]
    return *grads, grad_value, grad_bias


def _projection_gradient(feature_map: str, x: Tensor, grad_exponent: Tensor) -> Tensor:
    """Gradient ``[m, d]`` of the projection from that of the exponent W x' (- |x'|^2 / 2), ``[B, H, m, n]``."""
    scale: Tensor | float = x.shape[-1] ** -0.25
    if feature_map == "nprf":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.where(norm == 0, 0.0, 1.0 / norm)
    return (grad_exponent @ (x * scale)).sum((0, 1))


def _is_one_call(config: Float32Config) -> bool:
    """Whether one function makes all gradients: by FFT where a transform fits into shared memory."""
    return isinstance(config, TileBackwardConfig) or config.columns == 1


def _tables(config: Float32Config, x: Tensor) -> tuple[Tensor, ...]:
    """The constant tables of the FFT on x's device."""
    return () if isinstance(config, TileBackwardConfig) else (constant_tables(config, x.device),)


def _denominators(
    config: Float32Config | TensorCoreBackwardConfig, denominators: Tensor | None, out: Tensor
) -> tuple[Tensor | int, ...]:
    """What gradients by tiles take as denominators and whether these are known; by FFT they never are."""
    if isinstance(config, GpuBackwardConfig):
        return ()
    if denominators is None:
        return out.new_empty(out.shape[:3], dtype=torch.float32), 0
    return denominators, 1


def _workspace(config: Float32Config, query: Tensor, key: Tensor) -> tuple[Tensor, Callable[[str], Tensor]]:
    """The memory of a call, and the function that returns a buffer of it by name."""
    places, size = _places(config, query.shape[:3], key.shape[2])
    workspace = torch.empty(size, dtype=torch.uint8, device=query.device)

    def view(name: str) -> Tensor:
        start, count, shape = places[name]
        return workspace[start : start + 4 * count].view(torch.float32).view(shape)

    return workspace, view


@functools.lru_cache(maxsize=256)
def _places(
    config: Float32Config, rows: torch.Size, n_key: int
) -> tuple[dict[str, tuple[int, int, tuple[int, ...]]], int]:
    """Buffer -> its first byte, its numbers and its shape; and how many bytes they take together."""
    places, size = gpu_workspace.places(config, rows[0], rows[1], rows[2], n_key)
    return {name: (int(at.offset), math.prod(at.shape), at.shape) for name, at in places.items()}, int(size)


def _config(instance: GpuInstance) -> Float32Config:
    if isinstance(instance.config, Float32Config):
        return instance.config
    raise TypeError(f"Invalid operator: expected gradients, got {instance.config}.")
