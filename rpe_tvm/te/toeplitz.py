"""Toeplitz products by a four-step FFT: P points as N1 x N2, j = n1 * N2 + n2, transformed along both axes in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import te

from rpe_tvm.plan.split import Factorised, split_of
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Complex, Expr

# (leading indices, n2, q, s, lane) -> element at position (s * Q + q) * N2 + n2
LoadColumn = Callable[[tuple[Expr, ...], Expr, Expr, int, Expr], Complex]
# (leading indices, k1, k2) -> spectrum at these digit-ordered positions
LoadSpectrum = Callable[[tuple[Expr, ...], Expr, Expr], Complex]


def transform(
    name: str,
    config: Factorised,
    lead: Sequence[Expr],
    tables: dft.Tables,
    load: LoadColumn,
    finish: dft.Finish,
) -> te.Tensor:
    """Return forward transforms of P points in digit order; blocks are `<name>_columns<k>`, `<name>_rows<k>`.

    Returns
    -------
    te.Tensor
        `lead + [N1, N2 / R, 1, R, 2, lanes]` with R the last inner radix: frequency (k1, k2) in digit order is element
        (k1, k2 // R, 0, k2 % R). `finish` was applied to it.
    """
    split = split_of(config)
    radix = config.outer[-1]

    columns = dft.forward(
        f"{name}_columns",
        config.outer,
        lead,
        split.n2,
        config.lanes,
        tables,
        load,
        lambda where, n2, k1, value: cx.mul(value, tables.split(n2, k1, split.n1)),
    )

    def load_row(where: tuple[Expr, ...], k1: Expr, q: Expr, s: int, lane: Expr) -> Complex:
        at = (*where, s * (split.n2 // config.inner[0]) + q, k1 // radix, 0, k1 % radix)
        return columns[(*at, 0, lane)], columns[(*at, 1, lane)]

    return dft.forward(f"{name}_rows", config.inner, lead, split.n1, config.lanes, tables, load_row, finish)


def transform_back(
    name: str, config: Factorised, lead: Sequence[Expr], tables: dft.Tables, load: dft.LoadInverse
) -> te.Tensor:
    """Return unscaled inverse transforms; blocks are `<name>_back_rows<k>`, `<name>_back_columns<k>`.

    Parameters
    ----------
    load : callable
        (leading indices, k1, k2, lane) -> spectrum at these digit-ordered positions.

    Returns
    -------
    te.Tensor
        `lead + [N2, 1, Q, S, 2, lanes]`: element (n2, q, s) is position (s * Q + q) * N2 + n2.
    """
    split = split_of(config)
    back_rows = dft.inverse(f"{name}_back_rows", config.inner, lead, split.n1, config.lanes, tables, load)
    rest = split.n2 // config.inner[0]

    def load_back_column(where: tuple[Expr, ...], n2: Expr, k1: Expr, lane: Expr) -> Complex:
        at = (*where, k1, 0, n2 % rest, n2 // rest)
        value = back_rows[(*at, 0, lane)], back_rows[(*at, 1, lane)]
        return cx.mul_conj(value, tables.split(n2, k1, split.n1))

    return dft.inverse(f"{name}_back_columns", config.outer, lead, split.n2, config.lanes, tables, load_back_column)


def at_frequency(
    config: Factorised, rows: te.Tensor, where: tuple[Expr, ...], k1: Expr, k2: Expr, lane: Expr
) -> Complex:
    """Return an element of what `transform` returned."""
    radix = config.inner[-1]
    return cx.load_lanes(rows, (*where, k1, k2 // radix, 0, k2 % radix), lane)


def circulant_product(
    name: str,
    config: Factorised,
    lead: Sequence[Expr],
    tables: dft.Tables,
    load: LoadColumn,
    spectrum: LoadSpectrum,
) -> te.Tensor:
    """Return the product of a circulant matrix with many vectors, unscaled, as `transform_back` returns it."""
    rows = transform(
        name,
        config,
        lead,
        tables,
        load,
        lambda where, k1, k2, value: cx.mul(value, spectrum(where, k1, k2)),
    )
    return transform_back(
        name,
        config,
        lead,
        tables,
        lambda where, k1, k2, lane: at_frequency(config, rows, where, k1, k2, lane),
    )
