"""Products with Toeplitz matrices, the operator of FastRPB: ``torch.ops.rpe_tvm.toeplitz_matmul`` and its gradients."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from rpe_tvm.errors import ShapeError
from rpe_tvm.plan import gpu_toeplitz, twiddles
from rpe_tvm.torch import cuda_toeplitz
from rpe_tvm.torch.devices import check_nvidia
from rpe_tvm.torch.dispatch import get_gpu_toeplitz, get_toeplitz
from rpe_tvm.torch.layouts import last_axis_contiguous
from rpe_tvm.torch.operators import check_tensor, empty_output

_HALF = (torch.bfloat16, torch.float16)

torch.library.define(
    "rpe_tvm::toeplitz_matmul",
    "(Tensor weights, Tensor x, SymInt n_out) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
torch.library.define(
    "rpe_tvm::toeplitz_weight_grad",
    "(Tensor grad, Tensor x) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def toeplitz_matmul(weights: Tensor, x: Tensor, n_out: int | None = None) -> Tensor:
    """Multiply by a Toeplitz matrix: ``y_i = sum_j w[j-i] x_j``, in O(n log n), with gradients for both tensors.

    Parameters
    ----------
    weights : Tensor
        ``[H, n_out + n - 1]``, float32, on the CPU or an NVIDIA GPU; entry ``(j - i) + n_out - 1`` belongs to output i
        and input j.
    x : Tensor
        ``[B, H, n, d]``, where weights are.
    n_out : int, optional
        Positions of the output; n by default. On GPUs n and n_out may be up to 262144.

    Returns
    -------
    Tensor
        ``[B, H, n_out, d]``, zeros where n = 0.

    Raises
    ------
    ShapeError, DTypeError, ValueError
        If the arguments do not fit, or do not lie on one CPU or NVIDIA GPU.

    Notes
    -----
    FastRPB's product W V (Zubkov and Gavrilov 2022). bfloat16 and float16 are computed in float32, and the result has
    the dtype of `x`; float64 is refused. Errors are relative to the largest rows, as of every product by FFT.
    """
    if x.dtype in _HALF:
        return toeplitz_matmul(weights, x.float(), n_out).to(x.dtype)
    if weights.dtype in _HALF:
        weights = weights.float()
    if n_out is None:
        n_out = x.shape[2] if x.dim() == 4 else 0
    return cast(Tensor, torch.ops.rpe_tvm.toeplitz_matmul(weights, x, n_out))


def _check(weights: Tensor, x: Tensor, n_out: int) -> None:
    check_tensor("x", x, "[B, H, n, d]", x)
    check_tensor("weights", weights, "[H, n_out + n - 1]", x)
    check_nvidia("x", x)
    if n_out < 0:
        raise ShapeError(f"Invalid n_out: expected a length of at least 0, got {n_out}.")
    heads, n = x.shape[1], x.shape[2]
    count = max(n_out + n - 1, 0)
    if weights.shape[0] != heads or weights.shape[1] != count:
        raise ShapeError(
            f"Invalid shape of weights: expected [H, n_out + n - 1] = [{heads}, {count}], got "
            f"{list(weights.shape)}. Entry (j - i) + n_out - 1 of a row belongs to output i and input j."
        )


def _empty(x: Tensor, n_out: int) -> Tensor:
    """An uninitialised output, its axes in memory as those of x where it has as many positions."""
    return empty_output(x) if n_out == x.shape[2] else x.new_empty((*x.shape[:2], n_out, x.shape[3]))


def _matmul(weights: Tensor, x: Tensor, n_out: int) -> Tensor:
    _check(weights, x, n_out)
    out = _empty(x, n_out)
    if x.numel() == 0 or n_out == 0:
        return out.zero_()
    get_toeplitz(max(n_out, x.shape[2]), x.shape[3]).matmul(weights.contiguous(), last_axis_contiguous(x), out)
    return out


def _matmul_cuda(weights: Tensor, x: Tensor, n_out: int) -> Tensor:
    _check(weights, x, n_out)
    out = _empty(x, n_out)
    if x.numel() == 0 or n_out == 0:
        return out.zero_()
    instance = get_gpu_toeplitz(x.get_device(), _gpu_length(n_out, x), x.shape[3])
    cuda_toeplitz.matmul(instance, weights.contiguous(), last_axis_contiguous(x), out)
    return out


def _gpu_length(n_out: int, x: Tensor) -> int:
    """The larger of the numbers of outputs and inputs, if GPUs have such products."""
    n = max(n_out, x.shape[2])
    if n > gpu_toeplitz.LONGEST:
        raise ShapeError(
            f"Invalid length: expected at most {gpu_toeplitz.LONGEST} inputs and outputs on a GPU, got {n}. Move the "
            "tensors to the CPU (.cpu()), where products of all lengths are compiled."
        )
    return n


def _matmul_fake(weights: Tensor, x: Tensor, n_out: int) -> Tensor:
    _check(weights, x, n_out)
    return _empty(x, n_out)


def _check_grad(grad: Tensor, x: Tensor) -> tuple[int, int, int]:
    check_tensor("grad", grad, "[B, H, n_out, d]", grad)
    check_tensor("x", x, "[B, H, n, d]", grad)
    check_nvidia("x", x)
    batch, heads, n, channels = x.shape
    n_out = grad.shape[2]
    if grad.shape[0] != batch or grad.shape[1] != heads or grad.shape[3] != channels:
        raise ShapeError(
            f"Invalid shape of grad: expected [{batch}, {heads}, n_out, {channels}] as x has, got {list(grad.shape)}."
        )
    return heads, n_out, n


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """dw[t] = sum of grad_i x_{i+t} over batch, channels and i: `te.toeplitz_matmul.toeplitz_correlation`, and back."""
    heads, n_out, n = _check_grad(grad, x)
    if x.numel() == 0 or n_out == 0:
        return x.new_zeros(heads, max(n_out + n - 1, 0))
    instance = get_toeplitz(max(n_out, n), x.shape[3])
    length = instance.config.length
    sums = x.new_empty(x.shape[0], heads, 2, length, 2)
    instance.correlation(last_axis_contiguous(grad), last_axis_contiguous(x), sums)
    # one transform for each head and parity: small beside those of all channels, so torch makes it
    spectrum = torch.view_as_complex(sums.sum(0))
    natural = torch.empty_like(spectrum)
    natural[..., torch.from_numpy(twiddles.frequencies(instance.config))] = spectrum
    return _by_offset(natural, n_out, n)


def _weight_grad_cuda(grad: Tensor, x: Tensor) -> Tensor:
    heads, n_out, n = _check_grad(grad, x)
    if x.numel() == 0 or n_out == 0:
        return x.new_zeros(heads, max(n_out + n - 1, 0))
    instance = get_gpu_toeplitz(x.get_device(), _gpu_length(n_out, x), x.shape[3])
    spectra = cuda_toeplitz.weight_spectra(instance, last_axis_contiguous(grad), last_axis_contiguous(x))
    return _by_offset(spectra, n_out, n)


def _by_offset(spectra: Tensor, n_out: int, n: int) -> Tensor:
    """The gradient of the weights ``[H, n_out + n - 1]`` from its spectra by parity, complex ``[H, 2, P]``."""
    length = spectra.shape[2]
    even, odd = torch.fft.ifft(spectra).unbind(1)
    odd = odd * _turns(length, spectra.device)
    # even and odd hold r[s] + r[s - P] and r[s] - r[s - P]
    ahead, behind = (even.real + odd.real) / 2, (even.real - odd.real) / 2
    return torch.cat([behind[:, length - (n_out - 1) :], ahead[:, :n]], -1)


@functools.lru_cache(maxsize=64)
def _turns(length: int, device: torch.device) -> Tensor:
    """exp(i pi t / P) for t < P."""
    turns = torch.exp(1j * torch.pi / length * torch.arange(length, dtype=torch.float64))
    return turns.to(device, torch.complex64)


def _weight_grad_fake(grad: Tensor, x: Tensor) -> Tensor:
    heads, n_out, n = _check_grad(grad, x)
    return x.new_empty(heads, max(n_out + n - 1, 0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, x = ctx.saved_tensors
    ops = torch.ops.rpe_tvm
    return (
        ops.toeplitz_weight_grad(grad, x) if ctx.needs_input_grad[0] else None,
        ops.toeplitz_matmul(weights.flip(-1), grad, x.shape[2]) if ctx.needs_input_grad[1] else None,
        None,
    )


def _weight_grad_backward(ctx: Any, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    ops = torch.ops.rpe_tvm
    return (
        ops.toeplitz_matmul(grad_weights, x, grad.shape[2]) if ctx.needs_input_grad[0] else None,
        ops.toeplitz_matmul(grad_weights.flip(-1), grad, x.shape[2]) if ctx.needs_input_grad[1] else None,
    )


# CompositeExplicitAutograd for all but GPUs, as for attention: a tensor on another device gets our message.
torch.library.impl("rpe_tvm::toeplitz_matmul", "CompositeExplicitAutograd", _matmul)
torch.library.impl("rpe_tvm::toeplitz_weight_grad", "CompositeExplicitAutograd", _weight_grad)
torch.library.impl("rpe_tvm::toeplitz_matmul", "CUDA", _matmul_cuda)
torch.library.impl("rpe_tvm::toeplitz_weight_grad", "CUDA", _weight_grad_cuda)
torch.library.register_fake("rpe_tvm::toeplitz_matmul", _matmul_fake)
torch.library.register_fake("rpe_tvm::toeplitz_weight_grad", _weight_grad_fake)
torch.library.register_autograd("rpe_tvm::toeplitz_matmul", _matmul_backward, setup_context=_setup_context)
torch.library.register_autograd("rpe_tvm::toeplitz_weight_grad", _weight_grad_backward, setup_context=_setup_context)
