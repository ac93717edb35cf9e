"""Gradients of attention on GPUs where a transform does not fit into shared memory: the split of `te.gpu_long`.

Spectra and products of both sides lie in memory for some pairs of channels of one head, so that four transforms of rows
and columns make all gradients: sums over features of the products are the values' gradient
(`te.gpu_long.back_columns`), sums over channels those of the features. Source: Luo et al. 2021, Eq. 10, differentiated.
"""

from __future__ import annotations

from tvm import te

from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import gpu_dft
from rpe_tvm.te.complex import Complex, Expr
from rpe_tvm.te.gpu_attention import make_tables
from rpe_tvm.te.gpu_backward import back_from, kept_spectra


def columns(config: GpuBackwardConfig) -> list[te.Tensor]:
    """Return the arguments of the transforms of columns of one side, of some pairs of channels of one head.

    Returns
    -------
    list of te.Tensor
        phi `[m, P]`, channels `[count, 2, N1, N2, 2]`, tables (flat), transformed `[count, 2, m, N1, N2, 2]`.
    """
    m, n1, n2 = config.num_features, config.columns, config.row
    count = te.var("count", "int64")
    phi = te.placeholder((cx.int64(m), cx.int64(config.length)), cx.FLOAT, "phi")
    channels = te.placeholder((count, *map(cx.int64, (2, n1, n2, 2))), cx.FLOAT, "channels")
    tables = make_tables(config)
    packed = cx.compute(channels.shape, lambda *at: channels[at], "packed")

    def load(at: tuple[Expr, ...], s: int) -> Complex:
        u, p, f, column = at
        return cx.scale(cx.load(packed, u, p, s, column), phi[f, s * n2 + column])

    butterfly = gpu_dft.butterfly("column", (count, 2, m, n2), n1, -1, load)

    def transform(u: Expr, p: Expr, f: Expr, k1: Expr, column: Expr, c: Expr) -> Expr:
        y = butterfly((u, p, f, column))
        y = [y[0]] + [cx.mul(y[k], tables.split(k, column, n2)) for k in range(1, n1)]
        return cx.part(c, cx.choose(k1, y))

    return [phi, channels, tables.tensor, cx.compute((count, 2, m, n1, n2, 2), transform, "transformed")]


def rows(config: GpuBackwardConfig) -> list[te.Tensor]:
    """Return the arguments of the products of rows of both sides with the spectrum of one head, there and back.

    Returns
    -------
    list of te.Tensor
        values and grads `[count, 2, m, N1, S, N2 / S, 2]`, spectrum `[2, N1, R, N2 / R, 2]`, tables (flat),
        correlation `[m, 2, N1, 2, S, N2 / S]` in the order of `te.gpu_backward.fft_backward`, summed over these pairs
        of channels, and the products of grads and of values, shaped as these.
    """
    m, n1, radices = config.num_features, config.columns, config.radices
    first, last = radices[0], radices[-1]
    rest = config.row // first
    count = te.var("count", "int64")
    shape = (count, *map(cx.int64, (2, m, n1, first, rest, 2)))
    inputs = {name: te.placeholder(shape, cx.FLOAT, name) for name in ("values", "grads")}
    spectrum = te.placeholder(list(map(cx.int64, (2, n1, last, config.row // last, 2))), cx.FLOAT, "spectrum")
    tables = make_tables(config)
    lead = (count, 2, m, n1)
    kept = {
        name: kept_spectra(name, radices, lead, tables, lambda at, s, q, x=x: cx.load(x, *at, s, q))  # type: ignore[misc]
        for name, x in inputs.items()
    }
    pair = te.reduce_axis((cx.int64(0), count), "pair")

    def cross(f: Expr, p: Expr, k1: Expr, c: Expr, s: Expr, q: Expr) -> Expr:
        at = (pair, p, f, k1, s // last, s % last, q)
        return te.sum(cx.part(c, cx.mul_conj(*(cx.load(kept[name], *at) for name in ("values", "grads")))), axis=pair)

    correlation = cx.compute((m, 2, n1, 2, first, rest), cross, "correlation")
    products = []
    for name, product in (("grads", cx.mul_conj), ("values", cx.mul)):

        def weighted(at: tuple[Expr, ...], block: Expr, t: int, x: Complex, product: object = product) -> Complex:
            return product(x, cx.load(spectrum, at[1], at[3], t, block))  # type: ignore[operator, no-any-return]

        back = back_from(name, radices, lead, tables, kept[name], weighted)

        def of(u: Expr, p: Expr, f: Expr, k1: Expr, s: Expr, q: Expr, c: Expr, back: te.Tensor = back) -> Expr:
            return back[u, p, f, k1, 0, s, q, c]

        products.append(cx.compute(shape, of, f"of_{name}"))
    return [*inputs.values(), spectrum, tables.tensor, correlation, *products]


def dots(config: GpuBackwardConfig) -> list[te.Tensor]:
    """Return the arguments of the gradients of features: inverse transforms of columns times the other side's channels.

    Returns
    -------
    list of te.Tensor
        product `[count, 2, m, N1, N2, 2]`, channels `[count, 2, N1, N2, 2]`, tables (flat), grad_phi `[m, N1, N2]`,
        summed over these pairs of channels and parities.
    """
    m, n1, n2 = config.num_features, config.columns, config.row
    count = te.var("count", "int64")
    product = te.placeholder((count, *map(cx.int64, (2, m, n1, n2, 2))), cx.FLOAT, "product")
    channels = te.placeholder((count, *map(cx.int64, (2, n1, n2, 2))), cx.FLOAT, "channels")
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
    pair, parity = te.reduce_axis((cx.int64(0), count), "pair"), te.reduce_axis((cx.int64(0), cx.int64(2)), "parity")

    def dot(f: Expr, row: Expr, column: Expr) -> Expr:
        # both are twisted, and the twists cancel
        x, y = cx.load(back, pair, parity, f, row, column), cx.load(channels, pair, parity, row, column)
        return te.sum(x[0] * y[0] + x[1] * y[1], axis=[pair, parity])

    return [product, channels, tables.tensor, cx.compute((m, n1, n2), dot, "grad_phi")]
