"""Toeplitz products on GPUs where a transform does not fit into shared memory: the four-step split of `te.gpu_long`.

Columns turn rows of channels into pairs of channels, a tile at a time in shared memory, so that both sides of memory
are read and written in order.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx

from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables
from rpe_tvm.te.gpu_long import array, column_spectrum, row_products
from rpe_tvm.te.gpu_toeplitz import Transform, correlations, of_pairs, pairs_of, rows_of, weight_inputs
from rpe_tvm.te.shapes import Sizes


def spectrum_columns(config: GpuToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the transforms of columns of the weights of all heads.

    Returns
    -------
    list
        weights `[H, n_out + n - 1]`, n_out, n, tables (flat), transformed `[H, 2, N1, N2, 2]`.
    """
    tables = make_tables(config)
    weights, fold = weight_inputs(config, sizes, tables)
    return [weights, sizes.n_query, sizes.n_key, tables.tensor, column_spectrum(config, sizes, tables, fold)]


def columns(config: GpuToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the transforms of columns, of some heads.

    Returns
    -------
    list
        x `[count, n, d]`, tables (flat), transformed `[count, pairs, 2, N1, N2, 2]`.
    """
    n1, n2, pairs = config.columns, config.row, config.pairs
    count = te.var("count", "int64")
    x = rows_of(config, (count,), sizes.n_key, "x")
    tables = make_tables(config)

    def place(at: Sequence[Expr]) -> tuple[Sequence[Expr], Expr, Expr]:
        u, pair, row, column = at
        return (u,), pair, row * n2 + column

    packed = pairs_of(config, x, "x", (count, pairs, n1, n2), place)
    twisted = cx.compute(
        (count, pairs, 2, n1, n2, 2),
        lambda u, pair, p, row, column, c: cx.part(
            c, tables.twist(p, row * n2 + column, cx.load(packed, u, pair, row, column))
        ),
        "twisted",
    )
    lead = (count, pairs, 2, n2)
    butterfly = gpu_dft.butterfly("column", lead, n1, -1, lambda at, s: cx.load(twisted, *at[:3], s, at[3]))

    def transform(u: Expr, pair: Expr, p: Expr, k1: Expr, column: Expr, c: Expr) -> Expr:
        y = butterfly((u, pair, p, column))
        y = [y[0]] + [cx.mul(y[k], tables.split(k, column, n2)) for k in range(1, n1)]
        return cx.part(c, cx.choose(k1, y))

    transformed = cx.compute((count, pairs, 2, n1, n2, 2), transform, "transformed")
    return [x, tables.tensor, transformed]


def rows(config: GpuToeplitzConfig) -> list[te.Tensor]:
    """Return the arguments of the products of rows with the spectra of their heads, there and back.

    Returns
    -------
    list of te.Tensor
        transformed `[count, pairs, 2, N1, S, N2 / S, 2]`, spectrum `[count, 2, N1, R, N2 / R, 2]` with R the last
        radix, tables (flat), product, of the shape of transformed.
    """
    count, last = te.var("count", "int64"), config.radices[-1]
    transformed = array(config, [count, cx.int64(config.pairs), cx.int64(2)], "transformed")
    of_heads = (count, *map(cx.int64, (2, config.columns, last, config.row // last, 2)))
    spectrum = te.placeholder(of_heads, cx.FLOAT, "spectrum")
    tables = make_tables(config)

    def spectrum_at(at: tuple[Expr, ...], t: int, block: Expr) -> Complex:
        u, _, p, k1 = at
        return cx.load(spectrum, u, p, k1, t, block)

    return [transformed, spectrum, tables.tensor, row_products(config, transformed, tables, spectrum_at)]


def back_columns(config: GpuToeplitzConfig, sizes: Sizes) -> list[te.Tensor]:
    """Return the arguments of the inverse transforms of columns, both parities added.

    Returns
    -------
    list
        product `[count, pairs, 2, N1, N2, 2]`, tables (flat), n_out, out `[count, n_out, d]`.
    """
    n1, n2, pairs = config.columns, config.row, config.pairs
    count = te.var("count", "int64")
    product = te.placeholder([count, *map(cx.int64, (pairs, 2, n1, n2, 2))], cx.FLOAT, "product")
    tables = make_tables(config)

    def load(at: tuple[Expr, ...], k1: int) -> Complex:
        u, pair, p, column = at
        value = cx.load(product, u, pair, p, k1, column)
        return value if k1 == 0 else cx.mul_conj(value, tables.split(k1, column, n2))

    turned = cx.compute(
        (count, pairs, 2, n1, n2, 2),
        lambda u, pair, p, k1, column, c: cx.part(c, cx.choose(k1, [load((u, pair, p, column), k) for k in range(n1)])),
        "turned",
    )
    butterfly = gpu_dft.butterfly(
        "column", (count, pairs, 2, n2), n1, +1, lambda at, k1: cx.load(turned, *at[:3], k1, at[3])
    )
    back = cx.compute(
        (count, pairs, 2, n1, n2, 2),
        lambda u, pair, p, row, column, c: cx.part(c, cx.choose(row, butterfly((u, pair, p, column)))),
        "back",
    )

    def add(u: Expr, pair: Expr, row: Expr, column: Expr, c: Expr) -> Expr:
        even, odd = (cx.load(back, u, pair, p, row, column) for p in (0, 1))
        return cx.part(c, tables.untwisted_sum(row * n2 + column, (even, odd)))

    sums = cx.compute((count, pairs, n1, n2, 2), add, "sums")
    # n_out <= P always; the minimum tells the schedule so
    out = cx.compute(
        (count, tirx.min(sizes.n_query, config.length), config.head_dim),
        lambda u, i, ch: sums[u, ch // 2, i // n2, i % n2, ch % 2],
        "out",
    )
    return [product, tables.tensor, sizes.n_query, out]


def correlation_rows(config: GpuToeplitzConfig) -> list[te.Tensor]:
    """Return the arguments of the gradient of the weights, in frequency space; as `te.gpu_toeplitz.correlation`.

    Returns
    -------
    list of te.Tensor
        grad_columns and x_columns, transformed, `[count, pairs, 2, N1, S, N2 / S, 2]`, tables (flat), sums
        `[count, groups, 2, N1, R, S / R, N2 / S, 2]`.
    """
    count = te.var("count", "int64")
    shape = [count, cx.int64(config.pairs), cx.int64(2)]
    sides = {name: array(config, shape, f"{name}_columns") for name in ("grad", "x")}
    tables = make_tables(config)

    def transform(name: str) -> Transform:
        def load(at: tuple[Expr, ...], s: int, q: Expr) -> Complex:
            u, p, k1, pair = at
            return cx.load(sides[name], u, pair, p, k1, s, q)

        return of_pairs(config, name, (count, 2, config.columns), tables, load)

    sums = correlations(config, (count,), transform("grad"), transform("x"))
    return [sides["grad"], sides["x"], tables.tensor, sums]
