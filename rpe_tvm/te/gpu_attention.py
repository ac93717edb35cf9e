"""Kernelized attention with RPE by FFT on GPUs: one block of threads for each head, pair of channels and remainder.

As `te.fft_attention`: for each feature m, out += phi_q[m] * (C (phi_k[m] * value)). The cyclic convolution of 2 P
points that C stands for falls into one for each remainder of the frequency modulo 2 folds, of P / folds points each;
without folds these are C's circulant and skew-circulant part. Channel d of the value is the constant 1: its sums are
the denominators. Source: Luo et al. 2021, Eq. 10 and Sec. 3.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tvm import te, tirx

from rpe_tvm.plan.gpu import GpuAttentionConfig, layout
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.shapes import Sizes

# positions whose outputs one block of threads divides; divides every bucket
TILE = 32


def make_tables(config: GpuAttentionConfig) -> gpu_dft.Tables:
    """Return the placeholder of a config's constants."""
    where = layout(config)
    tensor = te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables")
    return gpu_dft.Tables(tensor, where, config.length, config.folds)


def packed_element(
    config: GpuAttentionConfig,
    sizes: Sizes,
    tables: gpu_dft.Tables,
    value: Callable[[Expr, Expr], Expr],
    pair: Expr,
    residue: Expr,
    position: Expr,
    part: Expr,
) -> Expr:
    """Return the real or imaginary part of a pair of channels at a position, twisted for a remainder of frequencies."""
    d = config.head_dim

    def element(half: int) -> Expr:
        ch = 2 * pair + half
        # past the end the last position again, whose features are zero: a bound instead of a branch
        loaded = value(tirx.min(position, sizes.n_key - 1), tirx.min(ch, d - 1)).astype(cx.FLOAT)
        return tirx.Select(ch < d, loaded, tirx.Select(ch == d, cx.real(1.0), cx.real(0.0)))

    return cx.part(part, tables.twist(residue, position, (element(0), element(1))))


def fft_attention(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the sums over features, the output last.

    Parameters
    ----------
    config : GpuAttentionConfig
        What to compute.
    sizes : Sizes
        Batch, heads and `n_key`, symbolic or constant.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, P]` (both zero past the length), value `[B, H, n_k, d]`,
        spectrum `[H, residues, R, row / R, 2]` with R the last radix, tables (flat), partial
        `[B, H, pairs, residues, folds, S, row / S, 2]` with S the first radix: position fold * row + s * (row / S) + q,
        still twisted.
    """
    m, length, row, radices = config.num_features, config.length, config.row, config.radices
    batch, heads = sizes.batch, sizes.heads
    rest, last = row // radices[0], radices[-1]
    phi_q, phi_k = (
        te.placeholder((batch, heads, cx.int64(m), cx.int64(length)), cx.FLOAT, name) for name in ("phi_q", "phi_k")
    )
    value = te.placeholder((batch, heads, sizes.n_key, cx.int64(config.head_dim)), config.dtype, "value")
    spectrum_shape = (heads, *map(cx.int64, (config.residues, last, row // last, 2)))
    spectrum = te.placeholder(spectrum_shape, cx.FLOAT, "spectrum")
    tables = make_tables(config)

    def pack(b: Expr, h: Expr, pair: Expr, r: Expr, fold: Expr, s: Expr, q: Expr, c: Expr) -> Expr:
        position = fold * row + s * rest + q
        return packed_element(config, sizes, tables, lambda *at: value[(b, h, *at)], pair, r, position, c)

    lead = (batch, heads, config.pairs, config.residues)
    packed = cx.compute((*lead, config.folds, radices[0], rest, 2), pack, "packed")

    partial = feature_sums(config, sizes, packed, phi_k, phi_q, spectrum, tables, cx.mul)
    return [phi_q, phi_k, value, spectrum, tables.tensor, partial]


def feature_sums(
    config: GpuAttentionConfig,
    sizes: Sizes,
    packed: te.Tensor,
    phi_in: te.Tensor,
    phi_out: te.Tensor,
    spectrum: te.Tensor,
    tables: gpu_dft.Tables,
    product: Callable[[Complex, Complex], Complex],
    together: int = 1,
) -> te.Tensor:
    """Return sum_f phi_out[f] * (C (phi_in[f] * packed)), still twisted.

    Parameters
    ----------
    config, sizes
        As of `fft_attention`.
    packed
        Pairs of channels, twisted, `[B, H, pairs, residues, folds, S, row / S, 2]`.
    phi_in, phi_out
        `[B, H, m, P]`.
    spectrum
        As of `fft_attention`.
    tables
        The constants.
    product
        Of transform and spectrum; with the conjugate of the spectrum C is transposed.
    together
        Features whose transforms a thread makes at once; divides m.
    """
    m, row, radices = config.num_features, config.row, config.radices
    rest = row // radices[0]
    lead = (sizes.batch, sizes.heads, *packed.shape[2:4])

    def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        *at, chunk, each = where
        feature = chunk * together + each
        terms = [
            cx.scale(cx.load(packed, *at, fold, s, q), phi_in[at[0], at[1], feature, fold * row + s * rest + q])
            for fold in range(config.folds)
        ]
        return functools.reduce(cx.add, terms)

    def multiply(where: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
        return product(value, cx.load(spectrum, where[1], where[3], t, block))

    lead = (*lead, m // together, together)
    ahead = gpu_dft.forward("ahead", radices, lead, tables, load, multiply)
    back = gpu_dft.inverse(
        "back", radices, lead, tables, lambda where, block, t: cx.load(ahead, *where, block, t, 0, 0)
    )
    chunk = te.reduce_axis((cx.int64(0), cx.int64(m // together)), "chunk")
    each = te.reduce_axis((cx.int64(0), cx.int64(together)), "each")

    def product_of(b: Expr, h: Expr, pair: Expr, r: Expr, fold: Expr, s: Expr, q: Expr, c: Expr) -> Expr:
        weight = phi_out[b, h, chunk * together + each, fold * row + s * rest + q]
        return te.sum(weight * back[b, h, pair, r, chunk, each, 0, s, q, c], axis=[chunk, each])

    return cx.compute(packed.shape, product_of, "partial")


def normalise(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the last step: all remainders added, each channel divided by the denominator.

    Returns
    -------
    list of te.Tensor
        partial `[B, H, pairs, residues, P, 2]` as `fft_attention` returns it, tables (flat), out `[B, H, n_q, d]`.
    """
    d, tiles = config.head_dim, config.length // TILE
    partial, tables, sums = tile_sums(config, sizes, config.pairs)

    def divide(b: Expr, h: Expr, i: Expr, ch: Expr) -> Expr:
        # n_q <= P always; the minimum tells TVM so
        tile = tirx.min(i // TILE, tiles - 1)
        inverse = cx.real(1.0) / sums[b, h, tile, d // 2, i % TILE, d % 2]
        return (sums[b, h, tile, ch // 2, i % TILE, ch % 2] * inverse).astype(config.dtype)

    out = cx.compute((sizes.batch, sizes.heads, sizes.n_query, d), divide, "out")
    return [partial, tables.tensor, out]


def tile_sums(config: GpuAttentionConfig, sizes: Sizes, pairs: int) -> tuple[te.Tensor, gpu_dft.Tables, te.Tensor]:
    """Return partial `[B, H, pairs, residues, P, 2]` as `feature_sums` returns it, the tables, and the sums of its
    remainders by tiles of positions, `[B, H, P / TILE, pairs, TILE, 2]`.
    """
    length = config.length
    partial = te.placeholder(
        [sizes.batch, sizes.heads, *map(cx.int64, (pairs, config.residues, length, 2))], cx.FLOAT, "partial"
    )
    tables = make_tables(config)

    def add(b: Expr, h: Expr, tile: Expr, pair: Expr, row: Expr, c: Expr) -> Expr:
        position = tile * TILE + row
        values = [cx.load(partial, b, h, pair, residue, position) for residue in range(config.residues)]
        return cx.part(c, tables.untwisted_sum(position, values))

    sums = cx.compute((sizes.batch, sizes.heads, length // TILE, pairs, TILE, 2), add, "sums")
    return partial, tables, sums
