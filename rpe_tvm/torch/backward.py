"""Gradients of attention from compiled functions: recomputes what the forward pass did not keep.

Kept from the forward pass are its arguments and its output; features, weights and denominators are computed again.
Nothing of size n m d or n n is made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from rpe_tvm.errors import SecondGradientError
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.twiddles import frequencies, weight_table_shape
from rpe_tvm.runtime import Instance
from rpe_tvm.torch.layouts import pack_positions, scratch_tensor, unpack_features


class Gradients(NamedTuple):
    """Gradients of attention on ready features.

    `phi` is `[2, B, H, m, N2, N1]`, of the features of queries (0) and of keys (1), laid out as the features are. It is
    memory of this thread, valid until its next call.
    """

    phi: Tensor
    value: Tensor
    rpe_bias: Tensor


def attention_backward(
    instance: Instance, grad_out: Tensor, out: Tensor, phi: Tensor, value: Tensor, rpe_bias: Tensor, is_causal: bool
) -> Gradients:
    """Gradients of ``sum(grad_out * out)`` (Luo 2021, Eq. 10, differentiated; see `te.fft_backward`).

    Parameters
    ----------
    instance : Instance
        The compiled gradients, `rpe_tvm.torch.dispatch.get_backward`.
    grad_out, out : Tensor
        ``[B, H, n_q, d]``: the gradient and the result of the forward pass. Rows of grad_out whose denominator is 0
        must be 0.
    phi : Tensor
        ``[2, B, H, m, N2, N1]``: features of queries and keys in the layout of `instance.config`.
    value : Tensor
        ``[B, H, n_k, d]``, its last axis contiguous.
    rpe_bias : Tensor
        ``[H, n_q + n_k - 1]``, contiguous.
    is_causal : bool
        As in the forward pass.
    """
    config, functions, tables = cast(BackwardConfig, instance.config), instance.functions, instance.tables
    batch, heads, n_q, _ = out.shape
    n_k = value.shape[2]
    spectra = scratch_tensor("spectra", (2, *weight_table_shape(config, heads, n_q, n_k)))
    functions["weights"](rpe_bias, n_q, n_k, int(is_causal), tables, spectra[0])
    torch.mul(spectra[0], torch.tensor([1.0, -1.0]), out=spectra[1])

    split = split_of(config)
    groups = -(-config.num_features // (2 * config.lanes))
    denominators = scratch_tensor("denominators", (batch, heads, groups, split.n2, split.q, split.s))
    functions["denominator"](phi[0], phi[1], spectra[0], tables, denominators)
    denominator = unpack_features(config, denominators.sum(2, keepdim=True), n_q)
    inverse = torch.where(denominator == 0, 0.0, 1.0 / denominator)
    grad = torch.mul(grad_out, inverse, out=scratch_tensor("grad", out.shape))

    # numerators
    radix = config.inner[-1]
    spectrum_shape = (split.n1, split.n2 // radix, radix, 2)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    sums = (batch, heads, config.parts, 2, config.num_features, split.n2, split.q, split.s)
    grad_phi = scratch_tensor("grad_phi", sums)
    correlation = scratch_tensor("correlation", (batch, heads, config.parts, 2, *spectrum_shape))
    functions["backward"](phi, value, grad, spectra, tables, grad_phi, correlation, grad_value)
    correlations = correlation.sum((0, 2))

    # denominators
    products = torch.mul(grad, out, out=scratch_tensor("products", out.shape))
    weight = pack_positions(config, products.sum(-1).neg_())
    total = scratch_tensor("total", phi.shape)
    of_denominator = scratch_tensor("correlation", (batch, heads, groups, 2, *spectrum_shape))
    functions["denominator_backward"](phi, weight, grad_phi, spectra, tables, total, of_denominator)
    correlations += of_denominator.sum((0, 2))
    natural = torch.empty(correlations.shape[0], 2, config.length, dtype=torch.complex64)
    natural[..., torch.from_numpy(frequencies(config))] = torch.view_as_complex(correlations.flatten(2, 4))
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
    circular = torch.fft.ifft(spectra)
    angles = torch.arange(length, device=spectra.device) * (math.pi / length)
    turn = torch.polar(torch.ones_like(angles), angles)
    even, odd = circular[:, 0].real, (circular[:, 1] * turn).real
    ahead, behind = (even + odd) / 2, (even - odd) / 2  # offsets 0 .. P-1, and -P .. -1
    by_offset = torch.cat((behind[:, length - (n_q - 1) :], ahead[:, :n_k]), dim=1)
    count = n_q if is_causal else n_q + n_k - 1  # a causal query sees no later key
    gradient = torch.zeros_like(rpe_bias)
    allowed = rpe_bias[:, :count]
    weights = torch.exp(allowed - allowed.amax(1, keepdim=True))
    gradient[:, :count] = weights * by_offset[:, :count]
    return gradient


def refuse_second_gradients(ctx: Any, *grads: Tensor) -> NoReturn:
    """Autograd formula of operators that are gradients: torch's own fallback would pass none on, with a warning."""
    raise SecondGradientError(
        "Expected first gradients of attention, got a gradient of its gradients, which rpe_tvm does not compute. Drop "
        "create_graph=True, or compute this attention with plain torch operations."
    )


def feature_map_gradients(
    feature_map: str, x: Tensor, projection: Tensor, grad_exponent: Tensor, of_projection: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of PRF's or NPRF's argument and projection from that of the exponent W x' (- |x'|^2 / 2).

    Parameters
    ----------
    feature_map : str
        ``"prf"`` or ``"nprf"`` (Luo 2021, Eq. 5 and Algorithm 1). A zero vector has no direction: NPRF's gradient is 0.
    x : Tensor
        ``[B, H, n, d]``.
    projection : Tensor
        W, ``[m, d]``.
    grad_exponent : Tensor
        ``[B, H, n, m]``.
    of_projection : bool
        Whether the projection's gradient is wanted.

    Returns
    -------
    grad_x, grad_projection : Tensor
        ``[B, H, n, d]`` and ``[m, d]`` or None, contiguous.
    """
    along = grad_exponent @ projection
    scaled = _memory("scaled", x)
    if feature_map == "nprf":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.where(norm == 0, 0.0, 1.0 / norm)
        scaled = torch.mul(x, inverse, out=scaled)
        products = torch.mul(scaled, along, out=_memory("products", x))
        grad_x = along.addcmul_(scaled, products.sum(-1, keepdim=True), value=-1.0).mul_(inverse)
    else:
        inverse = projection.shape[1] ** -0.25
        scaled = torch.mul(x, inverse, out=scaled)
        grad_x = along.addcmul_(scaled, grad_exponent.sum(-1, keepdim=True), value=-1.0).mul_(inverse)
    grad_projection = grad_exponent.flatten(0, 2).mT @ scaled.flatten(0, 2) if of_projection else None
    return grad_x.contiguous(), grad_projection


def _memory(name: str, like: Tensor) -> Tensor:
    """Memory as `scratch_tensor`; on GPUs torch's, which is cheap there and bound to the stream."""
    return scratch_tensor(name, like.shape) if like.is_cpu else torch.empty_like(like)
