"""From a config to the scheduled functions of attention by tiles in float32."""

from __future__ import annotations

import tvm

from rpe_tvm.build.lower import Lowered
from rpe_tvm.build.lower_forward import forward_functions
from rpe_tvm.build.lower_gpu import feature_functions
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.te.cuda_weights import direct_weights
from rpe_tvm.te.gpu_tile_attention import tile_attention


def lower(config: TileConfig) -> Lowered:
    """Return the functions `features_prf`, `features_nprf`, `weights` and `attention`, which launch kernels, and
    `forward_prf`, `forward_nprf`, `recorded_prf` and `recorded_nprf`, which call them.

    Batch, heads and lengths are read from the arguments of each call.
    """
    functions = feature_functions(config)
    functions["weights"] = direct_weights()
    functions["attention"] = tile_attention(config)
    functions |= forward_functions(config)
    return Lowered(tvm.IRModule(functions), {"source": "default"})
