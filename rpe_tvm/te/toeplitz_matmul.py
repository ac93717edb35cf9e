"""Products with a Toeplitz matrix by FFT: one function from x and the spectrum of the weights to y.

y = T x with T[i, j] = w[j-i] for each head and channel, T = (T+ + D* T- D) / 2 as a circulant and a skew-circulant
part ("parity" 0 and 1), see `te.fft_attention`, which does the same for each feature.
Source: FastRPB, Zubkov and Gavrilov 2022; the split: `docs/operators.md`.
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.split import split_of
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.shapes import Sizes
from rpe_tvm.te.toeplitz import LoadColumn, circulant_product, transform


def toeplitz_matmul(config: ToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the operator, the output last.

    Parameters
    ----------
    config : ToeplitzConfig
        Bucket, channels and factorisation.
    sizes : Sizes
        Batch, heads, `n_query` outputs and `n_key` inputs.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n_in, d]`, spectrum `[H, 2, P, 2]` of `te.weights.plain_weights`, tables (flat),
        out `[B, H, n_out, d]`.
    """
    d, length, lanes = config.head_dim, config.length, config.lanes
    split = split_of(config)
    where = twiddles.layout(config)
    x = te.placeholder((sizes.batch, sizes.heads, sizes.n_key, cx.int64(d)), cx.FLOAT, "x")
    spectrum = te.placeholder((sizes.heads, *map(cx.int64, (2, length, 2))), cx.FLOAT, "spectrum")
    constants = te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables")
    tables = dft.Tables(constants, where)

    groups = _groups(config)
    product = circulant_product(
        "product",
        config,
        (sizes.batch, sizes.heads, groups, 2),
        tables,
        _pairs(config, x, sizes.n_key, tables),
        lambda at, k1, k2: cx.load(spectrum, at[1], at[3], k1 * split.n2 + k2),
    )

    def sum_of_parities(b: Expr, h: Expr, g: Expr, n2: Expr, q: Expr, s: Expr, c: Expr, lane: Expr) -> Expr:
        even, odd = (cx.load_lanes(product, (b, h, g, p, n2, 0, q, s), lane) for p in (0, 1))
        return cx.part(c, cx.add(even, cx.mul_conj(odd, tables.parity(split.position(n2, q, s)))))

    packed_out = cx.compute(
        (sizes.batch, sizes.heads, groups, split.n2, split.q, split.s, 2, lanes), sum_of_parities, "packed_out"
    )

    def unpack(b: Expr, h: Expr, i: Expr, channel: Expr) -> Expr:
        # i < P always; the remainder tells the schedule so where n_out is symbolic
        at = (channel // (2 * lanes), *split.packed(i % length), channel // lanes % 2, channel % lanes)
        return packed_out[(b, h, *at)]

    out = cx.compute((sizes.batch, sizes.heads, sizes.n_query, d), unpack, "out")
    return [x, spectrum, constants, out]


def toeplitz_correlation(config: ToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradient of the weights, in frequency space, the output last.

    For y = T x and its gradient g, dw[t] = sum_i g_i x_{i+t}, summed over channels. With the transforms G and X of
    pairs of channels that is the real part of the inverse transform of sum conj(G) X.

    Returns
    -------
    list of te.Tensor
        grad `[B, H, n_out, d]`, x `[B, H, n_in, d]`, tables (flat), sums `[B, H, 2, P, 2]` in digit order, for each
        parity.
    """
    split = split_of(config)
    radix = config.inner[-1]
    where = twiddles.layout(config)
    d = cx.int64(config.head_dim)
    grad = te.placeholder((sizes.batch, sizes.heads, sizes.n_query, d), cx.FLOAT, "grad")
    x = te.placeholder((sizes.batch, sizes.heads, sizes.n_key, d), cx.FLOAT, "x")
    constants = te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables")
    tables = dft.Tables(constants, where)
    lead = (sizes.batch, sizes.heads, _groups(config), 2)
    transforms = [
        transform(name, config, lead, tables, _pairs(config, source, n, tables), lambda where, k1, k2, value: value)
        for name, source, n in (("grad", grad, sizes.n_query), ("x", x, sizes.n_key))
    ]
    group = te.reduce_axis((cx.int64(0), cx.int64(_groups(config))), "group")

    def correlate(b: Expr, h: Expr, p: Expr, k1: Expr, block: Expr, t: Expr, c: Expr, lane: Expr) -> Expr:
        g, z = (cx.load_lanes(each, (b, h, group, p, k1, block, 0, t), lane) for each in transforms)
        return te.sum(cx.part(c, cx.mul_conj(z, g)), axis=group)

    by_lane = cx.compute(
        (sizes.batch, sizes.heads, 2, split.n1, split.n2 // radix, radix, 2, config.lanes), correlate, "by_lane"
    )
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(config.lanes)), "lane")

    def add_lanes(b: Expr, h: Expr, p: Expr, position: Expr, c: Expr) -> Expr:
        k1, k2 = position // split.n2, position % split.n2
        return te.sum(by_lane[b, h, p, k1, k2 // radix, k2 % radix, c, lane_axis], axis=lane_axis)

    sums = cx.compute((sizes.batch, sizes.heads, 2, config.length, 2), add_lanes, "sums")
    return [grad, x, constants, sums]


def _groups(config: ToeplitzConfig) -> int:
    """Return how many complex vectors hold the channels of a head."""
    return -(-config.head_dim // (2 * config.lanes))


def _pairs(config: ToeplitzConfig, x: te.Tensor, n: Expr, tables: dft.Tables) -> LoadColumn:
    """Return the function that loads two channels of x as one complex number, D times it for parity 1."""
    d, lanes = config.head_dim, config.lanes
    split = split_of(config)

    def load(at: tuple[Expr, ...], n2: Expr, q: Expr, s: int, lane: Expr) -> Complex:
        b, h, g, p = at
        position = split.position(n2, q, s)

        def element(part: int) -> Expr:
            channel = (2 * g + part) * lanes + lane
            # past the end the last position again, as zero: a bound instead of a branch
            found = x[b, h, tirx.min(position, n - 1), channel]
            inside = tirx.Select(position < n, found, cx.real(0.0))
            return inside if d % (2 * lanes) == 0 else tirx.if_then_else(channel < d, inside, cx.real(0.0))

        value = element(0), element(1)
        turned = cx.mul(value, tables.parity(position))
        return tirx.Select(p == 0, value[0], turned[0]), tirx.Select(p == 0, value[1], turned[1])

    return load
