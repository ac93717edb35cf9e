"""Attention and Toeplitz products on two-dimensional grids, by the operators for sequences.

Row r, column c of a grid of width w becomes position ``r (2w - 1) + c``: each row is followed by w - 1 empty
positions. The offset of two positions is then ``dr (2w - 1) + dc``, different for every (dr, dc), and a table of
biases ``[2h - 1, 2w - 1]``, read row by row, is the bias of the sequence. Empty positions hold zeros: such a key is
not attended to, and what such a query gets is dropped.

The last row needs no gap. So there are ``2hw - h - w + 1`` positions, as many as if columns were laid out one after
the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch.core import toeplitz_attention
from rpe_tvm.torch.ready_features import check_inputs, check_weights, features
from rpe_tvm.torch.toeplitz import toeplitz_matmul


def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    *,
    feature_map: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Kernelized attention on a grid with a bias for each two-dimensional offset, in O(hw log(hw)).

    Luo 2021, Eq. 10, with the two-dimensional bias of Swin (Liu et al. 2021, section 3.2). Differentiable in all
    four tensors.

    Parameters
    ----------
    query, key : Tensor
        ``[B, H, height, width, d]``, float32, bfloat16 or float16, on the CPU or an NVIDIA GPU, which all
        tensors share. Tokens ``[B, H, height * width, d]`` become that by ``.unflatten(2, (height, width))``.
    value : Tensor
        ``[B, H, height, width, d_v]``, of the same dtype.
    rpe_bias : Tensor
        ``[H, 2 * height - 1, 2 * width - 1]``; entry ``[dr + height - 1, dc + width - 1]`` belongs to a key that
        lies dr rows below and dc columns right of its query. `rpe_tvm.torch.LearnedBias2d` makes it.
    feature_map : callable
        ``(query, key) -> (phi_q, phi_k)``, from ``[B, H, height * width, d]`` to ``[B, H, height * width, m]``.
    is_causal : bool
        Whether a query sees only the keys up to its own place, row by row, as in generating an image.
    key_mask : Tensor, optional
        ``[B, height, width]``, bool: False for a place that is not attended to, such as an image's padding.

    Returns
    -------
    Tensor
        ``[B, H, height, width, d_v]``, in query's dtype. A query without any key gets 0.

    Raises
    ------
    ShapeError, DTypeError
        If shapes or dtypes do not fit.
    TypeError, ValueError
        If feature_map cannot be called; if a tensor is on another device.
    """
    check_inputs(query, key, value, "height, width")
    batch, heads, height, width, _ = query.shape
    _check_table("rpe_bias", rpe_bias, query)
    if key_mask is not None:
        if key_mask.shape != (batch, height, width):
            raise ShapeError(
                f"Invalid shape of key_mask: expected [B, height, width] = {[batch, height, width]}, got "
                f"{list(key_mask.shape)}."
            )
        key_mask = key_mask.flatten(1)
    if value.numel() == 0:
        return value.clone()
    query, key, value = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
    phi_q, phi_k, value = features(feature_map, query, key, value, key_mask)
    if is_causal and key_mask is not None:
        # By FFT a sum over no key is not 0 but a rounding error. Without features it is 0.
        phi_q = phi_q.masked_fill((key_mask.cumsum(1) == 0)[:, None, :, None], 0.0)
    phi_q, phi_k, value = (to_sequence(torch.unflatten(x, 2, (height, width))) for x in (phi_q, phi_k, value))
    out = toeplitz_attention(phi_q, phi_k, value, rpe_bias.float().flatten(1), is_causal=is_causal)
    return to_grid(out, height, width).to(query.dtype)


def grid_toeplitz_matmul(weights: Tensor, x: Tensor) -> Tensor:
    """Multiply by a block-Toeplitz matrix: ``y[r, c] = sum w[r' - r, c' - c] x[r', c']`` over all places r', c'.

    The two-dimensional operator of FastRPB (Zubkov & Gavrilov 2022) with any weights, of which their sum of one
    weight for rows and one for columns is a special case. Differentiable in both tensors.

    Parameters
    ----------
    weights : Tensor
        ``[H, 2 * height - 1, 2 * width - 1]``; offset (dr, dc) stands at ``[dr + height - 1, dc + width - 1]``.
    x : Tensor
        ``[B, H, height, width, d]``, on the CPU, of a dtype that `toeplitz_matmul` takes.

    Returns
    -------
    Tensor
        ``[B, H, height, width, d]``.

    Raises
    ------
    ShapeError, DTypeError, ValueError
        If shapes, dtypes or devices do not fit.
    """
    if x.dim() != 5:
        raise ShapeError(f"Invalid shape of x: expected [B, H, height, width, d], got {list(x.shape)}.")
    height, width = x.shape[2:4]
    _check_table("weights", weights, x)
    if x.numel() == 0:
        return x.clone()
    return to_grid(toeplitz_matmul(weights.flatten(1), to_sequence(x)), height, width)


def grid_length(height: int, width: int) -> int:
    """Positions of the sequence that a grid becomes."""
    return (height - 1) * (2 * width - 1) + width


def to_sequence(x: Tensor) -> Tensor:
    """``[B, H, height, width, channels]`` -> ``[B, H, positions, channels]``, zeros at empty positions."""
    height, width = x.shape[2:4]
    return F.pad(x, (0, 0, 0, width - 1)).flatten(2, 3)[:, :, : grid_length(height, width)]


def to_grid(x: Tensor, height: int, width: int) -> Tensor:
    """``[B, H, positions, channels]`` -> ``[B, H, height, width, channels]``."""
    rows = torch.unflatten(F.pad(x, (0, 0, 0, width - 1)), 2, (height, 2 * width - 1))
    return rows[:, :, :, :width]


def _check_table(name: str, table: Tensor, x: Tensor) -> None:
    _, heads, height, width, _ = x.shape
    shape = (heads, max(2 * height - 1, 0), max(2 * width - 1, 0))
    check_weights(name, table, shape, "[H, 2 * height - 1, 2 * width - 1]", x)
