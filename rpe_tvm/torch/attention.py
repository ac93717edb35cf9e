"""Kernelized attention with relative positional encoding on torch tensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rpe_tvm.torch import operators as operators  # registers torch.ops.rpe_tvm.*
from rpe_tvm.torch.projection import FeatureMap, known_feature_maps


def kernelized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    *,
    feature_map: FeatureMap,
    is_causal: bool = False,
) -> Tensor:
    """Attention with kernel features and a relative positional bias, in O(n log n) (Luo 2021, Eq. 10).

    ``out_i = sum_j c[j-i] (phi(q_i) . phi(k_j)) v_j / sum_j c[j-i] (phi(q_i) . phi(k_j))`` with
    ``c = exp(rpe_bias)``.

    Parameters
    ----------
    query : Tensor
        ``[B, H, n_q, d]``, float32, on the CPU.
    key, value : Tensor
        ``[B, H, n_k, d]``, of the same kind; n_k may differ from n_q.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``; entry ``(j - i) + n_q - 1`` belongs to query i and key j.
    feature_map : FeatureMap
        ``PRF(projection)`` or ``NPRF(projection)``.
    is_causal : bool
        Whether query i sees only keys j <= i.

    Returns
    -------
    Tensor
        ``[B, H, n_q, d]``, its axes in memory ordered as those of query are.

    Notes
    -----
    Views (slices, transposes) whose last axis is contiguous are read in place. The first call for a length
    compiles the kernel, or takes it from the cache on disk, see `rpe_tvm.torch.use_artefacts`. Forward only:
    a backward pass raises.
    """
    if not isinstance(feature_map, FeatureMap):
        known = " or ".join(f"{name.upper()}(projection)" for name in known_feature_maps())
        raise TypeError(f"Invalid feature_map: expected {known} of rpe_tvm.torch, got {feature_map!r}.")
    return cast(
        Tensor,
        torch.ops.rpe_tvm.kernelized_attention(
            query, key, value, rpe_bias, feature_map.projection, feature_map.name, is_causal
        ),
    )
