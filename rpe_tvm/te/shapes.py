"""Sizes of an operator's buffers that a compiled module leaves open, or that tuning fixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK, feature_shape, padded_length
from rpe_tvm.te import complex as cx


@dataclass(frozen=True)
class Sizes:
    """Batch, heads, lengths of query and key, and blocks of 64 positions they are padded to, as 64-bit expressions."""

    batch: Any
    heads: Any
    n_query: Any
    n_key: Any
    blocks: Any

    @property
    def is_symbolic(self) -> bool:
        """Whether the sizes are read from the arguments of each call."""
        return isinstance(self.batch, tirx.Var)


def symbolic() -> Sizes:
    """Return sizes that are read from the arguments of each call."""
    return Sizes(*(te.var(name, "int64") for name in ("batch", "heads", "n_query", "n_key", "blocks")))


def fixed(config: AttentionConfig, batch: int, heads: int) -> Sizes:
    """Return the constant sizes of a full bucket: MetaSchedule cannot tune symbolic ones."""
    n = config.length
    return Sizes(*(cx.int64(size) for size in (batch, heads, n, n, padded_length(config, n, n) // BLOCK)))


def feature_rows(config: AttentionConfig, sizes: Sizes) -> tuple[Any, Any]:
    """Return the last two axes of a feature buffer."""
    if config.algorithm == "direct":
        return sizes.blocks, cx.int64(BLOCK)
    *_, rows, columns = feature_shape(config, 1, 1, config.length, config.length)
    return cx.int64(rows), cx.int64(columns)


def feature_buffer(config: AttentionConfig, sizes: Sizes, name: str) -> te.Tensor:
    """Return the placeholder of features, `[B, H, m, rows, columns]` as in `plan.twiddles.feature_shape`."""
    rows, columns = feature_rows(config, sizes)
    return te.placeholder((sizes.batch, sizes.heads, cx.int64(config.num_features), rows, columns), cx.FLOAT, name)


def at_position(buffer: te.Tensor, batch: Any, head: Any, feature: Any, position: Any) -> Any:
    """Return the element of a feature buffer of `direct` at a position."""
    return buffer[batch, head, feature, position // BLOCK, position % BLOCK]
