"""Rows of the results in float64, computed where the inputs are: on a GPU that saves a minute at 262144 positions.

The tests compare them with `rpe_tvm.reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rpe_tvm.bench_problem import Float64, Inputs, Rows

if TYPE_CHECKING:
    import torch


def attention_rows(rows: Rows, inputs: Inputs, is_causal: bool) -> Float64:
    """Rows of kernelized attention with the NPRF feature map (Luo et al. 2021, Eq. 10), `[1, H, r, d]`."""
    import torch.nn.functional as F

    def exponents(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.double(), dim=-1) @ inputs.projection.double().T - 0.5

    bias, ahead = _bias_rows(rows, inputs)
    weights = (bias - inputs.rpe_bias.double().amax(-1)[:, None, None]).exp()
    if is_causal:
        weights = weights.masked_fill(ahead, 0.0)
    # The factor 1 / m of both features cancels.
    scores = exponents(inputs.query[:, :, rows.tolist()]).exp() @ exponents(inputs.key).exp().mT * weights
    return _numpy(scores @ inputs.value.double() / scores.sum(-1, keepdim=True))


def softmax_rows(rows: Rows, inputs: Inputs, is_causal: bool, with_bias: bool) -> Float64:
    """Rows of softmax attention (Luo et al. 2021, Eq. 6), `[1, H, r, d]`."""
    query, key = inputs.query[:, :, rows.tolist()].double(), inputs.key.double()
    bias, ahead = _bias_rows(rows, inputs)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if with_bias:
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(ahead, -float("inf"))
    return _numpy(scores.softmax(-1) @ inputs.value.double())


def _bias_rows(rows: Rows, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The bias between some queries and all keys, `[H, r, n]`, and which keys lie ahead of the query, `[r, n]`."""
    import torch

    n, device = inputs.key.shape[2], inputs.key.device
    offset = torch.arange(n, device=device) - torch.from_numpy(rows).to(device)[:, None]
    return inputs.rpe_bias.double()[:, offset + n - 1], offset > 0


def _numpy(x: torch.Tensor) -> Float64:
    return np.asarray(x.cpu().numpy())
