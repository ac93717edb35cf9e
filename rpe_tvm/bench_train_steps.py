"""One training step of each contestant: forward and backward, to the gradients of query, key, value and rpe_bias."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OPERATOR = "rpe_tvm"
# The peers by name, with their headings.
PEERS = {"torch_fft": "torch.fft", "torch_fft_by_feature": "torch.fft by feature", "sdpa_bias": "SDPA + bias"}
# What a step gives: the output and these gradients.
PARTS = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of rpe_bias")

Step = Callable[[], "tuple[torch.Tensor, ...]"]


@dataclass(frozen=True)
class Size:
    """n, H, m and d of a measurement, with a batch of 1, and whether query i sees keys j <= i only."""

    n: int
    heads: int
    num_features: int
    head_dim: int
    is_causal: bool = False


@dataclass(frozen=True)
class Inputs:
    """Tensors: query, key, value, grad_out `[1, H, n, d]`, rpe_bias `[H, 2n-1]`, projection `[m, d]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rpe_bias: torch.Tensor
    projection: torch.Tensor
    grad_out: torch.Tensor

    @property
    def learned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What gradients are taken of, in the order of `PARTS`."""
        return self.query, self.key, self.value, self.rpe_bias


def make_inputs(size: Size) -> Inputs:
    """Random float32 inputs, the same for the same size."""
    import torch

    generator = torch.Generator().manual_seed(size.n)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    positions = (1, size.heads, size.n, size.head_dim)
    return Inputs(
        query=normal(positions).requires_grad_(),
        key=normal(positions).requires_grad_(),
        value=normal(positions).requires_grad_(),
        rpe_bias=normal(size.heads, 2 * size.n - 1).requires_grad_(),
        projection=normal(size.num_features, size.head_dim),
        grad_out=normal(positions),
    )


def step_of(name: str, inputs: Inputs, is_causal: bool) -> Step:
    """One forward and backward of `name` (the operator or one of `PEERS`), from tensors to gradients.

    All of it belongs to the step: feature maps and weights for the operator and torch.fft, the mask made of rpe_bias
    for softmax attention, through which its gradient goes back to `[H, 2n-1]`.
    """
    attend = _attention(name, inputs, is_causal)
    return functools.partial(differentiate, attend, inputs)


def differentiate(attend: Callable[[], torch.Tensor], inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of sum(grad_out * output): `PARTS`."""
    import torch

    out = attend()
    return (out.detach(), *torch.autograd.grad(out, inputs.learned, inputs.grad_out))


def forward_of_operator(inputs: Inputs, is_causal: bool) -> Step:
    """The operator's forward pass alone, as in inference."""
    import torch

    attend = _attention(OPERATOR, inputs, is_causal)

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (attend(),)

    return forward


def _attention(name: str, inputs: Inputs, is_causal: bool) -> Callable[[], torch.Tensor]:
    from rpe_tvm import peers

    n = inputs.query.shape[2]
    tensors = inputs.learned
    if name == OPERATOR:
        module = importlib.import_module("rpe_tvm.torch")
        feature_map = module.NPRF(inputs.projection)
        return functools.partial(module.kernelized_attention, *tensors, feature_map=feature_map, is_causal=is_causal)
    if name == "sdpa_bias":
        q, k, v, b = tensors
        return lambda: peers.sdpa_with_bias(q, k, v, peers.bias_mask(b, n, n, is_causal=is_causal).to(q.dtype))
    chunk = {"torch_fft": None, "torch_fft_by_feature": 1}[name]
    return functools.partial(peers.torch_fft_attention, *tensors, inputs.projection, is_causal=is_causal, chunk=chunk)


def step_bytes(name: str, size: Size) -> int:
    """Peak memory of a peer's step in bytes, without its inputs: estimated from above, by measured steps.

    Which arrays of torch.fft's formula autograd holds at once differs from run to run: the most that were seen count.
    Autograd keeps for every feature what its backward needs, so the form by feature is no longer a lean one.
    """
    from rpe_tvm import peers

    if name == "sdpa_bias":
        arrays = 4 * size.n**2
    else:
        copies = {"torch_fft": 11.0, "torch_fft_by_feature": 4.5}[name]
        products = size.num_features * size.head_dim * peers.fft_length(2 * size.n - 1)
        arrays = int(copies * products) + 20 * size.n * (size.num_features + size.head_dim)
    return 4 * size.heads * arrays + 64 * 2**20  # and the code that a first step loads
