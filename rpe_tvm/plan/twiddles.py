"""Constant tables of a compiled operator, made in float64 and rounded once, and the shapes of its buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import Factorised, split_of

# positions of one row of the feature buffers of `direct`, and of one task of the feature map; every tile fits it
BLOCK = 64

Complex = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class TableLayout:
    """Where each table starts in the flat float32 array of tables, in units of float32.

    All tables are complex, stored as (real, imaginary) pairs.

    Parameters
    ----------
    stages : dict
        (size, radix) of a DFT stage -> start of its twiddles, `[size / radix, radix]`.
    split : int
        Twiddles between the two halves of the four-step split, `[N2, N1]`.
    parity : int
        exp(-i pi j / P) for j < P: turns a skew-circulant product into a circulant one.
    size : int
        Length of the whole array.
    """

    stages: dict[tuple[int, int], int]
    split: int
    parity: int
    size: int


def stage_sizes(radices: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (size, radix) of each stage of a forward transform; the last stage has no twiddles."""
    size = math.prod(radices)
    sizes = []
    for radix in radices:
        sizes.append((size, radix))
        size //= radix
    return sizes


def layout(config: Factorised) -> TableLayout:
    """Return the layout of the tables of an `fft` config."""
    stages: dict[tuple[int, int], int] = {}
    start = 0
    for size, radix in stage_sizes(config.outer) + stage_sizes(config.inner):
        if size > radix and (size, radix) not in stages:
            stages[size, radix] = start
            start += 2 * size
    split, parity = start, start + 2 * config.length
    return TableLayout(stages, split, parity, parity + 2 * config.length)


def digit_order(radices: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Return the frequency at each position after a forward transform (decimation in frequency)."""
    rest = np.arange(math.prod(radices))
    size, weight = len(rest), 1
    frequency = np.zeros_like(rest)
    for radix in radices:
        size //= radix
        frequency += (rest // size) * weight
        rest = rest % size
        weight *= radix
    return frequency


def frequencies(config: Factorised) -> npt.NDArray[np.int64]:
    """Return the frequency at each of the P positions of a spectrum."""
    n1 = math.prod(config.outer)
    return np.asarray((digit_order(config.outer)[:, None] + n1 * digit_order(config.inner)).ravel())


def _pairs(values: Complex) -> npt.NDArray[np.float32]:
    return np.stack([values.real, values.imag], -1).astype(np.float32).ravel()


def tables(config: AttentionConfig) -> npt.NDArray[np.float32]:
    """Return the constant tables that the compiled functions of `config` take.

    Parameters
    ----------
    config : AttentionConfig
        The operator's config.

    Returns
    -------
    ndarray of float32, flat
        For `fft` laid out as in `layout`; for `direct` one unused zero.
    """
    return np.zeros(1, np.float32) if config.algorithm == "direct" else fft_tables(config)


def fft_tables(config: Factorised) -> npt.NDArray[np.float32]:
    """Return the tables of a config by FFT, flat, as `layout` says."""
    where = layout(config)
    out = np.empty(where.size, np.float32)
    for (size, radix), start in where.stages.items():
        angle = np.outer(np.arange(size // radix), np.arange(radix)) / size
        out[start : start + 2 * size] = _pairs(np.exp(-2j * np.pi * angle))
    length = config.length
    n1 = digit_order(config.outer)
    angle = np.outer(np.arange(math.prod(config.inner)), n1) / length
    out[where.split : where.parity] = _pairs(np.exp(-2j * np.pi * angle))
    out[where.parity :] = _pairs(np.exp(-1j * np.pi * np.arange(length) / length))
    return out


def position_step(config: AttentionConfig) -> int:
    """Return the step in which feature buffers have positions, before these are rounded up to whole rows."""
    if config.algorithm == "fft":
        return config.length
    rows, keys = config.tile
    # whole rows of 64 positions are whole tiles of keys that divide 64
    return rows if BLOCK % keys == 0 else math.lcm(rows, keys)


def padded_length(config: AttentionConfig, n_query: int, n_key: int) -> int:
    """Return the number of positions that feature buffers have for these lengths: whole tiles and whole rows."""
    if config.algorithm == "fft":
        return config.length
    step = position_step(config)
    positions = max(1, -(-max(n_query, n_key) // step)) * step
    return -(-positions // BLOCK) * BLOCK


def feature_shape(config: AttentionConfig, batch: int, heads: int, n_query: int, n_key: int) -> tuple[int, ...]:
    """Return the shape of the feature buffers: `direct`: `[B, H, m, padded / 64, 64]`, `fft`: `[B, H, m, N2, N1]`.

    `feature_positions` says which position an element belongs to.
    """
    padded = padded_length(config, n_query, n_key)
    columns = split_of(config).n1 if config.algorithm == "fft" else BLOCK
    return batch, heads, config.num_features, padded // columns, columns


def feature_positions(config: AttentionConfig, n_query: int, n_key: int) -> npt.NDArray[np.int64]:
    """Return the position of each element of the last two axes of a feature buffer.

    `direct`: in order. `fft`: row n2 and column q * S + s hold position (s * Q + q) * N2 + n2, the order in which
    columns of the four-step split are transformed, with S the first outer radix and N1 = Q * S.
    """
    *_, rows, columns = feature_shape(config, 1, 1, n_query, n_key)
    row, column = np.ogrid[:rows, :columns]
    if config.algorithm == "direct":
        return np.asarray(row * columns + column)
    split = split_of(config)
    return np.asarray(split.position(row, column // split.s, column % split.s))


def weight_table_shape(config: AttentionConfig, heads: int, n_query: int, n_key: int) -> tuple[int, ...]:
    """Return the shape of the table that `weights` fills and `attention` reads.

    `fft`: `[H, 2, P, 2]`, the spectrum of the circulant (0) and of the skew-circulant (1) part in digit order,
    complex. `direct`: `[H, 2 * padded_length]`, exp(b - max b) with zeros around it.
    """
    if config.algorithm == "fft":
        return heads, 2, config.length, 2
    return heads, 2 * padded_length(config, n_query, n_key)
