"""Attention with a class token that stands apart from the sequence or grid of the other tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch.core import toeplitz_attention
from rpe_tvm.torch.grid import to_grid, to_sequence
from rpe_tvm.torch.ready_features import check_inputs, check_weights, features
from rpe_tvm.torch.toeplitz import toeplitz_matmul


def class_token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    class_bias: Tensor,
    *,
    feature_map: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    key_mask: Tensor | None = None,
) -> Tensor:
    """Kernelized attention in which position 0 is a class token, which has no place among the others.

    Every pair that holds the class token has one of three biases, as in BEiT (Bao et al. 2022, as published in
    code); the other tokens have the bias of their offset (Luo 2021, Eq. 10), on a sequence or on a grid.
    Differentiable in all five tensors.

    Parameters
    ----------
    query, key : Tensor
        ``[B, H, 1 + n, d]``, float32, bfloat16 or float16, on the CPU or an NVIDIA GPU, which all tensors
        share; the class token comes first.
    value : Tensor
        ``[B, H, 1 + n, d_v]``, of the same dtype.
    rpe_bias : Tensor
        Of a sequence: ``[H, 2n - 1]``, entry ``(j - i) + n - 1``, as for `kernelized_attention`. Of a grid with
        ``n = height * width`` tokens, row by row: ``[H, 2 * height - 1, 2 * width - 1]``, as for `grid_attention`.
    class_bias : Tensor
        ``[H, 3]``: the class token's query with any other key, any other query with the class token's key, the
        class token with itself. The order is that of the last three rows of BEiT's table.
    feature_map : callable
        ``(query, key) -> (phi_q, phi_k)``, from ``[B, H, 1 + n, d]`` to ``[B, H, 1 + n, m]``.
    key_mask : Tensor, optional
        ``[B, 1 + n]``, bool: False for a key that is not attended to. ``torch.arange(1 + n) < lengths[:, None]``
        makes it of lengths.

    Returns
    -------
    Tensor
        ``[B, H, 1 + n, d_v]``, in query's dtype. A query without any key gets 0.

    Raises
    ------
    ShapeError, DTypeError
        If shapes or dtypes do not fit.
    TypeError, ValueError
        If feature_map cannot be called; if a tensor is on another device.
    """
    check_inputs(query, key, value, "1 + n")
    batch, _, length, _ = query.shape
    _check_biases(rpe_bias, class_bias, query)
    if key_mask is not None and key_mask.shape != (batch, length):
        raise ShapeError(
            f"Invalid shape of key_mask: expected [B, 1 + n] = {[batch, length]}, got {list(key_mask.shape)}."
        )
    if value.numel() == 0:
        return value.clone()
    phi_q, phi_k, value = features(feature_map, query, key, value, key_mask)
    class_bias = class_bias.float()
    first = _class_row(phi_q, phi_k, value, class_bias)
    others = _token_rows(phi_q, phi_k, value, rpe_bias.float(), class_bias)
    return torch.cat([first, others], 2).to(query.dtype)


def _class_row(phi_q: Tensor, phi_k: Tensor, value: Tensor, class_bias: Tensor) -> Tensor:
    """The output of the class token's query, one dense row, ``[B, H, 1, d_v]``."""
    to_others, to_itself = class_bias[:, :1], class_bias[:, 2:]
    row = torch.cat([to_itself, to_others.expand(-1, phi_k.shape[2] - 1)], -1)
    c = torch.exp(row - row.amax(-1, keepdim=True).detach())
    # Products and sums, not matmul, which autocast would take to half precision.
    weights = (c * (phi_q[:, :, :1] * phi_k).sum(-1))[..., None]
    return _divide((weights * value).sum(2, keepdim=True), weights.sum(2, keepdim=True))


def _token_rows(phi_q: Tensor, phi_k: Tensor, value: Tensor, rpe_bias: Tensor, class_bias: Tensor) -> Tensor:
    """The outputs of all other queries, ``[B, H, n, d_v]``: a mean of the tokens' part and the class token's value."""
    if phi_q.shape[2] == 1:
        return value[:, :, 1:]
    class_key, class_value = phi_k[:, :, :1], value[:, :, :1]
    phi_q, phi_k, value = phi_q[:, :, 1:], phi_k[:, :, 1:], value[:, :, 1:]
    grid = [(size + 1) // 2 for size in rpe_bias.shape[1:]] if rpe_bias.dim() == 3 else None
    if grid is not None:
        phi_q, phi_k, value = (to_sequence(torch.unflatten(x, 2, grid)) for x in (phi_q, phi_k, value))
        rpe_bias = rpe_bias.flatten(1)

    to_class = class_bias[:, 1:2]
    # Both parts in units of one exponential, which cancels.
    largest = torch.maximum(rpe_bias.amax(-1, keepdim=True), to_class).detach()
    class_weight = torch.exp(to_class - largest)[:, None] * (phi_q * class_key).sum(-1, keepdim=True)
    token_weight = (phi_q * toeplitz_matmul(torch.exp(rpe_bias - largest), phi_k)).sum(-1, keepdim=True)
    out = toeplitz_attention(phi_q, phi_k, value, rpe_bias)
    out = out + _divide(class_weight, token_weight + class_weight) * (class_value - out)
    return out if grid is None else to_grid(out, *grid).flatten(2, 3)


def _divide(num: Tensor, den: Tensor) -> Tensor:
    # The inner where keeps the gradient of a row without any key at 0, not NaN.
    return torch.where(den == 0, 0.0, num / torch.where(den == 0, 1.0, den))


def _check_biases(rpe_bias: Tensor, class_bias: Tensor, query: Tensor) -> None:
    heads, length = query.shape[1:3]
    if length == 0:
        raise ShapeError("Invalid shape of query: expected [B, H, 1 + n, d] with the class token first, got no token.")
    n = length - 1
    if rpe_bias.dim() == 3:
        _, rows, columns = rpe_bias.shape
        if rows % 2 == 0 or columns % 2 == 0 or (rows + 1) * (columns + 1) != 4 * n:
            raise ShapeError(
                f"Invalid shape of rpe_bias: expected [H, 2 * height - 1, 2 * width - 1] with height * width = {n} "
                f"tokens beside the class token, got {list(rpe_bias.shape)}."
            )
        check_weights("rpe_bias", rpe_bias, (heads, rows, columns), "[H, 2 * height - 1, 2 * width - 1]", query)
    else:
        meaning = "[H, 2 * n - 1] for n tokens beside the class token"
        check_weights("rpe_bias", rpe_bias, (heads, max(2 * n - 1, 0)), meaning, query)
    check_weights("class_bias", class_bias, (heads, 3), "[H, 3]", query)
