"""From a config to the scheduled functions of the gradients by tiles in float32."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.device_code import CALLS_ATTRIBUTE
from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.lower_gpu import feature_functions
from rpe_tvm.build.lower_gpu_backward import STRIDED
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.schedules import gpu_gradients as schedules
from rpe_tvm.te import gpu_backward_calls, gpu_gradients, shapes
from rpe_tvm.te.cuda_weights import direct_weights
from rpe_tvm.te.gpu_features import FEATURE_MAPS
from rpe_tvm.te.gpu_tile_backward_keys import key_gradients
from rpe_tvm.te.gpu_tile_backward_queries import query_gradients
from rpe_tvm.te.gpu_tile_diagonals import bias_gradient


def lower(config: TileBackwardConfig) -> Lowered:
    """Return the functions `features_<map>`, `weights`, `grad_queries`, `grad_keys`, `grad_bias` and
    `grad_features_<map>`, which launch kernels, and `gradients` and `backward_<map>`, which call them.

    Batch, heads and lengths are read from the arguments of each call.
    """
    functions = feature_functions(config)
    functions["weights"] = direct_weights()
    functions["grad_queries"] = query_gradients(config)
    functions["grad_keys"] = key_gradients(config)
    functions["grad_bias"] = bias_gradient(config)
    for feature_map in FEATURE_MAPS:
        name, expressions = (
            f"grad_features_{feature_map}",
            gpu_gradients.grad_features(config, shapes.symbolic(), feature_map),
        )
        sch = Schedule(relax_parameters(te.create_prim_func(expressions), STRIDED))
        schedules.grad_features(sch, config, feature_map)
        functions[name] = named(sch, name)
    calls = [gpu_backward_calls.gradients(config)]
    calls += [gpu_backward_calls.backward(config, feature_map) for feature_map in FEATURE_MAPS]
    functions |= {str(call.attrs["global_symbol"]): call.with_attr(CALLS_ATTRIBUTE, 1) for call in calls}
    return Lowered(tvm.IRModule(functions), {"source": "default"})
