"""Kernelized attention with RPE on GPUs where a transform does not fit into shared memory: the four-step split.

P points lie as N1 x N2, j = n1 * N2 + n2. Each column is one butterfly of radix N1 in registers, each row one
transform in shared memory; between them lie two arrays in memory for a few pairs of channels at a time. Everything
else is as in `te.gpu_attention`. Source: Luo et al. 2021, Eq. 10 and Sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import te

from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables, packed_element
from rpe_tvm.te.gpu_weights import folded_weight, weight_inputs
from rpe_tvm.te.shapes import Sizes


def array(config: GpuAttentionConfig, lead: list[Expr], name: str) -> te.Tensor:
    """An array between columns and rows: `lead + [N1, S, N2 / S, 2]` with S the first radix of a row."""
    first = config.radices[0]
    return te.placeholder([*lead, *map(cx.int64, (config.columns, first, config.row // first, 2))], cx.FLOAT, name)


def columns(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the transforms of columns, of some pairs of channels of one head.

    Returns
    -------
    list
        phi_k `[m, P]`, value `[n_k, d]`, tables (flat), the first pair, transformed `[count, 2, m, N1, N2, 2]`.
    """
    m, d = config.num_features, config.head_dim
    n1, n2 = config.columns, config.row
    count, first = te.var("count", "int64"), te.var("first", "int64")
    phi_k = te.placeholder((cx.int64(m), cx.int64(config.length)), cx.FLOAT, "phi_k")
    value = te.placeholder((sizes.n_key, cx.int64(d)), config.dtype, "value")
    tables = make_tables(config)

    def pack(u: Expr, p: Expr, row: Expr, column: Expr, c: Expr) -> Expr:
        return packed_element(config, sizes, tables, lambda *at: value[at], first + u, p, row * n2 + column, c)

    packed = cx.compute((count, 2, n1, n2, 2), pack, "packed")

    def load(at: tuple[Expr, ...], s: int) -> Complex:
        u, p, f, column = at
        return cx.scale(cx.load(packed, u, p, s, column), phi_k[f, s * n2 + column])

    butterfly = gpu_dft.butterfly("column", (count, 2, m, n2), n1, -1, load)

    def transform(u: Expr, p: Expr, f: Expr, k1: Expr, column: Expr, c: Expr) -> Expr:
        y = butterfly((u, p, f, column))
        y = [y[0]] + [cx.mul(y[k], tables.split(k, column, n2)) for k in range(1, n1)]
        return cx.part(c, cx.choose(k1, y))

    transformed = cx.compute((count, 2, m, n1, n2, 2), transform, "transformed")
    return [phi_k, value, tables.tensor, first, transformed]


def rows(config: GpuAttentionConfig) -> list[te.Tensor]:
    """Return the arguments of the products of rows with the spectrum of one head, there and back.

    Returns
    -------
    list of te.Tensor
        transformed `[count, 2, m, N1, S, N2 / S, 2]`, spectrum `[2, N1, R, N2 / R, 2]` with R the last radix, tables
        (flat), product, of the shape of transformed.
    """
    m, last = config.num_features, config.radices[-1]
    count = te.var("count", "int64")
    transformed = array(config, [count, cx.int64(2), cx.int64(m)], "transformed")
    spectrum = te.placeholder(
        list(map(cx.int64, (2, config.columns, last, config.row // last, 2))), cx.FLOAT, "spectrum"
    )
    tables = make_tables(config)
    product = row_products(config, transformed, tables, lambda at, *k2: cx.load(spectrum, at[1], at[3], *k2))
    return [transformed, spectrum, tables.tensor, product]


def row_products(
    config: GpuAttentionConfig,
    transformed: te.Tensor,
    tables: gpu_dft.Tables,
    spectrum: Callable[[tuple[Expr, ...], int, Expr], Complex],
) -> te.Tensor:
    """Return the products of transformed rows, `[*four axes, S, N2 / S, 2]`, with `spectrum(axes, t, block)`."""
    radices, lead = config.radices, tuple(transformed.shape[:4])
    ahead = gpu_dft.forward(
        "ahead",
        radices,
        lead,
        tables,
        lambda at, s, q: cx.load(transformed, *at, s, q),
        lambda at, block, t, value: cx.mul(value, spectrum(at, t, block)),
    )
    back = gpu_dft.inverse("back", radices, lead, tables, lambda at, block, t: cx.load(ahead, *at, block, t, 0, 0))
    return cx.compute(
        (*lead, radices[0], config.row // radices[0], 2),
        lambda u, p, f, k1, s, q, c: back[u, p, f, k1, 0, s, q, c],
        "product",
    )


def back_columns(config: GpuAttentionConfig) -> list[te.Tensor]:
    """Return the arguments of the inverse transforms of columns, summed over features.

    Returns
    -------
    list of te.Tensor
        product `[count, 2, m, N1, N2, 2]`, phi_q `[m, P]`, tables (flat), partial `[count, 2, N1, N2, 2]`.
    """
    m, n1, n2 = config.num_features, config.columns, config.row
    count = te.var("count", "int64")
    product = te.placeholder([count, *map(cx.int64, (2, m, n1, n2, 2))], cx.FLOAT, "product")
    phi_q = te.placeholder((cx.int64(m), cx.int64(config.length)), cx.FLOAT, "phi_q")
    tables = make_tables(config)

    def load(at: tuple[Expr, ...], k1: int) -> Complex:
        u, p, f, column = at
        value = cx.load(product, u, p, f, k1, column)
        return value if k1 == 0 else cx.mul_conj(value, tables.split(k1, column, n2))

    butterfly = gpu_dft.butterfly("column", (count, 2, m, n2), n1, +1, load)
    back = cx.compute(
        (count, 2, m, n1, n2, 2),
        lambda u, p, f, row, column, c: cx.part(c, cx.choose(row, butterfly((u, p, f, column)))),
        "back",
    )
    feature = te.reduce_axis((cx.int64(0), cx.int64(m)), "feature")
    partial = cx.compute(
        (count, 2, n1, n2, 2),
        lambda u, p, row, column, c: te.sum(
            phi_q[feature, row * n2 + column] * back[u, p, feature, row, column, c], axis=feature
        ),
        "partial",
    )
    return [product, phi_q, tables.tensor, partial]


def spectrum_columns(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the transforms of columns of the weights of all heads; as `te.gpu_weights.spectrum`.

    Returns
    -------
    list
        rpe_bias `[H, n_q + n_k - 1]`, largest `[H]`, n_q, n_k, causal (0 or 1), tables (flat), transformed
        `[H, 2, N1, N2, 2]`.
    """
    bias, largest, causal = weight_inputs(sizes)
    tables = make_tables(config)

    def fold(h: Expr, p: Expr, position: Expr, c: Expr) -> Expr:
        return folded_weight(config, sizes, tables, bias, largest, causal, h, p, position, c)

    transformed = column_spectrum(config, sizes, tables, fold)
    return [bias, largest, sizes.n_query, sizes.n_key, causal, tables.tensor, transformed]


def column_spectrum(
    config: GpuAttentionConfig, sizes: Sizes, tables: gpu_dft.Tables, fold: Callable[[Expr, Expr, Expr, Expr], Expr]
) -> te.Tensor:
    """Return the transforms of the columns of `fold(h, parity, position, part)`, `[H, 2, N1, N2, 2]`."""
    n1, n2 = config.columns, config.row
    folded = cx.compute(
        (sizes.heads, 2, n1, n2, 2), lambda h, p, row, column, c: fold(h, p, row * n2 + column, c), "packed"
    )
    butterfly = gpu_dft.butterfly(
        "column", (sizes.heads, 2, n2), n1, -1, lambda at, s: cx.load(folded, at[0], at[1], s, at[2])
    )

    def transform(h: Expr, p: Expr, k1: Expr, column: Expr, c: Expr) -> Expr:
        y = butterfly((h, p, column))
        y = [y[0]] + [cx.mul(y[k], tables.split(k, column, n2)) for k in range(1, n1)]
        return cx.part(c, cx.choose(k1, y))

    return cx.compute((sizes.heads, 2, n1, n2, 2), transform, "transformed")


def spectrum_rows(config: GpuAttentionConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the transforms of rows of the weights.

    Returns
    -------
    list of te.Tensor
        transformed `[H, 2, N1, S, N2 / S, 2]`, tables (flat), spectrum `[H, 2, N1, R, N2 / R, 2]`.
    """
    transformed = array(config, [sizes.heads, cx.int64(2)], "transformed")
    tables = make_tables(config)
    last = config.radices[-1]
    ahead = gpu_dft.forward(
        "ahead",
        config.radices,
        (sizes.heads, 2, config.columns),
        tables,
        lambda at, s, q: cx.load(transformed, *at, s, q),
        lambda at, block, t, value: value,
    )
    spectrum = cx.compute(
        (sizes.heads, 2, config.columns, last, config.row // last, 2),
        lambda h, p, k1, t, block, c: ahead[h, p, k1, block, t, 0, 0, c],
        "spectrum",
    )
    return [transformed, tables.tensor, spectrum]
