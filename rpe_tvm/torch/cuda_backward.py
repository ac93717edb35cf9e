"""Gradients of attention on GPUs: the sequence of compiled functions, and what torch does between them.

As `rpe_tvm.torch.backward` on CPUs: kept from the forward pass are its arguments and its output, the rest is computed
again. Everything is on the caller's stream; nothing waits. By FFT all is float32; on tensor cores (`attention_backward`
with a `TensorCoreBackwardConfig`) one function makes all gradients.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rpe_tvm.errors import GpuGradientError
from rpe_tvm.plan import gpu, gpu_backward, gpu_buffers, gpu_direct, gpu_direct_backward, gpu_workspace
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.torch import cuda
from rpe_tvm.torch.backward import bias_gradient
from rpe_tvm.torch.layouts import last_axis_contiguous


class Gradients(NamedTuple):
    """Gradients of attention on ready features.

    Those of the features are laid out as the features are, `[B, H, m, P]`, and hold anything past the length.
    """

    phi_q: Tensor
    phi_k: Tensor
    value: Tensor
    rpe_bias: Tensor


def check_length(n: int) -> None:
    """Raise `GpuGradientError` if there are no gradients for n positions, the larger of queries and keys."""
    if n > gpu_backward.LONGEST:
        raise GpuGradientError(
            f"Gradients of attention on GPUs serve up to {gpu_backward.LONGEST} queries and keys so far, got {n}. Run "
            "it under torch.no_grad(), or move the tensors to the CPU (.cpu()), where gradients of all lengths are "
            "compiled."
        )


def attention_backward(
    instance: GpuInstance,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    *,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
) -> tuple[Tensor, ...]:
    """Gradients of ``sum(grad_out * out)``, features included, on arguments that are known to fit.

    Parameters
    ----------
    instance : GpuInstance
        The compiled gradients, `rpe_tvm.torch.dispatch.get_gpu_backward`.
    grad_out, out : Tensor
        ``[B, H, n_q, d]``: the gradient and the result of the forward pass.
    query, key, value : Tensor
        ``[B, H, n_q, d]``, ``[B, H, n_k, d]`` twice; not empty; of one dtype, that of the forward pass.
    rpe_bias, projection : Tensor
        ``[H, n_q + n_k - 1]``, ``[m, d]``; float32.
    feature_map : str
        ``"nprf"`` or ``"prf"``.
    is_causal : bool
        As in the forward pass.
    of_projection : bool
        Whether the projection's gradient is wanted; else it is 0.

    Returns
    -------
    tuple of Tensor
        The gradients of query, key, value, rpe_bias and projection, contiguous, in the dtypes of their tensors.
    """
    if isinstance(instance.config, TensorCoreBackwardConfig):
        tensors = grad_out, query, key, value, rpe_bias, projection, out
        return _on_tensor_cores(instance, instance.config, *tensors, feature_map, is_causal, of_projection)
    dtype, projection = query.dtype, projection.contiguous()
    inputs = [last_axis_contiguous(x.float()) for x in (query, key)]
    with torch.cuda.device(query.get_device()):
        shape = gpu_buffers.features(_config(instance), *query.shape[:2])
        phi = [inputs[0].new_empty(shape) for _ in range(2)]
        instance.functions[f"features_{feature_map}"](*inputs, projection, *phi)
        found = _of_features(instance, grad_out, phi[0], phi[1], value, rpe_bias, out, is_causal)
        grad_projection = torch.zeros_like(projection)
        grads = []
        for x, features, grad_features in zip(inputs, phi, (found.phi_q, found.phi_k), strict=True):
            exponent = (features * grad_features)[..., : x.shape[2]].mT.contiguous()  # features are exponentials
            grad_x, part = _feature_map_gradients(feature_map, x, projection, exponent, of_projection)
            grads.append(grad_x.to(dtype))
            if part is not None:
                grad_projection += part
    return *grads, found.value.to(dtype), found.rpe_bias, grad_projection


def _on_tensor_cores(
    instance: GpuInstance,
    config: TensorCoreBackwardConfig,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    feature_map: str,
    is_causal: bool,
    of_projection: bool,
) -> tuple[Tensor, ...]:
    """`attention_backward` by tiles; without gradient of the projection nothing but the compiled function runs."""
    (batch, heads, n_q, _), n_k = query.shape, key.shape[2]
    projection = projection.contiguous()
    with cuda.current(query):
        rows = [cuda.in_whole_pieces(last_axis_contiguous(x)) for x in (query, key, value, out, grad_out)]
        rows_q, rows_k = (gpu_direct.round_up(n, config.positions) for n in (n_q, n_k))
        places, size = gpu_workspace.places(config, batch, heads, rows_q, rows_k)
        between = torch.empty(size, dtype=torch.uint8, device=query.device)
        shape = gpu_direct_backward.diagonals_shape(config, batch, heads, n_q, n_k)
        diagonals = torch.empty(shape, dtype=torch.float32, device=query.device)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value, rpe_bias)]
        blocks = rows_q // config.positions, rows_k // config.positions
        inputs = *rows[:3], rpe_bias.contiguous(), projection, *rows[3:], int(is_causal), int(of_projection), *blocks
        instance.functions[f"backward_{feature_map}"](*inputs, between, diagonals, *grads)
        grad_projection = torch.zeros_like(projection)
        if of_projection:
            for x, place in ((query, places["exponent_q"]), (key, places["exponent_k"])):
                end = place.offset + 4 * math.prod(place.shape)
                exponent = between[place.offset : end].view(torch.float32).view(place.shape)
                grad_projection += _projection_gradient(
                    feature_map, x, exponent[:, :, : x.shape[2], : config.num_features]
                )
    return *grads, grad_projection


def _projection_gradient(feature_map: str, x: Tensor, grad_exponent: Tensor) -> Tensor:
    """Gradient ``[m, d]`` of the projection from that of the exponents, ``[B, H, n, m]``, in float32."""
    x = x.float()
    scale: Tensor | float = x.shape[-1] ** -0.25
    if feature_map == "nprf":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.where(norm == 0, 0.0, 1.0 / norm)
    return torch.matmul(grad_exponent.mT, x * scale).sum((0, 1))


def attention_on_features_backward(
    instance: GpuInstance,
    grad_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    *,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    """Gradients of attention on ready features; as `attention_backward`, with phi_q ``[B, H, n_q, m]`` and phi_k
    ``[B, H, n_k, m]``. Rows of grad_out whose denominator is 0 must be 0.
    """
    with torch.cuda.device(phi_q.get_device()):
        packed = [_pack_features(_config(instance), phi) for phi in (phi_q, phi_k)]
        found = _of_features(instance, grad_out, packed[0], packed[1], value, rpe_bias, out, is_causal)
        n_q, n_k = phi_q.shape[2], phi_k.shape[2]
        return (
            found.phi_q[..., :n_q].mT.contiguous(),
            found.phi_k[..., :n_k].mT.contiguous(),
            found.value,
            found.rpe_bias,
        )


def _of_features(
    instance: GpuInstance,
    grad_out: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    is_causal: bool,
) -> Gradients:
    """See `te.gpu_backward` for the formulas."""
    config, functions = _config(instance), instance.functions
    tables = _tables(config, phi_q.device)
    batch, heads, n_q, d = out.shape
    n_k = value.shape[2]
    by_first_radix = (config.radices[0], -1)
    rpe_bias = rpe_bias.contiguous()
    largest, spectrum = phi_q.new_empty(heads), phi_q.new_empty(gpu_buffers.spectrum(config, heads))
    functions["largest"](rpe_bias, n_q, n_k, int(is_causal), largest)
    functions["spectrum"](rpe_bias, largest, n_q, n_k, int(is_causal), tables, spectrum)

    terms = phi_q.new_empty(gpu_buffers.denominator_terms(config, batch, heads))
    functions["denominators"](phi_q, phi_k, spectrum, tables, torch.unflatten(terms, 4, by_first_radix))
    denominator = terms.sum((2, 3))[:, :, :n_q, None]
    inverse = torch.where(denominator == 0, 0.0, 1.0 / denominator)
    grad = torch.mul(grad_out, inverse, out=phi_q.new_empty(out.shape))
    weight = (grad * out).sum(-1).neg_()

    channels = phi_q.new_empty(gpu_buffers.channels(config, batch, heads))
    turns = torch.view_as_complex(_turns(config, tables))
    _pack_channels(value, 1.0, turns, channels[0])
    _pack_channels(grad, weight, turns, channels[1])
    sums = phi_q.new_empty(gpu_buffers.backward_sums(config, batch, heads))
    functions["backward"](
        phi_q,
        phi_k,
        torch.unflatten(channels, 5, by_first_radix),
        spectrum,
        tables,
        torch.unflatten(sums, 5, by_first_radix),
    )
    grad_phi_q, grad_phi_k = sums[:, :, :, :, :2].sum(3).unbind(3)
    correlation = _natural_order(config, sums[:, :, :, :, 2:].sum((0, 2)))

    # C^T is C with queries and keys exchanged, and its spectrum the conjugate
    partial = phi_q.new_empty(gpu_buffers.partial(config.of_values, batch, heads))
    padded = torch.nn.functional.pad(grad, (0, config.of_values.head_dim - d))
    conjugate = torch.view_as_real(torch.view_as_complex(spectrum).conj().resolve_conj())
    functions["attention"](phi_k, phi_q, padded, conjugate, tables, torch.unflatten(partial, 4, (1, *by_first_radix)))
    return Gradients(
        grad_phi_q,
        grad_phi_k,
        _untwisted_rows(torch.view_as_complex(partial), turns)[:, :, :n_k, :d].contiguous(),
        bias_gradient(correlation, rpe_bias, n_q, n_k, is_causal),
    )


def _feature_map_gradients(
    feature_map: str, x: Tensor, projection: Tensor, grad_exponent: Tensor, of_projection: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of PRF's or NPRF's argument and projection from that of the exponent W x' (- |x'|^2 / 2).

    Shapes: x ``[B, H, n, d]``, grad_exponent ``[B, H, n, m]``. A zero vector has no direction: NPRF's gradient is 0.
    """
    along = grad_exponent @ projection
    if feature_map == "nprf":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse: Tensor | float = torch.where(norm == 0, 0.0, 1.0 / norm)
        scaled = x * inverse
        grad_x = along.addcmul_(scaled, (scaled * along).sum(-1, keepdim=True), value=-1.0).mul_(inverse)
    else:
        inverse = projection.shape[1] ** -0.25
        scaled = x * inverse
        grad_x = along.addcmul_(scaled, grad_exponent.sum(-1, keepdim=True), value=-1.0).mul_(inverse)
    grad_projection = grad_exponent.flatten(0, 2).mT @ scaled.flatten(0, 2) if of_projection else None
    return grad_x.contiguous(), grad_projection


def _pack_channels(rows: Tensor, last: Tensor | float, turns: Tensor, out: Tensor) -> None:
    """Write rows ``[B, H, n, d]``, with `last` as one more channel, to out ``[B, H, pairs, 2, P, 2]``, twisted."""
    batch, heads, n, d = rows.shape
    pairs, length = out.shape[2], out.shape[4]
    padded = out.new_zeros(batch, heads, length, 2 * pairs)
    padded[:, :, :n, :d] = rows
    padded[:, :, :n, d] = last
    plain = torch.view_as_complex(torch.unflatten(padded, 3, (pairs, 2))).mT
    packed = torch.view_as_complex(out)
    packed[:, :, :, 0] = plain
    packed[:, :, :, 1] = plain * turns


def _untwisted_rows(partial: Tensor, turns: Tensor) -> Tensor:
    """Both parities of partial, complex ``[B, H, pairs, 2, P]``, added: rows ``[B, H, P, channels]``."""
    pairs = partial[:, :, :, 0] + partial[:, :, :, 1] * turns.conj()
    return torch.view_as_real(pairs.mT.contiguous()).flatten(3)


def _natural_order(config: GpuBackwardConfig, correlation: Tensor) -> Tensor:
    """Return spectra ``[H, 2, P]``, complex, of ``[H, 2, 2, P]`` as `te.gpu_backward.fft_backward` orders frequencies.

    Digit order holds frequency sum_k digit_k prod(radices before k) at the position whose first digit counts most.
    """
    last, first = config.radices[-1], config.radices[0]
    by_digits = torch.unflatten(correlation, 3, (first // last, last, config.row // first)).transpose(4, 5)
    digits = torch.unflatten(torch.complex(*by_digits.flatten(3).unbind(2)), 2, config.radices)
    axes = range(digits.dim() - 1, 1, -1)
    return digits.permute(0, 1, *axes).flatten(2)


def _pack_features(config: GpuBackwardConfig, phi: Tensor) -> Tensor:
    packed = phi.new_zeros(gpu_buffers.features(config, *phi.shape[:2]))
    packed[..., : phi.shape[2]] = phi.mT
    return packed


def _turns(config: GpuBackwardConfig, tables: Tensor) -> Tensor:
    start = gpu.layout(config).turns
    return torch.unflatten(tables[start : start + 2 * config.length], 0, (-1, 2))


def _config(instance: GpuInstance) -> GpuBackwardConfig:
    if isinstance(instance.config, GpuBackwardConfig):
        return instance.config
    raise TypeError(f"Invalid operator: expected gradients, got {instance.config}.")


@functools.cache
def _tables(config: GpuBackwardConfig, device: torch.device) -> Tensor:
    """The constant tables on a device, copied there once."""
    return torch.from_numpy(gpu.tables(config)).to(device)
