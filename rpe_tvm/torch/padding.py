"""The operator ``torch.ops.rpe_tvm.kept_keys``: which keys are no padding, from the length of each sequence.

An operator of its own, so that the values of the lengths are checked under torch.compile and torch.export too.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rpe_tvm.errors import DTypeError, ShapeError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

torch.library.define(
    "rpe_tvm::kept_keys", "(Tensor key_lengths, SymInt n_k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def without_padding(key: Tensor, value: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value without what stands in their padding, and which keys are kept.

    Parameters
    ----------
    key, value : Tensor
        ``[B, H, n_k, d]``.
    key_lengths : Tensor
        ``[B]``, integers.

    Returns
    -------
    key, value : Tensor
        Padding in key repeats the first key, so that a feature map that looks at all keys sees real ones; padding in
        value is 0. Neither NaN nor inf in padding gets any further, forward or backward.
    kept : Tensor
        ``[B, 1, n_k, 1]``, bool.

    Raises
    ------
    DTypeError, ShapeError
        Unless key_lengths holds one integer from 0 to n_k for each sequence.
    """
    batch, n_k = key.shape[0], key.shape[2]
    if key_lengths.dtype not in _INTEGERS:
        raise DTypeError(
            f"Invalid dtype of key_lengths: expected torch.int64 or another integer, got {key_lengths.dtype}. Give "
            "the number of keys of each sequence; of a mask, that is mask.sum(-1)."
        )
    if key_lengths.dim() != 1 or key_lengths.shape[0] != batch:
        raise ShapeError(
            f"Invalid shape of key_lengths: expected [B] = [{batch}], one length for each sequence, got "
            f"{list(key_lengths.shape)}."
        )
    kept = cast(Tensor, torch.ops.rpe_tvm.kept_keys(key_lengths, n_k))[:, None, :, None]
    first = key.detach()[:, :, :1].where(kept[:, :, :1], 0.0)
    return key.where(kept, first), value.where(kept, 0.0), kept


def _kept_keys(key_lengths: Tensor, n_k: int) -> Tensor:
    key_lengths = key_lengths.long()  # n_k may be more than a narrow integer holds
    wrong = key_lengths[(key_lengths < 0) | (key_lengths > n_k)]
    if wrong.numel():
        raise ShapeError(
            f"Invalid key_lengths: expected lengths from 0 to n_k = {n_k}, got {wrong[0].item()}. A length counts the "
            "keys at the start of a sequence that are attended to."
        )
    return torch.arange(n_k, device=key_lengths.device) < key_lengths[:, None]


def _kept_keys_fake(key_lengths: Tensor, n_k: int) -> Tensor:
    return key_lengths.new_empty([key_lengths.shape[0], n_k], dtype=torch.bool)


torch.library.impl("rpe_tvm::kept_keys", "CompositeExplicitAutograd", _kept_keys)
torch.library.register_fake("rpe_tvm::kept_keys", _kept_keys_fake)
