"""What the benchmarks of the forward pass compute: inputs, our operator's call, and rows of the results in float64."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rpe_tvm.reference import attention_rows

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Inputs:
    """Of one device: q, k, v `[1, H, n, d]` of one dtype; rpe_bias `[H, 2n-1]` and projection `[m, d]`, float32."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rpe_bias: torch.Tensor
    projection: torch.Tensor

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        """The inputs on a device, q, k and v in `dtype`.

        The bias is rounded to `dtype` and stays float32, so that a mask of that dtype holds the same numbers.
        """
        return Inputs(
            query=self.query.to(device, dtype),
            key=self.key.to(device, dtype),
            value=self.value.to(device, dtype),
            rpe_bias=self.rpe_bias.to(device, dtype).float(),
            projection=self.projection.to(device),
        )


def make_inputs(n: int, heads: int, num_features: int, head_dim: int) -> Inputs:
    """Normally distributed numbers on the CPU, float32, the same at every call."""
    import torch

    generator = torch.Generator().manual_seed(n)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    return Inputs(
        query=normal(1, heads, n, head_dim),
        key=normal(1, heads, n, head_dim),
        value=normal(1, heads, n, head_dim),
        rpe_bias=normal(heads, 2 * n - 1),
        projection=normal(num_features, head_dim),
    )


def operator_call(inputs: Inputs, is_causal: bool) -> Callable[[], torch.Tensor]:
    """A call of `kernelized_attention` with the NPRF feature map, `[1, H, n, d]`."""
    module = importlib.import_module("rpe_tvm.torch")
    feature_map = module.NPRF(inputs.projection)

    def call() -> torch.Tensor:
        output: torch.Tensor = module.kernelized_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.rpe_bias,
            feature_map=feature_map,
            is_causal=is_causal,
        )
        return output

    return call


def expected_rows(rows: Rows, inputs: Inputs, is_causal: bool) -> Float64:
    """Rows of the operator's result in float64, `[1, H, r, d]`."""
    arrays = (inputs.query, inputs.key, inputs.value, inputs.rpe_bias, inputs.projection)
    q, k, v, b, w = map(_float64, arrays)
    return attention_rows(rows, q, k, v, b, w, is_causal=is_causal)


def softmax_rows(rows: Rows, inputs: Inputs, is_causal: bool, with_bias: bool) -> Float64:
    """Rows of softmax attention in float64 (Luo et al. 2021, Eq. 6), `[1, H, r, d]`."""
    query, key, value, bias = map(_float64, (inputs.query, inputs.key, inputs.value, inputs.rpe_bias))
    n, head_dim = query.shape[2:]
    offset = np.arange(n) - rows[:, None]
    scores = query[:, :, rows] @ key.swapaxes(-1, -2) / np.sqrt(head_dim)
    if with_bias:
        scores = scores + bias[:, offset + n - 1]
    if is_causal:
        scores = np.where(offset > 0, -np.inf, scores)
    alpha = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Float64 = (alpha / alpha.sum(axis=-1, keepdims=True)) @ value
    return result


def _float64(x: torch.Tensor) -> Float64:
    return np.asarray(x.double().cpu().numpy())
