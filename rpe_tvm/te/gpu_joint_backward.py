"""`te.gpu_backward.fft_backward` where positions are folded, or fill a block of threads: both sides made together.

With two folds the sums of a feature take 6 numbers of each frequency, so that one block of threads has all registers of
a multiprocessor. A thread makes a butterfly of both sides between two barriers: half as many barriers, and twice as
many operations that do not wait for each other. Source: Luo et al. 2021, Eq. 10, differentiated.
"""

from __future__ import annotations

import functools

from tvm import te, tirx

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables
from rpe_tvm.te.gpu_backward import back_from, channels_of, features_of, kept_spectra, spectrum_of
from rpe_tvm.te.shapes import Sizes


def fft_backward(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradients of features and weights, as `te.gpu_backward.fft_backward` does."""
    m, row, radices, residues = config.num_features, config.row, config.radices, config.residues
    batch, heads = sizes.batch, sizes.heads
    first, last = radices[0], radices[-1]
    rest = row // first
    phi_q, phi_k = features_of(config, sizes)
    channels, spectrum, tables = channels_of(config, sizes), spectrum_of(config, sizes), make_tables(config)
    features = cx.compute(
        (batch, heads, m, 2, config.length),
        lambda b, h, f, side, i: tirx.if_then_else(side == 0, phi_k[b, h, f, i], phi_q[b, h, f, i]),
        "features",
    )
    lead = (batch, heads, m, residues, config.pairs, 2)

    def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        b, h, f, residue, pair, side = where
        terms = [
            cx.scale(
                cx.load(channels, side, b, h, pair, residue, fold, s, q),
                features[b, h, f, side, fold * row + s * rest + q],
            )
            for fold in range(config.folds)
        ]
        return functools.reduce(cx.add, terms)

    kept = kept_spectra("sides", radices, lead, tables, load)
    pair = te.reduce_axis((cx.int64(0), cx.int64(config.pairs)), "pair")

    def cross(b: Expr, h: Expr, f: Expr, r: Expr, c: Expr, s: Expr, q: Expr) -> Expr:
        values, grads = (cx.load(kept, b, h, f, r, pair, side, s // last, s % last, q) for side in (0, 1))
        return te.sum(cx.part(c, cx.mul_conj(values, grads)), axis=pair)

    correlation = cx.compute((batch, heads, m, residues, 2, first, rest), cross, "correlation")

    def weighted(where: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
        weight = cx.load(spectrum, where[1], where[3], t, block)
        # the spectrum of C^T is the conjugate of that of C
        products = cx.mul(value, weight), cx.mul_conj(value, weight)
        return tuple(tirx.Select(where[5] == 0, products[0][k], products[1][k]) for k in (0, 1))

    back = back_from("sides", radices, lead, tables, kept, weighted)

    def grad_phi(name: str, side: int) -> te.Tensor:
        """Products of a side with the weights, times the channels of the other side, summed over these."""
        over = te.reduce_axis((cx.int64(0), cx.int64(config.pairs)), "pair")

        def dot(b: Expr, h: Expr, f: Expr, r: Expr, fold: Expr, s: Expr, q: Expr) -> Expr:
            # both are twisted, and the twists cancel
            x = cx.load(back, b, h, f, r, over, side, 0, s, q)
            y = cx.load(channels, 1 - side, b, h, over, r, fold, s, q)
            return te.sum(x[0] * y[0] + x[1] * y[1], axis=over)

        return cx.compute((batch, heads, m, residues, config.folds, first, rest), dot, f"of_{name}")

    grad_phi_k, grad_phi_q = grad_phi("grads", 1), grad_phi("values", 0)
    return [phi_q, phi_k, channels, spectrum, tables.tensor, correlation, grad_phi_k, grad_phi_q]
