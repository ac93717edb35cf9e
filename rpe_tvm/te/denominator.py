"""Denominators of attention by FFT, apart from the numerators: features as lanes, 1/d of the work."""

from __future__ import annotations

from tvm import te

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.lanes import channel, existing, lane_groups, twist, untwisted_sum
from rpe_tvm.te.shapes import Sizes, feature_buffer
from rpe_tvm.te.toeplitz import circulant_product


def partial_denominators(
    config: AttentionConfig, sizes: Sizes, phi_q: te.Tensor, phi_k: te.Tensor, spectrum: te.Tensor, tables: dft.Tables
) -> te.Tensor:
    """Return den_i = sum_f phi_q[f]_i (C phi_k[f])_i for each feature group, `[B, H, groups, N2, Q, S]`."""
    m, lanes = config.num_features, config.lanes
    split = split_of(config)
    groups = lane_groups(m, lanes)

    def pack(b: Expr, h: Expr, g: Expr, p: Expr, n2: Expr, q: Expr, s: Expr, c: Expr, lane: Expr) -> Expr:
        def element(part: int) -> Expr:
            ch = channel(g, part, lane, lanes)
            return existing(ch, m, lanes, phi_k[b, h, ch, n2, q * split.s + s])

        return cx.part(c, twist(tables, p, split.position(n2, q, s), (element(0), element(1))))

    packed = cx.compute((sizes.batch, sizes.heads, groups, 2, split.n2, split.q, split.s, 2, lanes), pack, "packed_key")
    weighted_key = circulant_product(
        "key",
        config,
        (sizes.batch, sizes.heads, groups, 2),
        tables,
        lambda at, n2, q, s, lane: tuple(packed[(*at, n2, q, s, p, lane)] for p in (0, 1)),
        lambda at, k1, k2: cx.load(spectrum, at[1], at[3], k1 * split.n2 + k2),
    )
    lane_axis = te.reduce_axis((cx.int64(0), cx.int64(lanes)), "lane")
    part_axis = te.reduce_axis((cx.int64(0), cx.int64(2)), "part")

    def of_group(b: Expr, h: Expr, g: Expr, n2: Expr, q: Expr, s: Expr) -> Expr:
        position = split.position(n2, q, s)
        both = [[weighted_key[b, h, g, p, n2, 0, q, s, k, lane_axis] for k in (0, 1)] for p in (0, 1)]
        weighted = cx.part(part_axis, untwisted_sum(tables, position, [(x[0], x[1]) for x in both]))
        ch = channel(g, part_axis, lane_axis, lanes)
        phi = existing(ch, m, lanes, phi_q[b, h, ch, n2, q * split.s + s])
        return te.sum(phi * weighted, axis=[part_axis, lane_axis])

    return cx.compute((sizes.batch, sizes.heads, groups, split.n2, split.q, split.s), of_group, "denominator")


def fft_denominator(config: AttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the denominators alone, the output last.

    Returns
    -------
    list of te.Tensor
        phi_q and phi_k `[B, H, m, N2, N1]`, spectrum `[H, 2, P, 2]`, tables (flat); denominator
        `[B, H, groups, N2, Q, S]`, to be summed over groups.
    """
    where = twiddles.layout(config)
    phi_q, phi_k = (feature_buffer(config, sizes, name) for name in ("phi_q", "phi_k"))
    spectrum = te.placeholder((sizes.heads, *map(cx.int64, (2, config.length, 2))), cx.FLOAT, "spectrum")
    tables = dft.Tables(te.placeholder((cx.int64(where.size),), cx.FLOAT, "tables"), where)
    denominator = partial_denominators(config, sizes, phi_q, phi_k, spectrum, tables)
    return [phi_q, phi_k, spectrum, tables.tensor, denominator]
