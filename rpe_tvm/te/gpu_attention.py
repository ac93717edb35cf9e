"""Kernelized attention with RPE by FFT on GPUs: one block of threads for each head, pair of channels and parity.

As `te.fft_attention`: for each feature m, out += phi_q[m] * (C (phi_k[m] * value)), C = (C+ + D* C- D) / 2 as a circulant
and a skew-circulant part ("parity" 0 and 1). Channel d of the value is the constant 1: its sums are the denominators.
Source: Luo et al. 2021, Eq. 10 and Sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx

from rpe_tvm.plan.gpu import GpuAttentionConfig, layout
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.shapes import Sizes


def make_tables(config: GpuAttentionConfig) -> gpu_dft.Tables:
    """Return the placeholder of a config's constants."""
    where = layout(config)
    return gpu_dft.Tables(te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables"), where)


def _partial_shape(config: GpuAttentionConfig, sizes: Sizes) -> list[Expr]:
    fixed = (config.pairs, 2, config.radices[0], config.length // config.radices[0], 2)
    return [sizes.batch, sizes.heads, *map(cx.int64, fixed)]


def packed_element(
    config: GpuAttentionConfig,
    sizes: Sizes,
    tables: gpu_dft.Tables,
    value: Callable[[Expr, Expr], Expr],
    pair: Expr,
    parity: Expr,
    position: Expr,
    part: Expr,
) -> Expr:
    """Return the real or imaginary part of a pair of channels at a position, twisted where the parity is 1."""
    d = config.head_dim

    def element(half: int) -> Expr:
        ch = 2 * pair + half
        # past the end the last position again, whose features are zero: a bound instead of a branch
        loaded = value(tirx.min(position, sizes.n_key - 1), tirx.min(ch, d - 1)).astype(cx.FLOAT)
        return tirx.Select(ch < d, loaded, tirx.Select(ch == d, cx.real(1.0), cx.real(0.0)))

    plain = (element(0), element(1))
    turned = cx.mul(plain, tables.parity(position))
    return cx.part(part, (tirx.Select(parity == 0, plain[0], turned[0]), tirx.Select(parity == 0, plain[1], turned[1])))


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
        spectrum `[H, 2, R, P / R, 2]` with R the last radix, tables (flat), partial `[B, H, pairs, 2, S, P / S, 2]` with
        S the first radix: position s * (P / S) + q, still twisted where the parity is 1.
    """
    m, d, length, radices = config.num_features, config.head_dim, config.length, config.radices
    batch, heads = sizes.batch, sizes.heads
    rest, last = length // radices[0], radices[-1]
    phi_q, phi_k = (
        te.placeholder((batch, heads, cx.int64(m), cx.int64(length)), cx.FLOAT, name) for name in ("phi_q", "phi_k")
    )
    value = te.placeholder((batch, heads, sizes.n_key, cx.int64(d)), config.dtype, "value")
    spectrum = te.placeholder((heads, *map(cx.int64, (2, last, length // last, 2))), cx.FLOAT, "spectrum")
    tables = make_tables(config)

    def pack(b: Expr, h: Expr, pair: Expr, p: Expr, s: Expr, q: Expr, c: Expr) -> Expr:
        return packed_element(config, sizes, tables, lambda *at: value[(b, h, *at)], pair, p, s * rest + q, c)

    packed = cx.compute((batch, heads, config.pairs, 2, radices[0], rest, 2), pack, "packed")

    def load(where: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        b, h, pair, p, feature = where
        return cx.scale(cx.load(packed, b, h, pair, p, s, q), phi_k[b, h, feature, s * rest + q])

    def multiply(where: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
        return cx.mul(value, cx.load(spectrum, where[1], where[3], t, block))

    lead = (batch, heads, config.pairs, 2, m)
    ahead = gpu_dft.forward("ahead", radices, lead, tables, load, multiply)
    back = gpu_dft.inverse(
        "back", radices, lead, tables, lambda where, block, t: cx.load(ahead, *where, block, t, 0, 0)
    )
    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    partial = cx.compute(
        _partial_shape(config, sizes),
        lambda b, h, pair, p, s, q, c: te.sum(
            phi_q[b, h, feature, s * rest + q] * back[b, h, pair, p, feature, 0, s, q, c], axis=feature
        ),
        "partial",
    )
    return [phi_q, phi_k, value, spectrum, tables.tensor, partial]


def normalise(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the last step: both parities added, each channel divided by the denominator.

    Returns
    -------
    list of te.Tensor
        partial `[B, H, pairs, 2, P, 2]` as `fft_attention` returns it, tables (flat), out `[B, H, n_q, d]`.
    """
    d, length = config.head_dim, config.length
    partial = te.placeholder(
        [sizes.batch, sizes.heads, *map(cx.int64, (config.pairs, 2, length, 2))], cx.FLOAT, "partial"
    )
    tables = make_tables(config)

    def add(b: Expr, h: Expr, pair: Expr, i: Expr, c: Expr) -> Expr:
        even, odd = (cx.load(partial, b, h, pair, p, i) for p in (0, 1))
        return cx.part(c, cx.add(even, cx.mul_conj(odd, tables.parity(i))))

    sums = cx.compute((sizes.batch, sizes.heads, config.pairs, length, 2), add, "sums")

    def divide(b: Expr, h: Expr, i: Expr, ch: Expr) -> Expr:
        inverse = cx.real(1.0) / sums[b, h, d // 2, i, d % 2]
        return (sums[b, h, ch // 2, i, ch % 2] * inverse).astype(config.dtype)

    out = cx.compute((sizes.batch, sizes.heads, sizes.n_query, d), divide, "out")
    return [partial, tables.tensor, out]
