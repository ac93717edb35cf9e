"""`KernelizedAttention`, a layer for `torch.nn` models."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch import operators as operators  # registers torch.ops.rpe_tvm.*
from rpe_tvm.torch.projection import check_feature_map, gaussian_projection


class KernelizedAttention(nn.Module):
    """Multi-head kernelized attention with a learned bias per head and offset (Luo 2021, Algorithm 1).

    Parameters
    ----------
    num_heads : int
        H.
    head_dim : int
        d.
    max_length : int
        The longest sequence (of queries and of keys) that the layer takes.
    feature_map : str
        ``"nprf"`` (normalised queries and keys, the stable choice) or ``"prf"``.
    num_features : int
        m, the number of random features.
    is_causal : bool
        Whether query i sees only keys j <= i.
    seed : int
        Seed of the random projection.

    Attributes
    ----------
    rpe_bias : nn.Parameter
        ``[H, 2 * max_length - 1]``, zeros at first; entry ``(j - i) + max_length - 1`` belongs to query i and
        key j.
    projection : Tensor
        ``[m, d]``, a buffer, stored in the state dict.
    """

    rpe_bias: nn.Parameter
    projection: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int,
        feature_map: str = "nprf",
        num_features: int = 32,
        is_causal: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_feature_map(feature_map)
        for name, size in (("num_heads", num_heads), ("max_length", max_length)):
            if size < 1:
                raise ShapeError(f"Invalid {name}: expected a positive integer, got {size}.")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.max_length = max_length
        self.feature_map = feature_map
        self.num_features = num_features
        self.is_causal = is_causal
        self.rpe_bias = nn.Parameter(torch.zeros(num_heads, 2 * max_length - 1, dtype=torch.float32))
        self.register_buffer("projection", gaussian_projection(num_features, head_dim, seed=seed))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: query ``[B, H, n_q, d]``, key and value ``[B, H, n_k, d]`` -> ``[B, H, n_q, d]``."""
        for name, x in (("query", query), ("key", key)):
            if x.dim() != 4 or x.shape[1] != self.num_heads or x.shape[3] != self.head_dim:
                raise ShapeError(
                    f"Invalid shape of {name}: expected [B, {self.num_heads}, n, {self.head_dim}], got {list(x.shape)}."
                )
        n_q, n_k = query.shape[2], key.shape[2]
        if max(n_q, n_k) > self.max_length:
            raise ShapeError(
                f"Invalid length: expected at most max_length = {self.max_length} positions, got {n_q} "
                f"queries and {n_k} keys. Build the layer with a larger max_length."
            )
        # Offsets j - i run from -(n_q - 1) to n_k - 1; offset 0 stands at max_length - 1.
        first = self.max_length - n_q
        last = first + max(n_q + n_k - 1, 0)
        if torch.compiler.is_exporting():
            # A slice is contiguous for n = max_length only: export would refuse a dynamic range with that
            # length.
            rpe_bias = self.rpe_bias.index_select(1, torch.arange(first, last))
        else:
            rpe_bias = self.rpe_bias[:, first:last]
        return cast(
            Tensor,
            torch.ops.rpe_tvm.kernelized_attention(
                query, key, value, rpe_bias, self.projection, self.feature_map, self.is_causal
            ),
        )

    def extra_repr(self) -> str:
        """The arguments that the layer was made with."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, max_length={self.max_length}, "
            f"feature_map={self.feature_map!r}, num_features={self.num_features}, is_causal={self.is_causal}"
        )
