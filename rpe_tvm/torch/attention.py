"""Kernelized attention with relative positional encoding on torch tensors."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.plan import gpu_choice
from rpe_tvm.torch import eager, hip
from rpe_tvm.torch import operators as operators  # registers torch.ops.rpe_tvm.*
from rpe_tvm.torch.core import toeplitz_attention
from rpe_tvm.torch.devices import check_device
from rpe_tvm.torch.feature_maps import COMPILED, FeatureMap, FeatureMapFunction
from rpe_tvm.torch.padding import without_padding
from rpe_tvm.torch.plain import is_plain, records_gradients
from rpe_tvm.torch.recorded import recorded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernelized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    *,
    feature_map: FeatureMapFunction,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attention with kernel features and a relative positional bias, in O(n log n) (Luo 2021, Eq. 10).

    ``out_i = sum_j c[j-i] (phi(q_i) . phi(k_j)) v_j / sum_j c[j-i] (phi(q_i) . phi(k_j))`` with
    ``c = exp(rpe_bias)``.

    Parameters
    ----------
    query : Tensor
        ``[B, H, n_q, d]``, float32, bfloat16 or float16, on the CPU or an NVIDIA GPU, which all tensors share.
    key, value : Tensor
        ``[B, H_kv, n_k, d]``, of the same kind; n_k may differ from n_q. H_kv divides H, and each head of key and
        value serves H / H_kv consecutive heads of query.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``, float32 or query's dtype; entry ``(j - i) + n_q - 1`` belongs to query i and key j.
    feature_map : callable
        ``PRF(projection)`` or ``NPRF(projection)``, which run as compiled kernels, or any function or module
        ``feature_map(query, key) -> (phi_q, phi_k)`` from ``[B, H, n, d]`` to ``[B, H, n, m]``, which gets float32.
    is_causal : bool
        Whether query i sees only keys j <= i.
    key_lengths : Tensor, optional
        ``[B]``, integers from 0 to n_k: keys from that length on are not attended to, whatever stands there.

    Returns
    -------
    Tensor
        ``[B, H, n_q, d]`` in query's dtype. A row that attends to no key because of key_lengths is 0.

    Raises
    ------
    ShapeError, DTypeError, ValueError, TypeError
        If the arguments do not fit together, are on another device, or the feature map is none.
    GpuGradientError
        If gradients are asked for on an AMD GPU, or of more than 262144 queries or keys on an NVIDIA GPU.

    Notes
    -----
    Everything is computed in float32, also under ``torch.autocast``; each gradient has the dtype of its tensor. Only on
    GPUs, bfloat16 and float16 are multiplied by tensor cores where head_dim is a multiple of 8: features and weighted
    scores, and what gradients make of them, are then rounded to that dtype, sums are float32.

    Views (slices, transposes) whose last axis is contiguous are read in place. The first call for a length
    compiles the kernel, or takes it from the cache on disk, see `rpe_tvm.torch.use_artefacts`.

    On a GPU everything runs on torch's current stream, and nothing waits for it but the check of key_lengths.
    """
    compiled = cast(FeatureMap, feature_map) if type(feature_map) in COMPILED and key_lengths is None else None
    if compiled is not None and (query.is_cuda or query.is_cpu):
        known = eager.attention(query, key, value, rpe_bias, compiled, is_causal)
        if known is not None:
            return known
    _check_inputs(query, key, value, rpe_bias)
    _check_feature_map(feature_map, query)
    group = query.shape[1] // max(key.shape[1], 1)
    if compiled is not None and _on_tensor_cores(query, key, compiled):
        q, k, v, b = query, key, value, rpe_bias.float()
    else:
        q, k, v, b = query.float(), key.float(), value.float(), rpe_bias.float()
    if group != 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if compiled is not None:
        out = _compiled(q, k, v, b, compiled.projection.float(), compiled.name, is_causal)
        if q is query and k is key and v is value:
            eager.remember(query, key, value, rpe_bias, compiled, is_causal)
    else:
        # Autocast would compute the features, and the attention on them, in half precision.
        with torch.autocast(query.device.type, enabled=False):
            out = _on_features(q, k, v, b, feature_map, is_causal, key_lengths)
    return out.to(query.dtype)


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, projection: Tensor, feature_map: str, is_causal: bool
) -> Tensor:
    """The operator; past torch's dispatcher, which may take longer than its kernels, if nothing needs it."""
    tensors = q, k, v, b, projection
    if (q.is_cuda or q.is_cpu) and is_plain(*tensors):
        operators.check_projection(projection, q.shape[3])  # what _check_inputs has not seen
        if not records_gradients(*tensors):
            kernel = operators.attention_on_gpu if q.is_cuda else operators.attention_on_cpu
            return kernel(*tensors, feature_map, is_causal)
        if not q.is_cuda:
            forward = functools.partial(operators.recorded_on_cpu, feature_map, is_causal)
            return recorded(forward, tensors, feature_map, is_causal)
    return cast(Tensor, torch.ops.rpe_tvm.kernelized_attention(q, k, v, b, projection, feature_map, is_causal))


def _on_tensor_cores(query: Tensor, key: Tensor, feature_map: FeatureMap) -> bool:
    """Whether there is a kernel for 16-bit numbers as they are."""
    if not query.is_cuda or hip.is_hip():
        return False
    n = max(query.shape[2], key.shape[2])
    return gpu_choice.is_direct(n, feature_map.num_features, query.shape[3], operators.dtype_name(query.dtype))


def _on_features(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    feature_map: FeatureMapFunction,
    is_causal: bool,
    key_lengths: Tensor | None,
) -> Tensor:
    """Attention whose features are computed in torch."""
    kept = None
    if key_lengths is not None:
        check_device("key_lengths", key_lengths, q)
        k, v, kept = without_padding(k, v, key_lengths)
    if q.numel() == 0 or k.shape[2] == 0:
        return q @ k.mT @ v + b[:, :0].sum()  # no sum has a term: empty or zeros, and a gradient of zeros
    phi_q, phi_k = _features(feature_map, q, k)
    if kept is not None:
        phi_k = phi_k.where(kept, 0.0)
    return toeplitz_attention(phi_q, phi_k, v, b, is_causal=is_causal)


def _features(feature_map: FeatureMapFunction, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) and phi(k) in float32, or an error where the user's map does not give them."""
    pair = feature_map(q, k)
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(phi, Tensor) for phi in pair):
        raise TypeError(f"Invalid result of feature_map: expected a pair of tensors (phi_q, phi_k), got {type(pair)}.")
    for name, phi, x in (("phi_q", pair[0], q), ("phi_k", pair[1], k)):
        if not phi.is_floating_point():
            raise DTypeError(f"Invalid dtype of {name} from feature_map: expected torch.float32, got {phi.dtype}.")
        m = pair[0].shape[-1]
        if phi.dim() != 4 or phi.shape[:3] != x.shape[:3] or phi.shape[3] != m or m == 0:
            raise ShapeError(
                f"Invalid shape of {name} from feature_map: expected {[*x.shape[:3]]} as {name[-1]} has and m >= 1 "
                f"features, as many for queries as for keys, got {list(phi.shape)}."
            )
    return pair[0].float(), pair[1].float()


def _check_feature_map(feature_map: object, query: Tensor) -> None:
    if isinstance(feature_map, type) or not callable(feature_map):
        raise TypeError(
            f"Invalid feature_map: expected {' or '.join(f'{kind.__name__}(projection)' for kind in COMPILED)} of "
            f"rpe_tvm.torch, or another callable (query, key) -> (phi_q, phi_k), got {feature_map!r}."
        )
    if isinstance(feature_map, FeatureMap):
        _check_either("the projection", feature_map.projection, query)


def _check_either(name: str, x: Tensor, query: Tensor) -> None:
    """Raise unless x is float32 or of query's dtype, and on query's device."""
    check_device(name, x, query)
    if x.dtype not in (torch.float32, query.dtype):
        either = "torch.float32" if query.dtype == torch.float32 else f"torch.float32 or {query.dtype} as query has"
        raise DTypeError(f"Invalid dtype of {name}: expected {either}, got {x.dtype}. Convert it with .float().")


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, rpe_bias: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_device(name, x, query)
        if x.dtype not in _DTYPES:
            raise DTypeError(
                f"Invalid dtype of {name}: expected torch.float32, torch.bfloat16 or torch.float16, got {x.dtype}. "
                "Convert it with .float()."
            )
        if x.dtype != query.dtype:
            raise DTypeError(
                f"Invalid dtype of {name}: expected {query.dtype} as query has, got {x.dtype}. Convert one of them."
            )
        if x.dim() != 4:
            raise ShapeError(f"Invalid shape of {name}: expected [B, H, n, d], got {list(x.shape)}.")
    _check_either("rpe_bias", rpe_bias, query)
    batch, heads, n_q, head_dim = query.shape
    if head_dim == 0:
        raise ShapeError(f"Invalid shape of query: expected a head_dim of at least 1, got {list(query.shape)}.")
    kv_heads, n_k = key.shape[1:3]
    divides = heads == kv_heads or (kv_heads > 0 and heads % kv_heads == 0)
    if key.shape[0] != batch or key.shape[3] != head_dim or not divides:
        raise ShapeError(
            f"Invalid shape of key: expected [{batch}, {heads}, n_k, {head_dim}] as query has, or a number of heads "
            f"that divides {heads}, got {list(key.shape)}."
        )
    if value.shape != key.shape:
        raise ShapeError(f"Invalid shape of value: expected {list(key.shape)} as key has, got {list(value.shape)}.")
    offsets = max(n_q + n_k - 1, 0)
    if rpe_bias.dim() != 2 or rpe_bias.shape[0] != heads or rpe_bias.shape[1] != offsets:
        raise ShapeError(
            f"Invalid shape of rpe_bias: expected [H, n_q + n_k - 1] = [{heads}, {offsets}], got "
            f"{list(rpe_bias.shape)}. Entry (j - i) + n_q - 1 of a row belongs to query i and key j."
        )
