"""What lies around the transforms of `te.gpu_backward` on GPUs: from rows to channels, and from sums to gradients.

Each function is one or two kernels that torch would need a handful of operations for.
Source: Luo et al. 2021, Eqs. 5, 10 and 11, differentiated (`reference.attention_gradients`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Protocol

from tvm import te, tirx

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import TILE, make_tables, tile_sums
from rpe_tvm.te.gpu_features import FeatureMap, FeatureSizes
from rpe_tvm.te.gpu_weights import weight_inputs
from rpe_tvm.te.shapes import Sizes

# threads that share the sums of one position
GROUPS = 8


class GradientSizes(FeatureSizes, Protocol):
    """What a config says of the gradients of its features: in how many parts they come."""

    @property
    def grad_parts(self) -> int: ...


def _rows(sizes: Sizes, n: Expr, config: GradientSizes, name: str) -> te.Tensor:
    return te.placeholder((sizes.batch, sizes.heads, n, cx.int64(config.head_dim)), cx.FLOAT, name)


def total(terms: Iterable[Expr]) -> Expr:
    """Return a sum, unrolled."""
    return functools.reduce(lambda x, y: x + y, terms)


def column_groups(config: GradientSizes) -> tuple[int, int]:
    """Return in how many groups of how many columns threads make the gradients of a row."""
    columns = max(8, -(-config.head_dim // 32))
    return -(-config.head_dim // columns), columns


def channels(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the channels of both sides, the output last.

    Side 0 is value with the constant 1 as one more channel, side 1 is g_i = grad_out_i / den_i with
    w_i = -sum_e g_ie out_ie. Where den_i is 0, g_i and w_i are 0.

    Returns
    -------
    list of te.Tensor
        terms `[B, H, terms, residues, P]` of the denominators, value `[B, H, n_k, d]`, grad_out and out
        `[B, H, n_q, d]`, tables (flat), channels `[2, B, H, pairs, residues, P, 2]`: pairs as complex numbers, twisted
        for each remainder.
    """
    d, length = config.head_dim, config.length
    batch, heads, tiles = sizes.batch, sizes.heads, length // TILE
    m, residues = config.num_terms, config.residues
    terms = te.placeholder((batch, heads, *map(cx.int64, (m, residues, length))), cx.FLOAT, "terms")
    value = _rows(sizes, sizes.n_key, config, "value")
    grad_out, out = (_rows(sizes, sizes.n_query, config, name) for name in ("grad_out", "out"))
    tables = make_tables(config)

    def query(tile: Expr, i: Expr) -> Expr:
        # past the end the last position again: the denominator is 0 there
        return tirx.min(tile * TILE + i, sizes.n_query - 1)

    chunk, residue = (
        te.reduce_axis((cx.int64(0), cx.int64(n)), name) for n, name in ((-(-m // GROUPS), "f"), (residues, "r"))
    )
    part = cx.compute(
        (batch, heads, tiles, GROUPS, TILE),
        lambda b, h, tile, g, i: te.sum(
            tirx.if_then_else(
                chunk * GROUPS + g < m,
                terms[b, h, tirx.min(chunk * GROUPS + g, m - 1), residue, tile * TILE + i],
                cx.real(0.0),
            ),
            axis=[chunk, residue],
        ),
        "part",
    )

    def inverted(b: Expr, h: Expr, tile: Expr, i: Expr) -> Expr:
        denominator = total(part[b, h, tile, g, i] for g in range(GROUPS))
        return tirx.Select(denominator == 0, cx.real(0.0), cx.real(1.0) / denominator)

    inverse = cx.compute((batch, heads, tiles, TILE), inverted, "inverse")
    column = te.reduce_axis((cx.int64(0), cx.int64(-(-d // GROUPS))), "column")

    def product(b: Expr, h: Expr, tile: Expr, g: Expr, i: Expr) -> Expr:
        at = (b, h, query(tile, i), tirx.min(column * GROUPS + g, d - 1))
        found = grad_out[at] * out[at]
        return te.sum(tirx.if_then_else(column * GROUPS + g < d, found, cx.real(0.0)), axis=column)

    products = cx.compute((batch, heads, tiles, GROUPS, TILE), product, "products")
    weight = cx.compute(
        (batch, heads, tiles, TILE),
        lambda b, h, tile, i: total(products[b, h, tile, g, i] for g in range(GROUPS)),
        "weight",
    )

    def values_row(b: Expr, h: Expr, tile: Expr, i: Expr, ch: Expr) -> Expr:
        # past the end the last position again, whose features are zero
        at = (b, h, tirx.min(tile * TILE + i, sizes.n_key - 1), tirx.min(ch, d - 1))
        return tirx.Select(ch < d, value[at], tirx.Select(ch == d, cx.real(1.0), cx.real(0.0)))

    def grads_row(b: Expr, h: Expr, tile: Expr, i: Expr, ch: Expr) -> Expr:
        found = grad_out[b, h, query(tile, i), tirx.min(ch, d - 1)]
        last = tirx.Select(ch == d, -weight[b, h, tile, i], cx.real(0.0))
        return tirx.Select(ch < d, found, last) * inverse[b, h, tile, i]

    shape = (batch, heads, tiles, TILE, 2 * config.pairs)
    rows = cx.compute(shape, values_row, "values_row"), cx.compute(shape, grads_row, "grads_row")

    def pack(side: Expr, b: Expr, h: Expr, pair: Expr, r: Expr, i: Expr, c: Expr) -> Expr:
        x, y = (tuple(each[b, h, i // TILE, i % TILE, 2 * pair + half] for half in (0, 1)) for each in rows)
        chosen = tuple(tirx.Select(side == 0, x[half], y[half]) for half in (0, 1))
        return cx.part(c, tables.twist(r, i, (chosen[0], chosen[1])))

    packed = cx.compute((2, batch, heads, config.pairs, residues, length, 2), pack, "channels")
    return [terms, value, grad_out, out, tables.tensor, packed]


def grad_value(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradient of the values' rows: all remainders added.

    Returns
    -------
    list of te.Tensor
        partial `[B, H, (d + 1) / 2, residues, P, 2]` as `te.gpu_backward.value_sums` returns it, tables (flat), out
        `[B, H, n_k, d]`.
    """
    partial, tables, sums = tile_sums(config, sizes, config.value_pairs)
    tiles = config.length // TILE

    def row(b: Expr, h: Expr, j: Expr, ch: Expr) -> Expr:
        return sums[b, h, tirx.min(j // TILE, tiles - 1), ch // 2, j % TILE, ch % 2]

    out = cx.compute((sizes.batch, sizes.heads, sizes.n_key, config.head_dim), row, "out")
    return [partial, tables.tensor, out]


def grad_features(config: GradientSizes, sizes: Sizes, feature_map: FeatureMap) -> list[te.Tensor]:
    """Return the arguments of the gradients of the feature map's arguments, the outputs last.

    phi is an exponential, so the gradient of its exponent is e[f] = phi[f] * grad_phi[f]; a = W^T e is that of x'. PRF:
    (a - x' sum_f e[f]) / d^(1/4). NPRF: (a - x' (x' . a)) / |x|, and 0 for a zero vector.

    Returns
    -------
    list of te.Tensor
        query `[B, H, n_q, d]`, key `[B, H, n_k, d]`, projection W `[m, d]`, phi_q, phi_k `[B, H, m, P]`, grad_phi_q,
        grad_phi_k `[B, H, m, parts, P]`, grad_query, grad_key, as query and key.
    """
    m, d, length = config.num_features, config.head_dim, config.length
    projection = te.placeholder((cx.int64(m), cx.int64(d)), cx.FLOAT, "projection")
    lead = sizes.batch, sizes.heads, cx.int64(m)
    x = [_rows(sizes, n, config, name) for n, name in ((sizes.n_query, "query"), (sizes.n_key, "key"))]
    phi = [te.placeholder((*lead, cx.int64(length)), cx.FLOAT, f"phi_{name}") for name in "qk"]
    parts = cx.int64(config.grad_parts)
    grads = [te.placeholder((*lead, parts, cx.int64(length)), cx.FLOAT, f"grad_phi_{name}") for name in "qk"]
    out = [
        _grad_argument(config, sizes, feature_map, x[side], projection, phi[side], grads[side], name)
        for side, name in enumerate("qk")
    ]
    return [*x, projection, *phi, *grads, *out]


def _grad_argument(
    config: GradientSizes,
    sizes: Sizes,
    feature_map: FeatureMap,
    x: te.Tensor,
    projection: te.Tensor,
    phi: te.Tensor,
    grad_phi: te.Tensor,
    name: str,
) -> te.Tensor:
    m, d, tiles = config.num_features, config.head_dim, config.length // TILE
    batch, heads, n = sizes.batch, sizes.heads, x.shape[2]
    of_tile = (batch, heads, tiles, TILE)
    row = cx.compute((*of_tile, d), lambda b, h, t, i, k: x[b, h, tirx.min(t * TILE + i, n - 1), k], f"row_{name}")

    def exponent_of(b: Expr, h: Expr, t: Expr, f: Expr, i: Expr) -> Expr:
        position = t * TILE + i
        return phi[b, h, f, position] * total(grad_phi[b, h, f, part, position] for part in range(config.grad_parts))

    exponent = cx.compute((batch, heads, tiles, m, TILE), exponent_of, f"exponent_{name}")

    # Sums are unrolled: tiles are as many as n takes, and TVM binds no loop of a reduction below theirs to threads.
    along = cx.compute(
        (*of_tile, d),
        lambda b, h, t, i, k: total(exponent[b, h, t, f, i] * projection[f, k] for f in range(m)),
        f"along_{name}",
    )
    groups, columns = column_groups(config)

    def of_groups(name: str, term: Callable[..., Expr]) -> te.Tensor:
        """Sums of terms (..., column) over the columns of each group."""

        def add(*at: Expr) -> Expr:
            *lead, group, i = at
            ks = [group * columns + k for k in range(columns)]
            terms = [term(*lead, i, tirx.min(k, d - 1)) for k in ks]
            return total(tirx.Select(k < d, x, cx.real(0.0)) for k, x in zip(ks, terms, strict=True))

        return cx.compute((batch, heads, tiles, groups, TILE), add, name)

    if feature_map == "prf":
        pull = cx.compute(of_tile, lambda b, h, t, i: total(exponent[b, h, t, f, i] for f in range(m)), f"pull_{name}")
        scale = cx.real(d**-0.25)

        def gradient(*at: Expr) -> Expr:
            return (along[at] - row[at] * scale * pull[at[:-1]]) * scale
    else:
        pulls = of_groups(f"pulls_{name}", lambda *at: row[at] * along[at])
        norms = of_groups(f"norms_{name}", lambda *at: row[at] * row[at])

        def inverted(b: Expr, h: Expr, t: Expr, i: Expr) -> Expr:
            norm = total(norms[b, h, t, g, i] for g in range(groups))
            return tirx.Select(norm > 0, cx.real(1.0) / tirx.sqrt(norm), norm)

        inverse = cx.compute(of_tile, inverted, f"inverse_{name}")
        pull = cx.compute(
            of_tile, lambda b, h, t, i: total(pulls[b, h, t, g, i] for g in range(groups)), f"pull_{name}"
        )

        def gradient(*at: Expr) -> Expr:
            factor = inverse[at[:-1]]
            return (along[at] - row[at] * factor * (pull[at[:-1]] * factor)) * factor

    def of_row(b: Expr, h: Expr, i: Expr, k: Expr) -> Expr:
        # n <= P always; the minimum tells TVM so
        return gradient(b, h, tirx.min(i // TILE, tiles - 1), i % TILE, k)

    return cx.compute((batch, heads, n, d), of_row, f"grad_{name}")


def correlation_sums(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the sum of the weights' correlation over batch and features.

    Returns
    -------
    list of te.Tensor
        correlation `[B, H, m, residues, 2, row]`, summed `[H, residues, 2, row]`.
    """
    of_head = config.residues, 2, config.row
    shape = (sizes.batch, sizes.heads, *map(cx.int64, (config.num_features, *of_head)))
    correlation = te.placeholder(shape, cx.FLOAT, "correlation")
    b, f = te.reduce_axis((cx.int64(0), sizes.batch), "b"), te.reduce_axis((cx.int64(0), shape[2]), "f")
    summed = cx.compute(
        (sizes.heads, *of_head),
        lambda h, r, c, k: te.sum(correlation[b, h, f, r, c, k], axis=[b, f]),
        "summed",
    )
    return [correlation, summed]


def weight_sums(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the inverse transforms of the correlation's spectra, by remainder.

    Returns
    -------
    list of te.Tensor
        summed `[H, residues, 2, S, row / S]` as `te.gpu_backward.fft_backward` orders it, tables (flat), lags
        `[H, residues, folds, S, row / S]`: what remainders add to the gradient of c[t], for t >= 0 and, with the odd
        ones negative, for t - P.
    """
    radices = config.radices
    first, last = radices[0], radices[-1]
    rest = config.row // first
    summed = te.placeholder((sizes.heads, *map(cx.int64, (config.residues, 2, first, rest))), cx.FLOAT, "summed")
    tables = make_tables(config)

    def load(where: tuple[Expr, ...], block: Expr, t: int) -> Complex:
        at = block // rest * last + t, block % rest
        return summed[(*where, 0, *at)], summed[(*where, 1, *at)]

    back = gpu_dft.inverse("back", radices, (sizes.heads, config.residues), tables, load)

    def lag(h: Expr, r: Expr, fold: Expr, s: Expr, q: Expr) -> Expr:
        return tables.untwist(r, fold * config.row + s * rest + q, cx.load(back, h, r, 0, s, q))[0]

    return [summed, tables.tensor, cx.compute((sizes.heads, config.residues, config.folds, first, rest), lag, "lags")]


def grad_bias(config: GpuBackwardConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the gradient of rpe_bias: db = c dc with c[t] = exp(b[t] - max b).

    Returns
    -------
    list
        lags `[H, residues, P]` as `weight_sums` returns them, rpe_bias `[H, n_q + n_k - 1]`, largest `[H]`, n_q, n_k,
        causal (0 or 1), grad_bias, as rpe_bias.
    """
    length = config.length
    lags = te.placeholder((sizes.heads, cx.int64(config.residues), cx.int64(length)), cx.FLOAT, "lags")
    bias, largest, causal = weight_inputs(sizes)

    def gradient(h: Expr, offset: Expr) -> Expr:
        t = offset - (sizes.n_query - 1)
        at = tirx.max(tirx.min(tirx.Select(t < 0, t + length, t), length - 1), 0)
        sign = tirx.Select(t < 0, cx.real(-1.0), cx.real(1.0))
        even, odd = (total(lags[h, r, at] for r in range(first, config.residues, 2)) for first in (0, 1))
        found = (even + sign * odd) * cx.real(0.5 / length)
        seen = tirx.any(causal == 0, t <= 0)
        return tirx.if_then_else(seen, tirx.exp(bias[h, offset] - largest[h]) * found, cx.real(0.0))

    out = cx.compute(bias.shape, gradient, "grad_bias")
    return [lags, bias, largest, sizes.n_query, sizes.n_key, causal, out]
