"""Gradients of kernelized attention with RPE by FFT on GPUs: a block of threads for each head, feature and parity.

The formulas are those of `te.fft_backward`. Side 0 is y_f = C (phi_k[f] * value), side 1 is z_f = C^T (phi_q[f] * g).
Of both the features' gradients take a sum over channels, and the weights' gradient is the product of their spectra,
summed over channels: a block walks through the pairs of channels of its feature and has all three in registers. The
denominators ride along as one more channel, 1 on the side of values and w_i = -sum_e g_ie out_ie on the other.

The gradient of the values, sum_f phi_k[f] z_f, is `te.gpu_attention.fft_attention` with queries and keys exchanged.
Source: Luo et al. 2021, Eq. 10, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables
from rpe_tvm.te.shapes import Sizes


def _features(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    shape = (sizes.batch, sizes.heads, cx.int64(config.num_features), cx.int64(config.length))
    return [te.placeholder(shape, cx.FLOAT, name) for name in ("phi_q", "phi_k")]


def _spectrum(config: GpuBackwardConfig, sizes: Sizes) -> te.Tensor:
    last = config.radices[-1]
    shape = (sizes.heads, *map(cx.int64, (config.residues, last, config.row // last, 2)))
    return te.placeholder(shape, cx.FLOAT, "spectrum")


def denominators(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the denominators' terms phi_q[f] * (C phi_k[f]), the output last.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, P]`, spectrum `[H, 2, R, P / R, 2]` with R the last radix, tables (flat), terms
        `[B, H, m, 2, S, P / S]` with S the first radix, to be summed over features and parities.
    """
    radices = config.radices
    phi_q, phi_k = _features(config, sizes)
    spectrum, tables = _spectrum(config, sizes), make_tables(config)
    rest = config.row // radices[0]
    lead = (sizes.batch, sizes.heads, config.num_features, config.residues)

    def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        b, h, feature, parity = where
        position = s * rest + q
        return tables.twist(parity, position, (phi_k[b, h, feature, position], cx.real(0.0)))

    def multiply(where: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
        return cx.mul(value, cx.load(spectrum, where[1], where[3], t, block))

    ahead = gpu_dft.forward("ahead", radices, lead, tables, load, multiply)
    back = gpu_dft.inverse(
        "back", radices, lead, tables, lambda where, block, t: cx.load(ahead, *where, block, t, 0, 0)
    )

    def term(b: Expr, h: Expr, feature: Expr, parity: Expr, s: Expr, q: Expr) -> Expr:
        position = s * rest + q
        product = tables.untwist(parity, position, cx.load(back, b, h, feature, parity, 0, s, q))
        return phi_q[b, h, feature, position] * product[0]

    terms = cx.compute((*lead, radices[0], rest), term, "terms")
    return [phi_q, phi_k, spectrum, tables.tensor, terms]


def fft_backward(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients of features and weights, the output last.

    Parameters
    ----------
    config : GpuBackwardConfig
        What to compute.
    sizes : Sizes
        Batch and heads, symbolic or constant.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, P]` (both zero past the length), channels `[2, B, H, pairs, 2, S, P / S, 2]` with S
        the first radix: of value (0) and of g (1), with the denominators' channel last, twisted for both parities;
        spectrum `[H, 2, R, P / R, 2]` with R the last radix, tables (flat), sums `[B, H, m, 2, 4, S, P / S]`.
        Of the sums 0 and 1 are the gradients of phi_q[f] and phi_k[f] at position s * (P / S) + q, to be added over
        parities; 2 and 3 are real and imaginary part of the spectrum of the correlation, frequency (u, t, q) with
        s = u * R + t at block u * (P / S) + q of the digit order, to be added over features and batch.
    """
    m, row, radices = config.num_features, config.row, config.radices
    batch, heads = sizes.batch, sizes.heads
    first, last = radices[0], radices[-1]
    rest = row // first
    phi = _features(config, sizes)
    channels_shape = (cx.int64(2), batch, heads, *map(cx.int64, (config.pairs, 2, first, rest, 2)))
    channels = te.placeholder(channels_shape, cx.FLOAT, "channels")
    spectrum, tables = _spectrum(config, sizes), make_tables(config)
    lead = (batch, heads, m, 2, config.pairs, 2)

    def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        b, h, feature, parity, pair, side = where
        at = (b, h, feature, s * rest + q)
        weight = tirx.Select(side == 0, phi[1][at], phi[0][at])
        return cx.scale(cx.load(channels, side, b, h, pair, parity, s, q), weight)

    ahead = gpu_dft.forward("ahead", radices, lead, tables, load, lambda where, block, t, value: value)
    # what a thread has made of the spectra of both sides
    kept = cx.compute(
        (*lead, first // last, last, rest, 2),
        lambda b, h, f, p, e, side, u, t, q, c: ahead[b, h, f, p, e, side, u * rest + q, t, 0, 0, c],
        "kept",
    )

    def weighted(where: tuple[Expr, ...], block: Expr, t: int) -> Complex:
        _, h, _, parity, _, side = where
        real, imaginary = cx.load(spectrum, h, parity, t, block)
        # the spectrum of C^T is the conjugate of that of C
        factor = real, tirx.Select(side == 0, imaginary, -imaginary)
        return cx.mul(cx.load(kept, *where, block // rest, t, block % rest), factor)

    back = gpu_dft.inverse("back", radices, lead, tables, weighted)

    def dot(b: Expr, h: Expr, f: Expr, p: Expr, e: Expr, side: Expr, s: Expr, q: Expr) -> Expr:
        # both are twisted, and the twists cancel
        product, other = cx.load(back, b, h, f, p, e, side, 0, s, q), cx.load(channels, 1 - side, b, h, e, p, s, q)
        return product[0] * other[0] + product[1] * other[1]

    dots = cx.compute((*lead, first, rest), dot, "dots")
    pair = te.reduce_axis((cx.int64(0), cx.int64(config.pairs)), "pair")

    def of_pair(b: Expr, h: Expr, f: Expr, p: Expr, kind: Expr, s: Expr, q: Expr) -> Expr:
        values, grads = (cx.load(kept, b, h, f, p, pair, side, s // last, s % last, q) for side in (0, 1))
        crossed = cx.mul_conj(values, grads)
        of_features = [dots[b, h, f, p, pair, side, s, q] for side in (0, 1)]
        options = [*of_features, *crossed]
        chosen = options[-1]
        for position in (2, 1, 0):
            chosen = tirx.Select(kind == position, options[position], chosen)
        return te.sum(chosen, axis=pair)

    sums = cx.compute((batch, heads, m, 2, 4, first, rest), of_pair, "sums")
    return [*phi, channels, spectrum, tables.tensor, sums]
