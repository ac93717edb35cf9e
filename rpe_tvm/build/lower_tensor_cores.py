"""From a config to the scheduled functions of attention on tensor cores."""

from __future__ import annotations

import tvm

from rpe_tvm.build.device_code import ARCH_ATTRIBUTE, OPTIONAL_ATTRIBUTE, OVERLAP_ATTRIBUTE
from rpe_tvm.build.lower import Lowered
from rpe_tvm.build.lower_forward import forward_functions
from rpe_tvm.plan.gpu_direct import CLUSTER_ARCH, TensorCoreConfig, clustered, fused
from rpe_tvm.te.cuda_clustered import clustered_attention
from rpe_tvm.te.cuda_direct import direct_attention
from rpe_tvm.te.cuda_features import features
from rpe_tvm.te.cuda_fused import fused_attention
from rpe_tvm.te.cuda_weights import direct_weights
from rpe_tvm.te.features import FEATURE_MAPS


def lower(config: TensorCoreConfig) -> Lowered:
    """Return the functions `features_prf`, `features_nprf`, `weights`, `attention` and `recorded_attention`, one
    kernel each, `forward_prf`, `forward_nprf`, `recorded_prf` and `recorded_nprf`, which call them, and for short
    sequences `fused_prf` and `fused_nprf`, one kernel that does all, and `clustered_prf` and `clustered_nprf`, which
    do the same on GPUs that have clusters.

    Batch, heads and lengths are read from the arguments of each call.
    """
    functions = {f"features_{feature_map}": features(config, feature_map) for feature_map in FEATURE_MAPS}
    functions["weights"] = direct_weights()
    functions["attention"] = direct_attention(config)
    functions["recorded_attention"] = direct_attention(config, is_recorded=True)
    functions |= forward_functions(config)
    one_kernel, of_clusters = fused(config), clustered(config)
    for feature_map in FEATURE_MAPS:
        if one_kernel is not None:
            function = fused_attention(one_kernel, feature_map)
            functions[f"fused_{feature_map}"] = function.with_attr(OPTIONAL_ATTRIBUTE, 1)
        if of_clusters is not None:
            attributes = {ARCH_ATTRIBUTE: CLUSTER_ARCH, OVERLAP_ATTRIBUTE: 1, OPTIONAL_ATTRIBUTE: 1}
            function = clustered_attention(of_clusters, feature_map)
            functions[f"clustered_{feature_map}"] = function.with_attrs(attributes)
    return Lowered(tvm.IRModule(functions), {"source": "default"})
