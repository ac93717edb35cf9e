"""From a config to the scheduled functions of attention on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.schedules import gpu
from rpe_tvm.te import gpu_attention, gpu_features, gpu_weights, shapes

STRIDED = frozenset(("query", "key", "value", "out"))


def lower(config: GpuAttentionConfig) -> Lowered:
    """Return the functions `features_prf`, `features_nprf`, `largest`, `spectrum`, `attention` and `normalise`, scheduled.

    Batch, heads and lengths are read from the arguments of each call.
    """
    sizes = shapes.symbolic()
    functions: dict[str, tvm.tirx.PrimFunc] = {}

    def add(name: str, expressions: list[te.Tensor], schedule: Callable[[Schedule], None]) -> None:
        sch = Schedule(relax_parameters(te.create_prim_func(expressions), STRIDED))
        schedule(sch)
        functions[name] = named(sch, name)

    for feature_map in gpu_features.FEATURE_MAPS:
        add(
            f"features_{feature_map}",
            gpu_features.features(config, sizes, feature_map),
            lambda sch: gpu.features(sch, config),
        )
    add("largest", gpu_weights.largest_bias(sizes), gpu.largest_bias)
    add("spectrum", gpu_weights.spectrum(config, sizes), lambda sch: gpu.spectrum(sch, config))
    add("attention", gpu_attention.fft_attention(config, sizes), lambda sch: gpu.fft_attention(sch, config))
    add("normalise", gpu_attention.normalise(config, sizes), lambda sch: gpu.normalise(sch, config))
    return Lowered(tvm.IRModule(functions), {"source": "default"})
