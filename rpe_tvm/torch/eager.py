"""Attention, called as it was before: past torch's dispatcher, and past checks that an equal call has passed.

On an H100's host those take 40 us, and a kernel for 1024 positions 17; on a CPU whose caches are full of what kernels
left there 100 to 300 us. A call equals another one if its tensors have the same sizes, strides, dtypes and devices,
begin at the same place within 16 bytes, and the rest of its arguments is the same: nothing else is checked, and nothing
else decides which kernels run.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.torch import operators
from rpe_tvm.torch.cuda import Launch, Recorded, current_gpu, is_in_whole_pieces, launch, launch_recorded
from rpe_tvm.torch.dispatch import get_gpu_operator, when_forgotten
from rpe_tvm.torch.feature_maps import FeatureMap
from rpe_tvm.torch.plain import is_plain, records_gradients
from rpe_tvm.torch.recorded import Forward, Tensors, recorded

# Calls that are kept: those of a model with a few lengths. More begin anew.
MOST_CALLS = 1024

# without gradients, and with them
_known: dict[tuple[Any, ...], tuple[Forward, Forward]] = {}
when_forgotten(_known.clear)


def attention(
    query: Tensor, key: Tensor, value: Tensor, rpe_bias: Tensor, feature_map: FeatureMap, is_causal: bool
) -> Tensor | None:
    """Attention if an equal call was remembered, and only autograd looks at this one; else None.

    The arguments are those of `kernelized_attention`, which may still be wrong.
    """
    tensors = query, key, value, rpe_bias, feature_map.projection
    if not is_plain(*tensors):
        return None
    known = _known.get(_signature(tensors, feature_map, is_causal))
    if known is None:
        return None
    if records_gradients(*tensors):
        return recorded(known[1], tensors, feature_map.name, is_causal)
    return known[0](tensors)[0]


def remember(
    query: Tensor, key: Tensor, value: Tensor, rpe_bias: Tensor, feature_map: FeatureMap, is_causal: bool
) -> None:
    """Remember a call that has passed all checks, if its kernels read all of its tensors where they lie."""
    tensors = query, key, value, rpe_bias, feature_map.projection
    if query.numel() == 0 or key.numel() == 0 or not is_plain(*tensors):
        return
    if not all(x.is_contiguous() and x.dtype == torch.float32 for x in tensors[3:]):
        return
    found = (_find_on_gpu if query.is_cuda else _find_on_cpu)(tensors, feature_map.name, is_causal)
    if found is not None:
        if len(_known) >= MOST_CALLS:
            _known.clear()
        _known[_signature(tensors, feature_map, is_causal)] = found


def _is_last_axis_contiguous(x: Tensor) -> bool:
    return x.stride(-1) == 1


def _signature(tensors: Tensors, feature_map: FeatureMap, is_causal: bool) -> tuple[Any, ...]:
    parts = [(x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16) for x in tensors]
    return (feature_map.name, is_causal, *itertools.chain.from_iterable(parts))


def _find_on_gpu(tensors: Tensors, feature_map: str, is_causal: bool) -> tuple[Forward, Forward] | None:
    query, key = tensors[:2]
    n, (m, d) = max(query.shape[2], key.shape[2]), tensors[4].shape
    instance = get_gpu_operator(query.get_device(), n, m, d, operators.dtype_name(query.dtype))
    rows_fit = is_in_whole_pieces if isinstance(instance.config, TensorCoreConfig) else _is_last_axis_contiguous
    if not all(map(rows_fit, tensors[:3])):
        return None
    call = instance, query, key, feature_map, is_causal
    plain, keeping = launch(*call), launch_recorded(*call)
    return functools.partial(_on_gpu, plain), functools.partial(_on_gpu, keeping)


def _find_on_cpu(tensors: Tensors, feature_map: str, is_causal: bool) -> tuple[Forward, Forward] | None:
    if not all(map(_is_last_axis_contiguous, tensors[:3])):
        return None

    def plain(given: Tensors) -> tuple[Tensor, None]:
        return operators.attention_on_cpu(*given, feature_map, is_causal), None

    return plain, functools.partial(operators.recorded_on_cpu, feature_map, is_causal)


def _on_gpu(known: Launch | Recorded, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
    """The output, and what a recorded call keeps beside it."""
    query = tensors[0]
    out = operators.empty_output(query)
    with current_gpu(query):
        kept = known(*tensors, out)
    return out, kept
