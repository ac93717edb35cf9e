"""Attention on GPUs: the sequence of compiled functions. Buffers are torch's, on the caller's stream; nothing waits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rpe_tvm.errors import GpuGradientError
from rpe_tvm.plan import gpu, gpu_buffers
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.runtime import GpuInstance


def attention(
    instance: GpuInstance,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    *,
    feature_map: str,
    is_causal: bool,
) -> None:
    """Write attention to `out`, features included, on arguments that are known to fit.

    Parameters
    ----------
    instance : GpuInstance
        The compiled operator for these lengths.
    query, key, value, out : Tensor
        ``[B, H, n_q, d]``, ``[B, H, n_k, d]`` twice, ``[B, H, n_q, d]``; contiguous in the last axis; not empty.
    rpe_bias, projection : Tensor
        ``[H, n_q + n_k - 1]``, ``[m, d]``; contiguous.
    feature_map : str
        ``"nprf"`` or ``"prf"``.
    is_causal : bool
        Whether query i sees only keys j <= i.
    """
    batch, heads = query.shape[:2]
    # The functions make the tensors' GPU the current one, and would leave it so.
    with torch.cuda.device(query.get_device()):
        phi_q, phi_k = (query.new_empty(gpu_buffers.features(instance.config, batch, heads)) for _ in range(2))
        instance.functions[f"features_{feature_map}"](query, key, projection, phi_q, phi_k)
        _on_features(instance, phi_q, phi_k, value, rpe_bias, out, is_causal)


def attention_on_features(
    instance: GpuInstance,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    *,
    is_causal: bool,
) -> None:
    """Write attention on ready features to `out`; as `attention`, with phi_q ``[B, H, n_q, m]``, phi_k
    ``[B, H, n_k, m]``.
    """
    with torch.cuda.device(phi_q.get_device()):
        packed = [_pack(instance, phi) for phi in (phi_q, phi_k)]
        _on_features(instance, packed[0], packed[1], value, rpe_bias, out, is_causal)


def refuse_gradients(*arguments: object) -> tuple[Tensor, ...]:
    """Raise `GpuGradientError`: what the gradients of GPU tensors run into."""
    raise GpuGradientError(
        "There are no gradients of attention on GPUs yet. Run it under torch.no_grad(), or move the tensors to the CPU "
        "(.cpu()), where gradients are compiled."
    )


def _on_features(
    instance: GpuInstance,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    is_causal: bool,
) -> None:
    config, functions = instance.config, instance.functions
    batch, heads, n_q, _ = out.shape
    n_k = value.shape[2]
    tables = _tables(config, value.device)
    largest = value.new_empty(gpu_buffers.largest(config, heads))
    spectrum = value.new_empty(gpu_buffers.spectrum(config, heads))
    partial = value.new_empty(gpu_buffers.partial(config, batch, heads))
    functions["largest"](rpe_bias, n_q, n_k, int(is_causal), largest)
    functions["spectrum"](rpe_bias, largest, n_q, n_k, int(is_causal), tables, spectrum)
    functions["attention"](phi_q, phi_k, value, spectrum, tables, partial)
    functions["normalise"](partial, tables, out)


def _pack(instance: GpuInstance, phi: Tensor) -> Tensor:
    batch, heads, n, _ = phi.shape
    packed = phi.new_empty(gpu_buffers.features(instance.config, batch, heads))
    packed[..., :n] = phi.mT
    packed[..., n:] = 0.0
    return packed


@functools.cache
def _tables(config: GpuAttentionConfig, device: torch.device) -> Tensor:
    """The constant tables on a device, copied there once."""
    return torch.from_numpy(gpu.tables(config)).to(device)
