"""What was measured on GPUs: the fastest config by dtype, length, features and head dimension."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

from rpe_tvm.plan import wisdom
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_tiles import TileConfig

GpuConfig = GpuAttentionConfig | TensorCoreConfig | TileConfig


@dataclass(frozen=True)
class GpuWisdom:
    """One measured choice.

    Parameters
    ----------
    dtype : str
        Of query, key, value and the output. Where the FFT serves 16-bit numbers, its config has another one.
    length : int
        Positions that it was measured at.
    config : GpuAttentionConfig, TensorCoreConfig or TileConfig
        The fastest one.
    ms, default_ms : float
        Its time, and in the same race that of the rule's config.
    """

    dtype: str
    length: int
    config: GpuConfig
    ms: float
    default_ms: float


def config_from_json(fields: dict[str, Any]) -> GpuConfig:
    """Return the config that `to_json` wrote: that of the FFT has radices, that of tiles in float32 pieces of rows."""
    if "radices" in fields:
        return GpuAttentionConfig.from_json(fields)
    return TileConfig.from_json(fields) if "row_pieces" in fields else TensorCoreConfig.from_json(fields)


@functools.cache
def records(target_id: str) -> tuple[GpuWisdom, ...]:
    """Return the measured choices that are shipped for a target such as ``cuda-sm_90``, empty if there are none."""
    path = wisdom.directory(target_id, GpuAttentionConfig.op) / "wisdom.json"
    if not path.exists():
        return ()
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return tuple(
        GpuWisdom(e["dtype"], e["length"], config_from_json(e["config"]), e["ms"], e["default_ms"]) for e in entries
    )


@functools.lru_cache(maxsize=4096)
def nearest(target_id: str, n: int, num_features: int, head_dim: int, dtype: str) -> GpuWisdom | None:
    """Return the choice for the nearest measured length with the same features, head dimension and dtype.

    None where there is none, and where `n` is more than was measured: there another algorithm may be far better.
    """
    size = num_features, head_dim, dtype
    measured = [w for w in records(target_id) if (w.config.num_features, w.config.head_dim, w.dtype) == size]
    if n > max((w.length for w in measured), default=0):
        return None
    return min(measured, key=lambda w: abs(math.log(w.length / max(n, 1))))
