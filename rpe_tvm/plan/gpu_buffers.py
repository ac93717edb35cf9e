"""Shapes of the buffers between the functions of attention on GPUs; all are contiguous float32.

Some functions see an axis of positions as two axes: the one of the first or the last radix, and the rest.
"""

from __future__ import annotations

import math

from rpe_tvm.plan.gpu import GpuAttentionConfig

# Of each of the two arrays between columns and rows, 16 MiB: both stay in the second-level cache of an H100 or A100.
_ARRAY_FLOATS = 4 << 20


def features(config: GpuAttentionConfig, batch: int, heads: int) -> tuple[int, ...]:
    """phi of queries and of keys, `[B, H, m, P]`: natural order, zero past the length."""
    return batch, heads, config.num_features, config.length


def spectrum(config: GpuAttentionConfig, heads: int) -> tuple[int, ...]:
    """The transforms of the weights by parity, complex: with R the last radix `[H, 2, R, P / R, 2]`, where there are
    columns `[H, 2, columns, R, row / R, 2]`.
    """
    last = config.radices[-1]
    rows = () if config.columns == 1 else (config.columns,)
    return heads, 2, *rows, last, config.row // last, 2


def spectrum_columns(config: GpuAttentionConfig, heads: int) -> tuple[int, ...]:
    """The transforms of the columns of the weights, complex, `[H, 2, columns, row, 2]`."""
    return heads, 2, config.columns, config.row, 2


def partial(config: GpuAttentionConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Sums over features by pair of channels and parity, complex, `[B, H, pairs, 2, P, 2]`."""
    return batch, heads, config.pairs, 2, config.length, 2


def between(config: GpuAttentionConfig, pairs: int) -> tuple[int, ...]:
    """What columns and rows of some pairs of channels hand to each other, complex, `[pairs, 2, m, columns, row, 2]`."""
    return pairs, 2, config.num_features, config.columns, config.row, 2


def pairs_at_once(config: GpuAttentionConfig) -> int:
    """Pairs of channels whose columns and rows take turns."""
    return max(1, min(config.pairs, _ARRAY_FLOATS // math.prod(between(config, 1))))
