"""FastRPB: a learned Toeplitz matrix times the values, added to the output of any attention.

Source: FastRPB, Zubkov and Gavrilov 2022, and the first author's code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch.toeplitz import toeplitz_matmul

Kind = Literal["full", "symmetric"]


class _Weights(nn.Module):
    """Learned weights by offset, zeros at first, shared by both modules."""

    weights: nn.Parameter

    def __init__(self, num_heads: int, max_length: int, kind: Kind, is_causal: bool) -> None:
        super().__init__()
        for name, size in (("num_heads", num_heads), ("max_length", max_length)):
            if size < 1:
                raise ShapeError(f"Invalid {name}: expected a positive integer, got {size}.")
        if kind not in get_args(Kind):
            raise ValueError(f"Invalid kind: expected 'full' or 'symmetric', got {kind!r}.")
        self.num_heads = num_heads
        self.max_length = max_length
        self.kind = kind
        self.is_causal = is_causal
        self.weights = nn.Parameter(torch.zeros(num_heads, 2 * max_length - 1 if kind == "full" else max_length))

    def offsets(self, n: int) -> Tensor:
        """Return the weights of n positions, ``[H, 2 n - 1]``: offset t = j - i at index t + n - 1."""
        weights: Tensor = self.weights
        if self.kind == "symmetric":
            weights = torch.cat([weights.flip(-1), weights[:, 1:]], -1)
        more = n - self.max_length
        weights = F.pad(weights, (more, more))  # crops where it is negative
        return F.pad(weights[:, :n], (0, n - 1)) if self.is_causal else weights

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        causal = f", is_causal={self.is_causal}" if self.is_causal else ""
        return f"num_heads={self.num_heads}, max_length={self.max_length}, kind={self.kind!r}{causal}"


class FastRPB(_Weights):
    """Relative positional bias ``W V`` with ``W[i, j] = w[j-i]`` per head, in O(n log n) (Zubkov and Gavrilov 2022).

    It is added after an attention's normalisation and needs no change to it; w is neither exponentiated nor
    normalised. The weights are zeros at first, so that training starts at plain attention (the paper's code draws
    them at the scale of 1e-6).

    Parameters
    ----------
    num_heads : int
        H.
    max_length : int
        The number of positions whose offsets have weights. Longer sequences are taken: the weights of offsets past
        the range are 0.
    kind : {"full", "symmetric"}
        A weight for each offset, or for each distance.
    is_causal : bool
        Whether position i sees only positions j <= i.

    Attributes
    ----------
    weights : nn.Parameter
        Full: ``[H, 2 * max_length - 1]``, offset t = j - i at index t + max_length - 1. Symmetric:
        ``[H, max_length]``, distance abs(j - i).

    Examples
    --------
    With linear attention and with softmax attention:

    >>> rpb = FastRPB(num_heads=4, max_length=1024)
    >>> out = kernelized_attention(q, k, v, rpe_bias, feature_map=feature_map) + rpb(v)
    >>> out = torch.nn.functional.scaled_dot_product_attention(q, k, v) + rpb(v)
    """

    def __init__(self, num_heads: int, max_length: int, kind: Kind = "full", is_causal: bool = False) -> None:
        super().__init__(num_heads, max_length, kind, is_causal)

    def forward(self, value: Tensor) -> Tensor:
        """Return W V: value ``[B, H, n, d]`` -> ``[B, H, n, d]``."""
        if value.dim() != 4 or value.shape[1] != self.num_heads:
            raise ShapeError(f"Invalid shape of value: expected [B, {self.num_heads}, n, d], got {list(value.shape)}.")
        n = value.shape[2]
        return torch.zeros_like(value) if n == 0 else toeplitz_matmul(self.offsets(n), value)


class FastRPB2d(_Weights):
    """FastRPB on a grid: ``W[(r, c), (r', c')] = w[r' - r] + w[c' - c]`` per head (Zubkov and Gavrilov 2022).

    One w for both axes, as in the authors' code. The matrix is a sum, so that it takes two short products, on the sums
    of the rows and on those of the columns: O(height width) and no two-dimensional transform.

    Parameters
    ----------
    num_heads : int
        H.
    max_length : int
        The largest height or width whose offsets have weights; the weights of offsets past it are 0.
    kind : {"full", "symmetric"}
        A weight for each offset, or for each distance.

    Attributes
    ----------
    weights : nn.Parameter
        As of `FastRPB`; zeros at first.

    Examples
    --------
    >>> rpb = FastRPB2d(num_heads=4, max_length=64)
    >>> out = torch.nn.functional.scaled_dot_product_attention(q, k, v) + rpb(v, height=48, width=64)
    """

    def __init__(self, num_heads: int, max_length: int, kind: Kind = "full") -> None:
        super().__init__(num_heads, max_length, kind, is_causal=False)

    def forward(self, value: Tensor, height: int, width: int) -> Tensor:
        """Return W V: value ``[B, H, height * width, d]``, row after row -> the same shape."""
        if value.dim() != 4 or value.shape[1] != self.num_heads or value.shape[2] != height * width:
            raise ShapeError(
                f"Invalid shape of value: expected [B, {self.num_heads}, height * width = {height * width}, d], "
                f"got {list(value.shape)}."
            )
        if height == 0 or width == 0:
            return torch.zeros_like(value)
        grid = value.reshape(*value.shape[:2], height, width, value.shape[3])
        by_row = toeplitz_matmul(self.offsets(height), grid.sum(3))
        by_column = toeplitz_matmul(self.offsets(width), grid.sum(2))
        return (by_row.unsqueeze(3) + by_column.unsqueeze(2)).flatten(2, 3)
