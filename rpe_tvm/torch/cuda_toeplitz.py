"""Toeplitz products on GPUs: the sequence of compiled functions. Buffers are torch's, on the caller's stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from rpe_tvm.plan import gpu_buffers, gpu_toeplitz
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.torch.cuda import constant_tables, current_gpu


def matmul(instance: GpuInstance, weights: Tensor, x: Tensor, out: Tensor) -> None:
    """Write ``out_i = sum_j w[j-i] x_j``, on arguments that are known to fit.

    Parameters
    ----------
    instance : GpuInstance
        The compiled product for these lengths, `rpe_tvm.torch.dispatch.get_gpu_toeplitz`.
    weights : Tensor
        ``[H, n_out + n - 1]``, contiguous.
    x, out : Tensor
        ``[B, H, n, d]`` and ``[B, H, n_out, d]``, contiguous in the last axis, not empty; all float32. Rows of `out`
        start at multiples of 8 bytes where d is even.
    """
    config, functions = _config(instance), instance.functions
    with current_gpu(x):
        tables = constant_tables(config, x.device)
        spectrum = x.new_empty(gpu_buffers.spectrum(config, x.shape[1]))
        if config.columns == 1:
            functions["matmul"](
                weights, _whole_pairs(x), tables, spectrum, out if x.shape[3] % 2 else out.view(torch.int64)
            )
            return
        n_out, n = out.shape[2], x.shape[2]
        columns = x.new_empty(gpu_buffers.spectrum_columns(config, x.shape[1]))
        functions["spectrum_columns"](weights, n_out, n, tables, columns)
        functions["spectrum_rows"](_by_first_radix(config, columns), tables, spectrum)
        transformed, product = _between(config, x)
        for b, heads in _turns(config, x):
            there, back = (each[: len(x[b, heads])] for each in (transformed, product))
            functions["columns"](x[b, heads], tables, there)
            functions["rows"](_by_first_radix(config, there), spectrum[heads], tables, _by_first_radix(config, back))
            functions["back_columns"](back, tables, n_out, out[b, heads])


def weight_spectra(instance: GpuInstance, grad: Tensor, x: Tensor) -> Tensor:
    """Return the spectra of the gradient of the weights, complex ``[H, 2, P]``, frequencies in natural order.

    Parameters
    ----------
    instance : GpuInstance
        As of `matmul`.
    grad, x : Tensor
        ``[B, H, n_out, d]`` and ``[B, H, n, d]``, as `out` and `x` of `matmul`.
    """
    config, functions = _config(instance), instance.functions
    with current_gpu(x):
        tables = constant_tables(config, x.device)
        sums = x.new_empty(*x.shape[:2], *gpu_toeplitz.correlation_shape(config))
        if config.columns == 1:
            functions["correlation"](grad, x, tables, sums)
        else:
            between = _between(config, x)
            for b, heads in _turns(config, x):
                sides = [each[: len(x[b, heads])] for each in between]
                for source, side in zip((grad, x), sides, strict=True):
                    functions["columns"](source[b, heads], tables, side)
                rows = (_by_first_radix(config, side) for side in sides)
                functions["correlation_rows"](*rows, tables, sums[b, heads])
        spectra = torch.view_as_complex(sums.sum((0, 2))).flatten(2)
        return spectra[..., _places(config, x.device)]


def _config(instance: GpuInstance) -> GpuToeplitzConfig:
    if isinstance(instance.config, GpuToeplitzConfig):
        return instance.config
    raise TypeError(f"Invalid operator: expected a Toeplitz product, got {instance.config}.")


def _turns(config: GpuToeplitzConfig, x: Tensor) -> Iterator[tuple[int, slice]]:
    """Return the batch and the heads of each turn of columns and rows."""
    batch, heads = x.shape[:2]
    at_once = gpu_toeplitz.heads_at_once(config, heads)
    for b, first in itertools.product(range(batch), range(0, heads, at_once)):
        yield b, slice(first, min(first + at_once, heads))


def _between(config: GpuToeplitzConfig, x: Tensor) -> list[Tensor]:
    """Return two arrays between columns and rows."""
    shape = gpu_toeplitz.between(config, gpu_toeplitz.heads_at_once(config, x.shape[1]))
    return [x.new_empty(shape) for _ in range(2)]


def _whole_pairs(x: Tensor) -> Tensor:
    """x as `te.gpu_toeplitz.whole_pairs_of` has it: where d is even 8 bytes as one, copied where not aligned."""
    if x.shape[3] % 2:
        return x
    is_aligned = x.data_ptr() % 8 == 0 and x.storage_offset() % 2 == 0 and all(each % 2 == 0 for each in x.stride()[:3])
    return (x if is_aligned else x.clone(memory_format=torch.contiguous_format)).view(torch.int64)


def _by_first_radix(config: GpuToeplitzConfig, x: Tensor) -> Tensor:
    return torch.unflatten(x, -2, (config.radices[0], -1))


@functools.lru_cache(maxsize=64)
def _places(config: GpuToeplitzConfig, device: torch.device) -> Tensor:
    return torch.from_numpy(gpu_toeplitz.places(config)).to(device)
