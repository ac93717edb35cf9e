"""Where the buffers between the functions of one call on a GPU lie in one piece of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rpe_tvm.plan import gpu_buffers, gpu_direct
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig

AnyConfig = GpuAttentionConfig | TensorCoreConfig | TensorCoreBackwardConfig | TileConfig | TileBackwardConfig

# What every buffer starts at a multiple of: torch's allocator promises twice as much.
ALIGNMENT = 256


@dataclass(frozen=True)
class Place:
    """One buffer: its first byte, its shape and its dtype. Sizes are integers, or expressions of TVM."""

    offset: Any
    shape: tuple[Any, ...]
    dtype: str


def places(config: AnyConfig, batch: Any, heads: Any, n_query: Any, n_key: Any) -> tuple[dict[str, Place], Any]:
    """Return the buffers of a call by name, and how many bytes they take together.

    Parameters
    ----------
    config
        What is compiled, without columns.
    batch, heads, n_query, n_key
        Sizes of the call: integers, or expressions of TVM, so that both sides count alike. For gradients on tensor
        cores n_query and n_key are rounded up to `positions` of the config.
    """
    found, end = {}, 0
    for name, shape, dtype, item in _buffers(config, batch, heads, n_query, n_key):
        found[name] = Place(end, shape, dtype)
        size = math.prod(shape) * item
        # TVM fails where an expression repeats a division that rounds, and these are multiples anyway
        end = end + (size if isinstance(config, TensorCoreBackwardConfig) else gpu_direct.round_up(size, ALIGNMENT))
    return found, end


def _buffers(
    config: AnyConfig, batch: Any, heads: Any, n_query: Any, n_key: Any
) -> list[tuple[str, tuple[Any, ...], str, int]]:
    if isinstance(config, TensorCoreConfig):
        phi = gpu_direct.features_shape
        return [
            ("phi_q", phi(config, batch, heads, n_query, config.tile_q), config.dtype, 2),
            ("phi_k", phi(config, batch, heads, n_key, config.tile_k), config.dtype, 2),
            ("table", gpu_direct.table_shape(config, heads, n_query, n_key), "float32", 4),
        ]
    if isinstance(config, TileConfig):
        of_phi = gpu_buffers.features(config, batch, heads)
        return [
            ("phi_q", of_phi, "float32", 4),
            ("phi_k", of_phi, "float32", 4),
            ("table", config.table_shape(heads, n_query, n_key), "float32", 4),
            ("denominators", (batch, heads, n_query), "float32", 4),
        ]
    if isinstance(config, TensorCoreBackwardConfig):
        rows_q, rows_k, features = n_query, n_key, config.padded_features
        return [
            ("phi_q", (batch, heads, rows_q, features), config.dtype, 2),
            ("phi_k", (batch, heads, rows_k, features), config.dtype, 2),
            ("table", (heads, rows_q + rows_k), "float32", 4),
            ("terms", (2, batch, heads, rows_q), "float32", 4),
            ("exponent_q", (batch, heads, rows_q, features), "float32", 4),
            ("exponent_k", (batch, heads, rows_k, features), "float32", 4),
        ]
    if isinstance(config, TileBackwardConfig):
        m, length = config.num_features, config.length
        of_tiles = {
            "phi_q": (batch, heads, m, length),
            "phi_k": (batch, heads, m, length),
            "table": (heads, 2 * length),
            "terms": (2, batch, heads, length),
            "diagonals": (batch, heads, *config.diagonals),
            "grad_phi_q": (batch, heads, m, 1, length),
            "grad_phi_k": (batch, heads, m, 1, length),
        }
        return [(name, shape, "float32", 4) for name, shape in of_tiles.items()]
    shapes = {
        "phi_q": gpu_buffers.features(config, batch, heads),
        "phi_k": gpu_buffers.features(config, batch, heads),
        "largest": (heads,),
        "spectrum": gpu_buffers.spectrum(config, heads),
    }
    if isinstance(config, GpuBackwardConfig):
        shapes |= {f"grad_phi_{name}": gpu_buffers.grad_phi(config, batch, heads) for name in "qk"}
    if isinstance(config, GpuBackwardConfig) and config.columns == 1:
        shapes |= {
            "terms": gpu_buffers.denominator_terms(config, batch, heads),
            "channels": gpu_buffers.channels(config, batch, heads),
            "correlation": gpu_buffers.correlation(config, batch, heads),
            "partial": gpu_buffers.value_partial(config, batch, heads),
            "summed": (heads, config.residues, 2, config.row),
            "lags": (heads, config.residues, config.length),
        }
    elif not isinstance(config, GpuBackwardConfig):
        shapes["partial"] = gpu_buffers.partial(config, batch, heads)
    return [(name, shape, "float32", 4) for name, shape in shapes.items()]
