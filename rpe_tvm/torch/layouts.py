"""Features between torch's layout `[B, H, n, m]` and the buffers that compiled functions read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.twiddles import feature_shape
from rpe_tvm.runtime.operator import FloatArray, scratch_view


def last_axis_contiguous(x: Tensor) -> Tensor:
    """Return x as kernels take it, copied only where its last axis has another stride than 1."""
    # Not .contiguous(): on an axis of size 1 that would keep any stride.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def pack_features(config: AttentionConfig, phi: Tensor, out: Tensor) -> None:
    """Write features `[B, H, n, m]` to a buffer of shape `feature_shape`, zeros past n."""
    batch, heads, n, m = phi.shape
    padded = out.shape[3] * out.shape[4]
    if config.algorithm == "direct":
        rows = out.view(batch, heads, m, padded)
        rows[..., :n] = phi.mT
        rows[..., n:] = 0.0
        return
    if n < padded:
        phi = torch.nn.functional.pad(phi, (0, 0, 0, padded - n))
    split = split_of(config)
    natural = phi.reshape(batch, heads, split.s, split.q, split.n2, m)
    out.view(batch, heads, m, split.n2, split.q, split.s).copy_(natural.permute(0, 1, 5, 4, 3, 2))


def unpack_features(config: AttentionConfig, buffer: Tensor, n: int) -> Tensor:
    """Return the features `[B, H, n, m]` of a buffer, `[B, H, m, rows, columns]`; of `direct`, a view of it."""
    batch, heads, m = buffer.shape[:3]
    if config.algorithm == "direct":
        return buffer.flatten(3).mT[:, :, :n]
    split = split_of(config)
    columns = buffer.reshape(batch, heads, m, split.n2, split.q, split.s)
    return columns.permute(0, 1, 5, 4, 3, 2).reshape(batch, heads, config.length, m)[:, :, :n]


class Sides(NamedTuple):
    """Memory `[2, ...]` of what queries (0) and keys (1) have, whole and as its halves."""

    both: Tensor
    query: Tensor
    key: Tensor


def feature_memory(config: AttentionConfig, batch: int, heads: int, n_query: int, n_key: int) -> Sides:
    """Return memory for the features of queries and keys, `[2, B, H, m, rows, columns]`, as `scratch_tensor` does."""
    return scratch_sides("phi", (2, *feature_shape(config, batch, heads, n_query, n_key)))


def scratch_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Memory of this thread, valid until its next call with this name: fresh memory costs more than what fills it."""
    return scratch_view(f"torch {name}", shape, _as_tensor)


def scratch_sides(name: str, shape: tuple[int, ...]) -> Sides:
    """As `scratch_tensor`; `shape` is `[2, ...]`."""
    return scratch_view(f"torch {name}", shape, _as_sides)


def _as_tensor(array: FloatArray) -> Tensor:
    with torch.inference_mode(False):  # tensors of that mode could be written in no other
        return torch.from_numpy(array)


def _as_sides(array: FloatArray) -> Sides:
    both = _as_tensor(array)
    with torch.inference_mode(False):
        return Sides(both, both[0], both[1])
