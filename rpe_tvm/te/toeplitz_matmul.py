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
from rpe_tvm.te.toeplitz import circulant_product


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
        x `[B, H, n_in, d]`, spectrum `[H, 2, P, 2]` of `te.weights.plain_weights`, tables (flat), out `[B, H, n_out, d]`.
    """
    d, length, lanes = config.head_dim, config.length, config.lanes
    split = split_of(config)
    where = twiddles.layout(config)
    x = te.placeholder((sizes.batch, sizes.heads, sizes.n_key, cx.int64(d)), cx.FLOAT, "x")
    spectrum = te.placeholder((sizes.heads, *map(cx.int64, (2, length, 2))), cx.FLOAT, "spectrum")
    constants = te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables")
    tables = dft.Tables(constants, where)

    def load(at: tuple[Expr, ...], n2: Expr, q: Expr, s: int, lane: Expr) -> Complex:
        """Return two channels of x as one complex number, D times it for parity 1."""
        b, h, g, p = at
        position = split.position(n2, q, s)

        def element(part: int) -> Expr:
            channel = (2 * g + part) * lanes + lane
            # past the end the last position again, as zero: a bound instead of a branch
            found = x[b, h, tirx.min(position, sizes.n_key - 1), channel]
            inside = tirx.Select(position < sizes.n_key, found, cx.real(0.0))
            return inside if d % (2 * lanes) == 0 else tirx.if_then_else(channel < d, inside, cx.real(0.0))

        value = element(0), element(1)
        turned = cx.mul(value, tables.parity(position))
        return tirx.Select(p == 0, value[0], turned[0]), tirx.Select(p == 0, value[1], turned[1])

    groups = -(-d // (2 * lanes))
    product = circulant_product(
        "product",
        config,
        (sizes.batch, sizes.heads, groups, 2),
        tables,
        load,
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
