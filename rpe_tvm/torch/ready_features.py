"""What attention on grids and with a class token share: checked inputs in float32, and their features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch.devices import check_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_inputs(query: Tensor, key: Tensor, value: Tensor, positions: str) -> None:
    """Raise an error unless query, key and value fit together.

    Parameters
    ----------
    query, key : Tensor
        ``[B, H, *positions, d]``.
    value : Tensor
        ``[B, H, *positions, d_v]``.
    positions : str
        The axes of the positions as the caller's documentation names them, such as ``"height, width"``.

    Raises
    ------
    ShapeError, DTypeError
        If shapes or dtypes do not fit.
    ValueError
        If a tensor is on a device that has no operator, or not where query is.
    """
    axes = f"[B, H, {positions}, d]"
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_device(name, x, query)
        if x.dtype not in DTYPES or x.dtype != query.dtype:
            raise DTypeError(
                f"Invalid dtype of {name}: expected float32, bfloat16 or float16, the same for query, key and "
                f"value, got {x.dtype}. Convert it with .to()."
            )
        if x.dim() != axes.count(",") + 1:
            raise ShapeError(f"Invalid shape of {name}: expected {axes}, got {list(x.shape)}.")
    if key.shape != query.shape:
        raise ShapeError(f"Invalid shape of key: expected {list(query.shape)} as query has, got {list(key.shape)}.")
    if value.shape[:-1] != key.shape[:-1]:
        raise ShapeError(
            f"Invalid shape of value: expected {[*key.shape[:-1], 'd']} as key has, got {list(value.shape)}."
        )


def check_weights(name: str, weights: Tensor, shape: tuple[int, ...], meaning: str, first: Tensor) -> None:
    """Raise `ShapeError`, `DTypeError` or ``ValueError`` unless biases or weights have this shape, which means ..., and
    are where the first tensor of the call is.
    """
    if weights.shape != shape:
        raise ShapeError(f"Invalid shape of {name}: expected {meaning} = {list(shape)}, got {list(weights.shape)}.")
    if weights.dtype not in DTYPES:
        raise DTypeError(
            f"Invalid dtype of {name}: expected float32, bfloat16 or float16, got {weights.dtype}. Convert it with "
            ".float()."
        )
    check_device(name, weights, first)


def features(
    feature_map: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The features of queries and keys, and the values, in float32; masked keys have features and values of 0.

    Parameters
    ----------
    feature_map : callable
        ``(query, key) -> (phi_q, phi_k)``.
    query, key : Tensor
        ``[B, H, n, d]``.
    value : Tensor
        ``[B, H, n, d_v]``.
    key_mask : Tensor, optional
        ``[B, n]``, bool: False for a key that is not attended to.

    Returns
    -------
    phi_q, phi_k : Tensor
        ``[B, H, n, m]``.
    value : Tensor
        ``[B, H, n, d_v]``.

    Raises
    ------
    TypeError
        If feature_map cannot be called.
    ShapeError, DTypeError
        If what it returns, or the mask, has another shape or dtype.
    ValueError
        If the mask is not where query is.
    """
    if not callable(feature_map):
        raise TypeError(
            f"Invalid feature_map: expected a callable (query, key) -> (phi_q, phi_k), got {feature_map!r}."
        )
    query, key, value = query.float(), key.float(), value.float()
    masked = None
    if key_mask is not None:
        check_device("key_mask", key_mask, query)
        if key_mask.dtype != torch.bool:
            raise DTypeError(
                f"Invalid dtype of key_mask: expected torch.bool, True for keys that take part, got {key_mask.dtype}."
            )
        # Before the features and in value too: whatever padding holds, even NaN, stays out.
        masked = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(masked, 0.0), value.masked_fill(masked, 0.0)
    phi_q, phi_k = feature_map(query, key)
    if phi_q.shape[:-1] != query.shape[:-1] or phi_k.shape != phi_q.shape:
        raise ShapeError(
            f"Invalid features: expected two tensors {[*query.shape[:-1], 'm']} from feature_map, got "
            f"{list(phi_q.shape)} and {list(phi_k.shape)}."
        )
    phi_q, phi_k = phi_q.float(), phi_k.float()
    return phi_q, phi_k if masked is None else phi_k.masked_fill(masked, 0.0), value
