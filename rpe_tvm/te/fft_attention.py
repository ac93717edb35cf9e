"""Kernelized attention with RPE by FFT: one function from features and value to the normalised output.

For each feature m: out += phi_q[m] * (C (phi_k[m] * value)), where C = (C+ + D* C- D) / 2 is the Toeplitz matrix as a
circulant and a skew-circulant part ("parity" 0 and 1) and D holds exp(-i pi j / P). Two value channels ride in one
complex lane, because C is real. The factor 1/2 and the transforms' 1/P are in the spectrum.
Source: Luo et al. 2021, Eq. 10 and Sec. 3.3.
"""

from __future__ import annotations

from tvm import te, tirx

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.denominator import partial_denominators
from rpe_tvm.te.lanes import channel, existing, lane_groups, place, twist, untwisted_sum
from rpe_tvm.te.shapes import Sizes, feature_buffer
from rpe_tvm.te.toeplitz import circulant_product


def fft_attention(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the fused operator, the output last.

    Parameters
    ----------
    config : AttentionConfig
        An `fft` config.
    sizes : Sizes
        Batch, heads and lengths, symbolic or constant.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, N2, N1]` (both zero past the length), value `[B, H, n_k, d]`,
        spectrum `[H, 2, P, 2]`, tables (flat), out `[B, H, n_q, d]`.
    """
    m, d, length, lanes = config.num_features, config.head_dim, config.length, config.lanes
    split = split_of(config)
    where = twiddles.layout(config)
    phi_q = feature_buffer(config, sizes, "phi_q")
    phi_k = feature_buffer(config, sizes, "phi_k")
    value = te.placeholder((sizes.batch, sizes.heads, sizes.n_key, cx.int64(d)), cx.FLOAT, "value")
    spectrum = te.placeholder((sizes.heads, *map(cx.int64, (2, length, 2))), cx.FLOAT, "spectrum")
    constants = te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables")
    tables = dft.Tables(constants, where)

    def feature_at(buffer: te.Tensor, b: Expr, h: Expr, feature: Expr, n2: Expr, q: Expr, s: Expr) -> Expr:
        return buffer[b, h, feature, n2, q * split.s + s]

    def load_spectrum(h: Expr, p: Expr, k1: Expr, k2: Expr) -> Complex:
        return cx.load(spectrum, h, p, k1 * split.n2 + k2)

    denominator = partial_denominators(config, sizes, phi_q, phi_k, spectrum, tables)
    feature_groups = lane_groups(m, lanes)

    # Numerator: one product for each feature, summed over features where the output lies.
    groups = lane_groups(d, lanes)

    def pack(b: Expr, h: Expr, g: Expr, p: Expr, n2: Expr, q: Expr, s: Expr, c: Expr, lane: Expr) -> Expr:
        position = split.position(n2, q, s)

        def element(part: int) -> Expr:
            ch = channel(g, part, lane, lanes)
            # past the end the last position again, whose features are zero: a bound instead of a branch
            return existing(ch, d, lanes, value[b, h, tirx.min(position, sizes.n_key - 1), ch])

        return cx.part(c, twist(tables, p, position, (element(0), element(1))))

    packed_value = cx.compute(
        (sizes.batch, sizes.heads, groups, 2, split.n2, split.q, split.s, 2, lanes), pack, "packed_value"
    )

    def load_value(at: tuple[Expr, ...], n2: Expr, q: Expr, s: int, lane: Expr) -> Complex:
        b, h, g, p, feature = at
        weight = feature_at(phi_k, b, h, feature, n2, q, s)
        return cx.scale(cx.load_lanes(packed_value, (b, h, g, p, n2, q, s), lane), weight)

    weighted_value = circulant_product(
        "value",
        config,
        (sizes.batch, sizes.heads, groups, 2, m),
        tables,
        load_value,
        lambda at, k1, k2: load_spectrum(at[1], at[3], k1, k2),
    )
    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    numerator = cx.compute(
        (sizes.batch, sizes.heads, groups, 2, split.n2, split.q, split.s, 2, lanes),
        lambda b, h, g, p, n2, q, s, c, lane: te.sum(
            feature_at(phi_q, b, h, feature, n2, q, s) * weighted_value[b, h, g, p, feature, n2, 0, q, s, c, lane],
            axis=feature,
        ),
        "numerator",
    )

    inverse_denominator = cx.compute(
        (sizes.batch, sizes.heads, length),
        lambda b, h, i: cx.real(1.0) / sum(denominator[(b, h, g, *split.packed(i))] for g in range(feature_groups)),
        "inverse_denominator",
    )

    def normalised(b: Expr, h: Expr, i: Expr, ch: Expr) -> Expr:
        # i < P always; the remainder tells the schedule so where n_q is symbolic
        position = i % length
        at = split.packed(position)
        g, c, lane = place(ch, lanes)
        both = [cx.load_lanes(numerator, (b, h, g, p, *at), lane) for p in (0, 1)]
        return cx.part(c, untwisted_sum(tables, position, both)) * inverse_denominator[b, h, position]

    out = cx.compute((sizes.batch, sizes.heads, sizes.n_query, d), normalised, "out")
    return [phi_q, phi_k, value, spectrum, constants, out]
