"""Gradients of attention on GPUs where columns and rows take turns: the sequence of compiled functions.

As the forward pass, some pairs of channels of one head at a time: what lies between columns and rows is bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rpe_tvm.plan import gpu, gpu_buffers
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.torch.backward import bias_gradient
from rpe_tvm.torch.cuda import constant_tables


def gradients(
    instance: GpuInstance,
    phi: Sequence[Tensor],
    grad_phi: Sequence[Tensor],
    value: Tensor,
    rpe_bias: Tensor,
    grad_out: Tensor,
    out: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor,
    is_causal: bool,
) -> None:
    """Write the gradients of features, of values and of the bias; see `te.gpu_long_backward`.

    Parameters
    ----------
    instance : GpuInstance
        The compiled gradients, with columns.
    phi, grad_phi : sequence of Tensor
        Of queries and of keys: features ``[B, H, m, P]``, and room for their gradients ``[B, H, m, 1, P]``.
    value, grad_value : Tensor
        ``[B, H, n_k, d]``, the last axis contiguous.
    rpe_bias, grad_bias : Tensor
        ``[H, n_q + n_k - 1]``, contiguous.
    grad_out, out : Tensor
        ``[B, H, n_q, d]``, the last axis contiguous.
    is_causal : bool
        As in the forward pass.
    """
    config, functions = instance.config, instance.functions
    assert isinstance(config, GpuBackwardConfig)
    tables = constant_tables(config, value.device)
    batch, heads, n_q, d = out.shape
    n_k = value.shape[2]
    new = phi[0].new_empty

    def rows(x: Tensor, axis: int) -> Tensor:
        return torch.unflatten(x, axis, (config.radices[0], -1))

    largest, columns = new(heads), new(gpu_buffers.spectrum_columns(config, heads))
    spectrum = new(gpu_buffers.spectrum(config, heads))
    weights = rpe_bias, largest, n_q, n_k, int(is_causal)
    functions["largest"](rpe_bias, n_q, n_k, int(is_causal), largest)
    functions["spectrum_columns"](*weights, tables, columns)
    functions["spectrum_rows"](rows(columns, 3), tables, spectrum)

    at_once = gpu_buffers.pairs_at_once(config)
    between = [new(gpu_buffers.between(config, at_once)) for _ in range(4)]
    terms = new(gpu_buffers.denominator_terms(config, batch, heads))
    last = new(1, 2, config.columns, config.row, 2)
    turns = _turns(config, tables)
    for b, h in itertools.product(range(batch), range(heads)):
        # the denominators are a channel of the last pair
        there, back = between[0][:1], between[1][:1]
        functions["columns"](phi[1][b, h], value[b, h], tables, config.pairs - 1, there)
        functions["rows"](rows(there, 4), spectrum[h], tables, rows(back, 4))
        functions["back_columns"](back, phi[0][b, h], tables, last)
        even, odd = torch.view_as_complex(last.flatten(2, 3))[0]
        parts = torch.view_as_real(torch.stack((even, odd * turns)))
        terms[b, h, 0] = parts[..., d % 2]

    channels = new(gpu_buffers.channels(config, batch, heads))
    functions["channels"](terms, value, grad_out, out, tables, channels)
    partial = new(gpu_buffers.value_partial(config, batch, heads))
    of_row, of_pairs = new(gpu_buffers.row_correlation(config)), new(config.num_features, config.columns, config.row)
    correlation = new(heads, *gpu_buffers.row_correlation(config)[1:]).zero_()
    for each in grad_phi:
        each.zero_()
    by_column = torch.unflatten(channels, 5, (config.columns, config.row))
    sums = torch.unflatten(partial, 4, (config.columns, config.row))
    for b, h, first in itertools.product(range(batch), range(heads), range(0, config.pairs, at_once)):
        sides = [side[b, h, first : first + at_once] for side in by_column]
        values, grads, of_grads, of_values = (x[: len(sides[0])] for x in between)
        functions["columns_backward"](phi[1][b, h], sides[0], tables, values)
        functions["columns_backward"](phi[0][b, h], sides[1], tables, grads)
        functions["rows_backward"](
            rows(values, 4), rows(grads, 4), spectrum[h], tables, rows(of_row, 4), rows(of_grads, 4), rows(of_values, 4)
        )
        correlation[h] += of_row.sum(0)
        of_channels = sums[b, h, first : first + at_once]
        if len(of_channels):
            functions["back_columns"](of_grads[: len(of_channels)], phi[1][b, h], tables, of_channels)
        for product, other, total in ((of_values, sides[1], grad_phi[0]), (of_grads, sides[0], grad_phi[1])):
            functions["dots_backward"](product, other, tables, of_pairs)
            total[b, h, :, 0] += of_pairs.flatten(1)
    functions["grad_value"](partial, tables, grad_value)
    grad_bias.copy_(bias_gradient(_natural_order(config, correlation), rpe_bias, n_q, n_k, is_causal))


def _natural_order(config: GpuBackwardConfig, correlation: Tensor) -> Tensor:
    """Return spectra ``[H, 2, P]``, complex, of ``[H, 2, columns, 2, row]`` in the order of `te.gpu_backward`.

    Digit order holds frequency sum_k digit_k prod(radices before k) of a row at the position whose first digit counts
    most; that of P points is the column plus columns times it.
    """
    last, first = config.radices[-1], config.radices[0]
    by_digits = torch.unflatten(correlation, 4, (first // last, last, config.row // first)).transpose(5, 6)
    digits = torch.unflatten(torch.complex(*by_digits.flatten(4).unbind(3)), 3, config.radices)
    axes = range(digits.dim() - 1, 2, -1)
    return digits.permute(0, 1, *axes, 2).flatten(2)


def _turns(config: GpuBackwardConfig, tables: Tensor) -> Tensor:
    """exp(i pi j / P) for j < P, what undoes a twist."""
    start = gpu.layout(config).turns
    return torch.view_as_complex(torch.unflatten(tables[start : start + 2 * config.length], 0, (-1, 2))).conj()
