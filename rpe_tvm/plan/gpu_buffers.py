"""Shapes of the buffers between the functions of attention on GPUs; all are contiguous float32."""

from __future__ import annotations

from rpe_tvm.plan.gpu import GpuAttentionConfig


def features(config: GpuAttentionConfig, batch: int, heads: int) -> tuple[int, ...]:
    """phi of queries and of keys, `[B, H, m, P]`: natural order, zero past the length."""
    return batch, heads, config.num_features, config.length


def largest(config: GpuAttentionConfig, heads: int) -> tuple[int, ...]:
    """The largest bias of each head that any query sees, `[H]`."""
    return (heads,)


def spectrum(config: GpuAttentionConfig, heads: int) -> tuple[int, ...]:
    """The transforms of the weights, `[H, 2, R, P / R, 2]`: by parity, complex, with R the last radix."""
    last = config.radices[-1]
    return heads, 2, last, config.length // last, 2


def partial(config: GpuAttentionConfig, batch: int, heads: int) -> tuple[int, ...]:
    """Sums over features, `[B, H, pairs, 2, S, P / S, 2]`: by pair of channels and parity, complex, S the first radix."""
    first = config.radices[0]
    return batch, heads, config.pairs, 2, first, config.length // first, 2
