"""Toeplitz products on GPUs: as `te.gpu_attention` with one feature, which is 1, and both parities in one block.

y = T x with T[i, j] = w[j-i] for each head and channel; T is the sum of a circulant and a skew-circulant part, parity 0
and 1. Source: FastRPB, Zubkov and Gavrilov 2022; the split: `docs/operators.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import te, tirx

from rpe_tvm.plan.gpu_toeplitz import CORRELATED_PAIRS, GpuToeplitzConfig, correlation_shape
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables
from rpe_tvm.te.gpu_weights import folded, spectrum_of
from rpe_tvm.te.shapes import Sizes

# (leading indices, pair, t, block) of a transform -> its number
Transform = Callable[[Sequence[Expr], Expr, Expr, Expr], Complex]


def rows_of(config: GpuToeplitzConfig, lead: Sequence[Expr], n: Expr, name: str) -> te.Tensor:
    """Return the placeholder of channels by position, `[*lead, n, d]`."""
    return te.placeholder((*lead, n, cx.int64(config.head_dim)), cx.FLOAT, name)


def whole_pairs_of(config: GpuToeplitzConfig, lead: Sequence[Expr], n: Expr, name: str) -> te.Tensor:
    """Return `rows_of`; where d is even as whole pairs of channels, `[*lead, n, d / 2]`, whose 8 bytes are an integer.

    Threads that access pairs of neighbouring positions access as many rows, and so half as often.
    """
    if config.head_dim % 2:
        return rows_of(config, lead, n, name)
    return te.placeholder((*lead, n, cx.int64(config.pairs)), "int64", name)


def pairs_of(
    config: GpuToeplitzConfig,
    x: te.Tensor,
    name: str,
    axes: Sequence[Expr],
    place: Callable[[Sequence[Expr]], tuple[Sequence[Expr], Expr, Expr]],
) -> te.Tensor:
    """Return pairs of channels of `rows_of`, `[*axes, 2]`, zero past the ends; `place` turns an index of the axes into
    that of the array, the pair and the position.

    What is read for it is a stage of its own, `read_<name>`: all that a thread needs is asked for before any is used.
    """
    d, n = config.head_dim, x.shape[-2]
    if x.dtype == "int64":
        return _halves_of(x, name, axes, place)

    def read(*index: Expr) -> Expr:
        *at, c = index
        lead, pair, position = place(at)
        # past the end the last position again: a bound instead of a branch
        ch = 2 * pair + c if d % 2 == 0 else tirx.min(2 * pair + c, d - 1)
        return x[(*lead, tirx.min(position, n - 1), ch)]

    found = cx.compute((*axes, 2), read, f"read_{name}")

    def zero_past_the_ends(*index: Expr) -> Expr:
        *at, c = index
        _, pair, position = place(at)
        inside = position < n if d % 2 == 0 else tirx.all(position < n, 2 * pair + c < d)
        return tirx.Select(inside, found[index], cx.real(0.0))

    return cx.compute((*axes, 2), zero_past_the_ends, f"packed_{name}")


def _halves_of(
    x: te.Tensor, name: str, axes: Sequence[Expr], place: Callable[[Sequence[Expr]], tuple[Sequence[Expr], Expr, Expr]]
) -> te.Tensor:
    """As `pairs_of`, of `whole_pairs_of`."""
    n = x.shape[-2]

    def read(*at: Expr) -> Expr:
        lead, pair, position = place(at)
        return x[(*lead, tirx.min(position, n - 1), pair)]

    found = cx.compute(axes, read, f"read_{name}")

    def half(*index: Expr) -> Expr:
        *at, c = index
        _, _, position = place(at)
        value = tirx.reinterpret(cx.FLOAT, (found[tuple(at)] >> (32 * c)).astype("int32"))
        return tirx.Select(position < n, value, cx.real(0.0))

    return cx.compute((*axes, 2), half, f"packed_{name}")


def by_first_radix(config: GpuToeplitzConfig) -> Callable[[Sequence[Expr]], tuple[Sequence[Expr], Expr, Expr]]:
    """Return the `place` of `pairs_of` for the axes (batch, head, pair, s, q) of a transform's first stage."""
    rest = config.row // config.radices[0]

    def place(at: Sequence[Expr]) -> tuple[Sequence[Expr], Expr, Expr]:
        b, h, pair, s, q = at
        return (b, h), pair, s * rest + q

    return place


def weight_inputs(
    config: GpuToeplitzConfig, sizes: Sizes, tables: gpu_dft.Tables
) -> tuple[te.Tensor, Callable[[Expr, Expr, Expr, Expr], Expr]]:
    """Return the placeholder of weights and what of them is transformed at (head, parity, position, part)."""
    weights = te.placeholder((sizes.heads, sizes.n_query + sizes.n_key - 1), cx.FLOAT, "weights")

    def fold(h: Expr, p: Expr, position: Expr, c: Expr) -> Expr:
        def weight(t: Expr) -> Expr:
            found = weights[h, t + sizes.n_query - 1] * cx.real(0.5 / config.length)
            return tirx.if_then_else(tirx.all(t > -sizes.n_query, t < sizes.n_key), found, cx.real(0.0))

        return folded(config, tables, weight, p, position, c)

    return weights, fold


def spectrum(config: GpuToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the spectrum of the weights by parity; as `te.gpu_weights.spectrum`.

    Returns
    -------
    list
        weights `[H, n_out + n - 1]`, n_out, n, tables (flat), spectrum `[H, 2, R, P / R, 2]` with R the last radix.
    """
    tables = make_tables(config)
    weights, fold = weight_inputs(config, sizes, tables)
    rest = config.row // config.radices[0]
    result = spectrum_of(config, sizes, tables, lambda h, p, s, q, c: fold(h, p, s * rest + q, c))
    return [weights, sizes.n_query, sizes.n_key, tables.tensor, result]


def product(config: GpuToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the product where a transform fits into shared memory.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n, d]`, spectrum as `spectrum` returns it, tables (flat), n_out, out `[B, H, n_out, d]`; x and out as
        `whole_pairs_of` has them.
    """
    radices, length = config.radices, config.length
    first, last = radices[0], radices[-1]
    rest = length // first
    batch, heads = sizes.batch, sizes.heads
    x = whole_pairs_of(config, (batch, heads), sizes.n_key, "x")
    spectra = te.placeholder((heads, *map(cx.int64, (2, last, length // last, 2))), cx.FLOAT, "spectrum")
    tables = make_tables(config)
    packed = pairs_of(config, x, "x", (batch, heads, config.pairs, first, rest), by_first_radix(config))
    lead = (batch, heads, config.pairs, 2)

    def load(at: tuple[Expr, ...], s: int, q: Expr) -> Complex:
        return tables.twist(at[3], s * rest + q, cx.load(packed, *at[:3], s, q))

    def multiply(at: tuple[Expr, ...], block: Expr, t: int, value: Complex) -> Complex:
        return cx.mul(value, cx.load(spectra, at[1], at[3], t, block))

    ahead = gpu_dft.forward("ahead", radices, lead, tables, load, multiply)
    back = gpu_dft.inverse("back", radices, lead, tables, lambda at, block, t: cx.load(ahead, *at, block, t, 0, 0))
    parity = te.reduce_axis((cx.int64(0), cx.int64(2)), "parity")

    def add(b: Expr, h: Expr, pair: Expr, s: Expr, q: Expr, c: Expr) -> Expr:
        value = cx.load(back, b, h, pair, parity, 0, s, q)
        return te.sum(cx.part(c, tables.untwist(parity, s * rest + q, value)), axis=parity)

    sums = cx.compute((batch, heads, config.pairs, first, rest, 2), add, "sums")

    def unpack(b: Expr, h: Expr, i: Expr, ch: Expr) -> Expr:
        if config.head_dim % 2:
            return sums[b, h, ch // 2, i // rest, i % rest, ch % 2]
        low, high = (tirx.reinterpret("uint32", each) for each in cx.load(sums, b, h, ch, i // rest, i % rest))
        return tirx.reinterpret("int64", low.astype("uint64") | (high.astype("uint64") << tirx.const(32, "uint64")))

    # n_out <= P always; the minimum tells the schedule so
    n_out = tirx.min(sizes.n_query, length)
    out = cx.compute((batch, heads, n_out, config.head_dim if config.head_dim % 2 else config.pairs), unpack, "out")
    return [x, spectra, tables.tensor, sizes.n_query, out]


def correlation(config: GpuToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradient of the weights, in frequency space, the output last.

    For y = T x and its gradient g, dw[t] = sum_i g_i x_{i+t}, summed over channels. With the transforms G and X of
    pairs of channels that is the real part of the inverse transform of sum conj(G) X.

    Returns
    -------
    list of te.Tensor
        grad `[B, H, n_out, d]`, x `[B, H, n, d]`, tables (flat), sums `[B, H, groups, 2, 1, R, S / R, P / S, 2]` with S
        the first and R the last radix: position block * R + t in digit order is element (t, block), as of spectra.
    """
    rest = config.length // config.radices[0]
    lead = (sizes.batch, sizes.heads)
    # not as whole pairs: with those of both sides in flight, blocks of 8192 points spill too many registers
    grad = rows_of(config, lead, sizes.n_query, "grad")
    x = rows_of(config, lead, sizes.n_key, "x")
    tables = make_tables(config)

    def transform(name: str, source: te.Tensor) -> Transform:
        axes = (*lead, config.pairs, config.radices[0], rest)
        packed = pairs_of(config, source, name, axes, by_first_radix(config))

        def load(at: tuple[Expr, ...], s: int, q: Expr) -> Complex:
            b, h, p, _, pair = at
            return tables.twist(p, s * rest + q, cx.load(packed, b, h, pair, s, q))

        return of_pairs(config, name, (*lead, 2, 1), tables, load)

    sums = correlations(config, lead, transform("grad", grad), transform("x", x))
    return [grad, x, tables.tensor, sums]


def of_pairs(
    config: GpuToeplitzConfig, name: str, lead: Sequence[Expr], tables: gpu_dft.Tables, load: gpu_dft.LoadForward
) -> Transform:
    """Return the transforms of pairs of channels, blocks `ahead_<name>_<stage>`; `load` gets the pair behind `lead`."""
    ahead = gpu_dft.forward(
        f"ahead_{name}_", config.radices, (*lead, config.pairs), tables, load, lambda at, block, t, value: value
    )
    return lambda at, pair, t, block: cx.load(ahead, *at, pair, block, t, 0, 0)


def correlations(config: GpuToeplitzConfig, lead: Sequence[Expr], grad: Transform, x: Transform) -> te.Tensor:
    """Return sum conj(G) X over the pairs of each group, `[*lead, groups, 2, columns, R, S / R, row / S, 2]`: a thread
    has one element of the last axis, and so S numbers, as in all other stages.
    """
    pairs = config.pairs
    width = min(CORRELATED_PAIRS, pairs)
    within = te.reduce_axis((cx.int64(0), cx.int64(width)), "pair")

    def correlate(*index: Expr) -> Expr:
        *at, group, p, k1, t, turn, q, c = index
        block = turn * config.threads + q
        pair = group * width + within
        inside = tirx.min(pair, pairs - 1) if pairs % width else pair
        found = cx.part(c, cx.mul_conj(x((*at, p, k1), inside, t, block), grad((*at, p, k1), inside, t, block)))
        return te.sum(tirx.Select(pair < pairs, found, cx.real(0.0)) if pairs % width else found, axis=within)

    return cx.compute((*lead, *correlation_shape(config)), correlate, "sums")
