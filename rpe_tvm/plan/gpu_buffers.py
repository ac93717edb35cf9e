"""Shapes of the buffers between the functions of attention on GPUs; all are contiguous float32.

Some functions see an axis of positions as two axes: the one of the first or the last radix, and the rest.
"""

from __future__ import annotations

import math

from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_tiles import TileConfig

# Of each of the two arrays between columns and rows, 256 MiB: enough blocks for all of a GPU. Arrays of 16 MiB, which
# would stay in the second-level cache, took 31.7 ms in place of 17.3 at n = 65536 on an H100, of 512 MiB 17.0.
_ARRAY_FLOATS = 64 << 20


def features(config: GpuAttentionConfig | TileConfig, batch: int, heads: int) -> tuple[int, ...]:
    """phi of queries and of keys, `[B, H, m, P]`: natural order, zero past the length."""
    return batch, heads, config.num_features, config.length


def spectrum(config: GpuAttentionConfig, heads: int) -> tuple[int, ...]:
    """The transforms of the weights by remainder, complex: with R the last radix `[H, residues, R, row / R, 2]`.

    Where there are columns `[H, 2, columns, R, row / R, 2]`.
    """
    last = config.radices[-1]
    rows = () if config.columns == 1 else (config.columns,)
    return heads, config.residues, *rows, last, config.row // last, 2


def spectrum_columns(config: GpuAttentionConfig, heads: int) -> tuple[int, ...]:
    """The transforms of the columns of the weights, complex, `[H, 2, columns, row, 2]`."""
    return heads, 2, config.columns, config.row, 2


def partial(config: GpuAttentionConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Sums over features by pair of channels and remainder, complex, `[B, H, pairs, residues, P, 2]`."""
    return batch, heads, config.pairs, config.residues, config.length, 2


def between(config: GpuAttentionConfig, pairs: int) -> tuple[int, ...]:
    """What columns and rows of some pairs of channels hand to each other, complex, `[pairs, 2, m, columns, row, 2]`."""
    return pairs, 2, config.num_features, config.columns, config.row, 2


def pairs_at_once(config: GpuAttentionConfig) -> int:
    """Pairs of channels whose columns and rows take turns."""
    return max(1, min(config.pairs, _ARRAY_FLOATS // math.prod(between(config, 1))))


def denominator_terms(config: GpuBackwardConfig, batch: int, heads: int) -> tuple[int, ...]:
    """What features and parities add to the denominators, `[B, H, m, 2, P]`, with columns `[B, H, 1, 2, P]`."""
    return batch, heads, config.num_terms, config.residues, config.length


def channels(config: GpuBackwardConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Pairs of channels of values and of their gradient's rows, complex, twisted, `[2, B, H, pairs, 2, P, 2]`."""
    return 2, batch, heads, config.pairs, 2, config.length, 2


def correlation(config: GpuBackwardConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Spectra of the weights' correlation by real and imaginary part, `[B, H, m, 2, 2, P]`."""
    return batch, heads, config.num_features, 2, 2, config.length


def grad_phi(config: GpuBackwardConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Gradient of the features of queries or of keys by parity, `[B, H, m, 2, P]`, with columns `[B, H, m, 1, P]`."""
    return batch, heads, config.num_features, config.grad_parts, config.length


def row_correlation(config: GpuBackwardConfig) -> tuple[int, ...]:
    """As `correlation`, of a head where there are columns, `[m, 2, columns, 2, row]`."""
    return config.num_features, 2, config.columns, 2, config.row


def value_partial(config: GpuBackwardConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Sums over features of the values' gradient, complex, `[B, H, (d + 1) / 2, 2, P, 2]`."""
    return batch, heads, config.value_pairs, 2, config.length, 2
