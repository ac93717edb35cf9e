"""Gradients of kernelized attention with RPE by FFT on GPUs: a block of threads for each head, feature and remainder.

The formulas are those of `te.fft_backward`. Side 0 is y_f = C (phi_k[f] * value), side 1 is z_f = C^T (phi_q[f] * g).
Of both the features' gradients take a sum over channels, and the weights' gradient is the product of their spectra,
summed over channels: a block walks through the pairs of channels of its feature and has all three in registers. The
denominators ride along as one more channel, 1 on the side of values and w_i = -sum_e g_ie out_ie on the other.

The gradient of the values, sum_f phi_k[f] z_f, is attention's sum over features with queries and keys exchanged, a
block of threads for each head, pair of channels and remainder. What is done to rows before and after is in
`te.gpu_gradients`.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from tvm import te

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import feature_sums, make_tables
from rpe_tvm.te.shapes import Sizes


def features_of(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    shape = (sizes.batch, sizes.heads, cx.int64(config.num_features), cx.int64(config.length))
    return [te.placeholder(shape, cx.FLOAT, name) for name in ("phi_q", "phi_k")]


def spectrum_of(config: GpuBackwardConfig, sizes: Sizes) -> te.Tensor:
    last = config.radices[-1]
    shape = (sizes.heads, *map(cx.int64, (config.residues, last, config.row // last, 2)))
    return te.placeholder(shape, cx.FLOAT, "spectrum")


def channels_of(config: GpuBackwardConfig, sizes: Sizes) -> te.Tensor:
    first = config.radices[0]
    shape = map(cx.int64, (config.pairs, config.residues, config.folds, first, config.row // first, 2))
    return te.placeholder((cx.int64(2), sizes.batch, sizes.heads, *shape), cx.FLOAT, "channels")


def denominators(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the denominators' terms phi_q[f] * (C phi_k[f]), the output last.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, P]`, spectrum `[H, residues, R, row / R, 2]` with R the last radix, tables (flat),
        terms `[B, H, m, residues, folds, S, row / S]` with S the first radix, to be summed over features and
        remainders.
    """
    radices = config.radices
    phi_q, phi_k = features_of(config, sizes)
    spectrum, tables = spectrum_of(config, sizes), make_tables(config)
    rest = config.row // radices[0]
    lead = (sizes.batch, sizes.heads, config.num_features, config.residues)

    def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        b, h, feature, residue = where
        positions = [fold * config.row + s * rest + q for fold in range(config.folds)]
        terms = [tables.twist(residue, at, (phi_k[b, h, feature, at], cx.real(0.0))) for at in positions]
        return functools.reduce(cx.add, terms)

    def multiply(where: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
        return cx.mul(value, cx.load(spectrum, where[1], where[3], t, block))

    ahead = gpu_dft.forward("ahead", radices, lead, tables, load, multiply)
    back = gpu_dft.inverse(
        "back", radices, lead, tables, lambda where, block, t: cx.load(ahead, *where, block, t, 0, 0)
    )

    def term(b: Expr, h: Expr, feature: Expr, residue: Expr, fold: Expr, s: Expr, q: Expr) -> Expr:
        position = fold * config.row + s * rest + q
        product = tables.untwist(residue, position, cx.load(back, b, h, feature, residue, 0, s, q))
        return phi_q[b, h, feature, position] * product[0]

    terms = cx.compute((*lead, config.folds, radices[0], rest), term, "terms")
    return [phi_q, phi_k, spectrum, tables.tensor, terms]


def value_sums(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the values' gradient, sum_f phi_k[f] z_f, the output last.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, P]`, channels and spectrum as of `fft_backward`, tables (flat), partial
        `[B, H, (d + 1) / 2, residues, folds, S, row / S, 2]` with S the first radix, still twisted.
    """
    phi_q, phi_k = features_of(config, sizes)
    channels, spectrum, tables = channels_of(config, sizes), spectrum_of(config, sizes), make_tables(config)
    rest = config.row // config.radices[0]
    packed = cx.compute(
        (sizes.batch, sizes.heads, config.value_pairs, config.residues, config.folds, config.radices[0], rest, 2),
        lambda *at: channels[(1, *at)],
        "packed",
    )
    # the spectrum of C^T is the conjugate of that of C
    partial = feature_sums(config, sizes, packed, phi_q, phi_k, spectrum, tables, cx.mul_conj, config.together)
    return [phi_q, phi_k, channels, spectrum, tables.tensor, partial]


def fft_backward(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients of features and weights, the outputs last.

    Parameters
    ----------
    config : GpuBackwardConfig
        What to compute.
    sizes : Sizes
        Batch and heads, symbolic or constant.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, P]` (both zero past the length), channels
        `[2, B, H, pairs, residues, folds, S, row / S, 2]` with S the first radix, see `te.gpu_gradients.channels`;
        spectrum `[H, residues, R, row / R, 2]` with R the last radix, tables (flat), correlation
        `[B, H, m, residues, 2, S, row / S]`, grad_phi_k and grad_phi_q `[B, H, m, residues, folds, S, row / S]`. The
        latter are to be added over remainders. Of the correlation's spectrum, to be added over features and batch, real
        and imaginary part are given, frequency (u, t, q) with s = u * R + t at block u * (row / S) + q of the digit
        order.
    """
    m, row, radices = config.num_features, config.row, config.radices
    batch, heads = sizes.batch, sizes.heads
    first, last = radices[0], radices[-1]
    rest = row // first
    phi_q, phi_k = features_of(config, sizes)
    channels, spectrum, tables = channels_of(config, sizes), spectrum_of(config, sizes), make_tables(config)
    lead = (batch, heads, m, config.residues, config.pairs)

    def spectra(name: str, side: int, weight: te.Tensor) -> te.Tensor:
        def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
            b, h, feature, residue, pair = where
            terms = [
                cx.scale(
                    cx.load(channels, side, b, h, pair, residue, fold, s, q),
                    weight[b, h, feature, fold * row + s * rest + q],
                )
                for fold in range(config.folds)
            ]
            return functools.reduce(cx.add, terms)

        return kept_spectra(name, radices, lead, tables, load)

    values, grads = spectra("values", 0, phi_k), spectra("grads", 1, phi_q)
    pair = te.reduce_axis((cx.int64(0), cx.int64(config.pairs)), "pair")

    def cross(b: Expr, h: Expr, f: Expr, r: Expr, c: Expr, s: Expr, q: Expr) -> Expr:
        at = (b, h, f, r, pair, s // last, s % last, q)
        return te.sum(cx.part(c, cx.mul_conj(cx.load(values, *at), cx.load(grads, *at))), axis=pair)

    correlation = cx.compute((batch, heads, m, config.residues, 2, first, rest), cross, "correlation")

    def grad_phi(name: str, kept: te.Tensor, side: int, product: Callable[[Complex, Complex], Complex]) -> te.Tensor:
        """Products of a side with the weights, times the channels of the other side, summed over these."""

        def weighted(where: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
            return product(value, cx.load(spectrum, where[1], where[3], t, block))

        back = back_from(name, radices, lead, tables, kept, weighted)
        over = te.reduce_axis((cx.int64(0), cx.int64(config.pairs)), "pair")

        def dot(b: Expr, h: Expr, f: Expr, r: Expr, fold: Expr, s: Expr, q: Expr) -> Expr:
            # both are twisted, and the twists cancel
            x, y = cx.load(back, b, h, f, r, over, 0, s, q), cx.load(channels, 1 - side, b, h, over, r, fold, s, q)
            return te.sum(x[0] * y[0] + x[1] * y[1], axis=over)

        return cx.compute((batch, heads, m, config.residues, config.folds, first, rest), dot, f"of_{name}")

    # the spectrum of C^T is the conjugate of that of C
    grad_phi_k = grad_phi("grads", grads, 1, cx.mul_conj)
    grad_phi_q = grad_phi("values", values, 0, cx.mul)
    return [phi_q, phi_k, channels, spectrum, tables.tensor, correlation, grad_phi_k, grad_phi_q]


def kept_spectra(
    name: str, radices: tuple[int, ...], lead: Sequence[Expr], tables: gpu_dft.Tables, load: gpu_dft.LoadForward
) -> te.Tensor:
    """Return spectra as the thread that makes them keeps them, `kept_<name>`, `lead + [S / R, R, P / S, 2]`.

    Frequency (u, t, q) is block u * (P / S) + q, number t, of the digit order; S is the first radix, R the last one.
    """
    rest = math.prod(radices[1:])
    ahead = gpu_dft.forward(f"ahead{name}", radices, lead, tables, load, lambda where, block, t, value: value)

    def keep(*index: Expr) -> Expr:
        *where, u, t, q, c = index
        return ahead[(*where, u * rest + q, t, 0, 0, c)]

    return cx.compute((*lead, radices[0] // radices[-1], radices[-1], rest, 2), keep, f"kept_{name}")


def back_from(
    name: str,
    radices: tuple[int, ...],
    lead: Sequence[Expr],
    tables: gpu_dft.Tables,
    kept: te.Tensor,
    weighted: gpu_dft.Finish,
) -> te.Tensor:
    """Return the inverse transforms of `kept_spectra`, each number changed by `weighted`."""
    rest = math.prod(radices[1:])

    def load(where: tuple[Expr, ...], block: Expr, t: int) -> Complex:
        return weighted(where, block, t, cx.load(kept, *where, block // rest, t, block % rest))

    return gpu_dft.inverse(f"back{name}", radices, lead, tables, load)
