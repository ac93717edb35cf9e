"""From a config to the scheduled functions of the gradients on tensor cores."""

from __future__ import annotations

import tvm

from rpe_tvm.build.device_code import CALLS_ATTRIBUTE
from rpe_tvm.build.lower import Lowered
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.te.cuda_backward import backward
from rpe_tvm.te.cuda_backward_keys import key_gradients
from rpe_tvm.te.cuda_backward_queries import query_gradients
from rpe_tvm.te.cuda_bias_gradient import bias_gradient
from rpe_tvm.te.cuda_features import features
from rpe_tvm.te.cuda_weights import direct_weights
from rpe_tvm.te.features import FEATURE_MAPS


def lower(config: TensorCoreBackwardConfig) -> Lowered:
    """Return the functions `features_prf`, `features_nprf`, `weights`, `grad_queries`, `grad_keys` and `grad_bias`, one
    kernel each, and `backward_prf` and `backward_nprf`, which call them.

    Batch, heads and lengths are read from the arguments of each call.
    """
    functions = {f"features_{feature_map}": features(config.of_features, feature_map) for feature_map in FEATURE_MAPS}
    functions["weights"] = direct_weights()
    functions["grad_queries"] = query_gradients(config)
    functions["grad_keys"] = key_gradients(config)
    functions["grad_bias"] = bias_gradient()
    for feature_map in FEATURE_MAPS:
        functions[f"backward_{feature_map}"] = backward(config, feature_map).with_attr(CALLS_ATTRIBUTE, 1)
    return Lowered(tvm.IRModule(functions), {"source": "default"})
