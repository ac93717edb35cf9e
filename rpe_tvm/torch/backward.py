"""Gradients of attention from compiled functions: recomputes what the forward pass did not keep.

Kept from the forward pass are its arguments and its output; features, weights and denominators are computed again.
Nothing of size n m d or n n is made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from rpe_tvm.errors import SecondGradientError
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.twiddles import frequencies, weight_table_shape
from rpe_tvm.runtime import Instance
from rpe_tvm.torch.layouts import Sides, last_axis_contiguous, scratch_sides, scratch_tensor


class Gradients(NamedTuple):
    """Gradients of attention on ready features.

    `phi` is `[2, B, H, m, N2, N1]`, of the features of queries and keys, laid out as the features are. It is memory of
    this thread, valid until its next call.
    """

    phi: Sides
    value: Tensor
    rpe_bias: Tensor


def attention_backward(
    instance: Instance, grad_out: Tensor, out: Tensor, phi: Sides, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> Gradients:
    """Gradients of ``sum(grad_out * out)`` (Luo 2021, Eq. 10, differentiated; `te.fft_backward`, `te.direct_backward`).

    Parameters
    ----------
    instance : Instance
        The compiled gradients, `rpe_tvm.torch.dispatch.get_backward`.
    grad_out, out : Tensor
        ``[B, H, n_q, d]``: the gradient and the result of the forward pass. Rows of grad_out whose denominator is 0
        must be 0.
    phi : Sides
        ``[2, B, H, m, N2, N1]``: features of queries and keys in the layout of `instance.config`.
    value : Tensor
        ``[B, H, n_k, d]``, its last axis contiguous.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``, contiguous.
    is_causal : bool
        As in the forward pass.
    """
    by_algorithm = _by_tiles if instance.config.algorithm == "direct" else _by_fft
    return by_algorithm(instance, grad_out, out, phi, value, rpe_bias, is_causal)


def _by_tiles(
    instance: Instance, grad_out: Tensor, out: Tensor, phi: Sides, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> Gradients:
    config, functions = instance.config, instance.functions
    batch, heads, n_q, _ = out.shape
    n_k = value.shape[2]
    # the forward pass may have kept features of more positions than these tiles take
    table = scratch_tensor("table", (heads, 2 * phi.query.shape[3:].numel()))
    functions["weights"](rpe_bias, n_q, n_k, int(is_causal), instance.tables, table)
    grad, out = last_axis_contiguous(grad_out), last_axis_contiguous(out)
    grad_bias = torch.empty((heads, n_q + n_k - 1))
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    grad_phi = scratch_sides("total", phi.both.shape)
    offset_sums = scratch_tensor("offset sums", (batch, heads, table.shape[1] // config.lanes, config.lanes))
    functions["backward"](phi.both, value, grad, out, table, offset_sums, grad_value, grad_phi.both, grad_bias)
    return Gradients(grad_phi, grad_value, grad_bias)


def _by_fft(
    instance: Instance, grad_out: Tensor, out: Tensor, phi: Sides, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> Gradients:
    config, functions, tables = cast(BackwardConfig, instance.config), instance.functions, instance.tables
    batch, heads, n_q, _ = out.shape
    n_k = value.shape[2]
    spectra = scratch_tensor("spectra", (2, *weight_table_shape(config, heads, n_q, n_k)))
    functions["weights"](rpe_bias, n_q, n_k, int(is_causal), tables, spectra[0])
    torch.mul(spectra[0], torch.tensor([1.0, -1.0]), out=spectra[1])

    grad_out, out = last_axis_contiguous(grad_out), last_axis_contiguous(out)
    rows = (batch, heads, *phi.query.shape[3:])
    inverse, weight = scratch_tensor("inverse", rows), scratch_tensor("w", rows)
    functions["row_weights"](phi.query, phi.key, spectra[0], tables, grad_out, out, inverse, weight)

    # numerators
    split = split_of(config)
    radix = config.inner[-1]
    spectrum_shape = (split.n1, split.n2 // radix, radix, 2)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    sums = (batch, heads, config.parts, 2, config.num_features, split.n2, split.q, split.s)
    grad_phi = scratch_tensor("grad_phi", sums)
    correlation = scratch_tensor("correlation", (batch, heads, config.parts, 2, *spectrum_shape))
    functions["backward"](phi.both, value, grad_out, inverse, spectra, tables, grad_phi, correlation, grad_value)
    correlations = correlation.sum((0, 2))

    # denominators
    groups = -(-config.num_features // (2 * config.lanes))
    total = scratch_sides("total", phi.both.shape)
    of_denominator = scratch_tensor("correlation", (batch, heads, groups, 2, *spectrum_shape))
    functions["denominator_backward"](phi.both, weight, grad_phi, spectra, tables, total.both, of_denominator)
    correlations += of_denominator.sum((0, 2))
    natural = torch.view_as_complex(correlations.flatten(2, 4))[..., _places(config)]
    return Gradients(total, grad_value, bias_gradient(natural, rpe_bias, n_q, n_k, is_causal))


def bias_gradient(spectra: Tensor, rpe_bias: Tensor, n_q: int, n_k: int, is_causal: bool) -> Tensor:
    """Gradient of b from the gradient of the spectra of exp(b): the inverse of how weights become spectra.

    With S_p the spectrum of parity p, grad c_t = Re sum_k,p S_p[k] exp(2 pi i t (k + p / 2) / P) / 2P and db = c dc.

    Parameters
    ----------
    spectra : Tensor
        S, complex ``[H, 2, P]``, frequencies in natural order.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``.
    n_q, n_k, is_causal
        As in the forward pass.
    """
    length = spectra.shape[2]
    circular, turn = torch.fft.ifft(spectra), _turns(length, spectra.device)
    even, odd = circular[:, 0].real, (circular[:, 1] * turn).real
    ahead, behind = (even + odd) / 2, (even - odd) / 2  # offsets 0 .. P-1, and -P .. -1
    by_offset = torch.cat((behind[:, length - (n_q - 1) :], ahead[:, :n_k]), dim=1)
    count = n_q if is_causal else n_q + n_k - 1  # a causal query sees no later key
    gradient = torch.zeros_like(rpe_bias)
    allowed = rpe_bias[:, :count]
    weights = torch.exp(allowed - allowed.amax(1, keepdim=True))
    gradient[:, :count] = weights * by_offset[:, :count]
    return gradient


@functools.lru_cache(maxsize=64)
def _places(config: BackwardConfig) -> Tensor:
    """Where each frequency stands in a spectrum in digit order."""
    return torch.from_numpy(np.argsort(frequencies(config)))


@functools.lru_cache(maxsize=64)
def _turns(length: int, device: torch.device) -> Tensor:
    """exp(i pi t / P) for t < P."""
    angles = torch.arange(length, device=device) * (math.pi / length)
    return torch.polar(torch.ones_like(angles), angles)


def refuse_second_gradients(ctx: Any, *grads: Tensor) -> NoReturn:
    """Autograd formula of operators that are gradients: torch's own fallback would pass none on, with a warning."""
    raise SecondGradientError(
        "Expected first gradients of attention, got a gradient of its gradients, which rpe_tvm does not compute. Drop "
        "create_graph=True, or compute this attention with plain torch operations."
    )


def argument_gradients(
    instance: Instance,
    feature_map: str,
    inputs: Sequence[Tensor],
    projection: Tensor,
    phi: Sides,
    grad_phi: Sides,
    of_projection: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the feature map's arguments and of its projection.

    Parameters
    ----------
    instance : Instance
        The compiled gradients.
    feature_map : str
        ``"prf"`` or ``"nprf"`` (Luo 2021, Eq. 5 and Algorithm 1).
    inputs : sequence of Tensor
        query ``[B, H, n_q, d]`` and key ``[B, H, n_k, d]``, contiguous in the last axis.
    projection : Tensor
        W, ``[m, d]``, contiguous.
    phi, grad_phi : Sides
        ``[2, B, H, m, N2, N1]``: features and their gradients, as of `attention_backward`.
    of_projection : bool
        Whether the projection's gradient is wanted.

    Returns
    -------
    grad_query, grad_key, grad_projection : Tensor
        Shaped as query, key and projection, contiguous; None for a projection's that is not wanted.
    """
    backward = instance.functions[f"features_{feature_map}_backward"]
    batch, heads, m, rows, columns = phi.query.shape
    grad_exponent = scratch_tensor("exponent", (batch, heads, rows * columns, m))
    grads, of_sides = [], []
    for x, features, grad in zip(inputs, phi[1:], grad_phi[1:], strict=True):
        grads.append(torch.empty(x.shape))
        backward(x, projection, features, grad, grad_exponent, grads[-1])
        if of_projection:
            of_sides.append(_projection_gradient(feature_map, x, grad_exponent[:, :, : x.shape[2]]))
    return grads[0], grads[1], sum(of_sides[1:], of_sides[0]) if of_projection else None


def _projection_gradient(feature_map: str, x: Tensor, grad_exponent: Tensor) -> Tensor:
    """Gradient ``[m, d]`` of the projection, from that of the exponents by position, ``[B, H, n, m]``."""
    scale: Tensor | float = x.shape[-1] ** -0.25
    if feature_map == "nprf":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.where(norm == 0, 0.0, 1.0 / norm)
    scaled = torch.mul(x, scale, out=scratch_tensor("scaled", x.shape))
    # head by head: as one product of all positions, torch would copy grad_exponent, which lies in longer rows
    return torch.bmm(grad_exponent.flatten(0, 1).mT, scaled.flatten(0, 1)).sum(0)
