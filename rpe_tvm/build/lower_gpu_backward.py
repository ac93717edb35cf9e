"""From a config to the scheduled functions of the gradients of attention on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build import lower_gpu
from rpe_tvm.build.device_code import BLOCKS_ATTRIBUTE, CALLS_ATTRIBUTE, RELOAD_ATTRIBUTE
from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules import gpu, gpu_gradients
from rpe_tvm.schedules import gpu_backward as schedules
from rpe_tvm.te import gpu_backward, gpu_backward_calls, shapes
from rpe_tvm.te import gpu_gradients as rows
from rpe_tvm.te.gpu_features import FEATURE_MAPS

# functions of attention
SHARED = ("features_prf", "features_nprf", "largest", "spectrum")
STRIDED = frozenset(("query", "key", "value", "grad_out", "out", "grad_q", "grad_k"))


def lower(config: GpuBackwardConfig) -> Lowered:
    """Return the functions `SHARED` as attention has them, and those of the gradients, scheduled.

    `denominators`, `channels`, `backward`, `value_sums`, `grad_value`, `correlation_sums`, `weight_sums` and `grad_bias`,
    which `gradients` calls; `grad_features_<map>`, and `backward_<map>`, which calls all.
    """
    sizes = shapes.symbolic()
    of_attention = lower_gpu.lower(config).mod
    functions = {name: of_attention[name] for name in SHARED}

    def add(name: str, expressions: list[te.Tensor], schedule: Callable[[Schedule], None]) -> None:
        sch = Schedule(relax_parameters(te.create_prim_func(expressions), STRIDED))
        schedule(sch)
        functions[name] = named(sch, name)

    add("denominators", gpu_backward.denominators(config, sizes), lambda sch: schedules.denominators(sch, config))
    add("channels", rows.channels(config, sizes), gpu_gradients.channels)
    add("backward", gpu_backward.fft_backward(config, sizes), lambda sch: schedules.fft_backward(sch, config))
    add("value_sums", gpu_backward.value_sums(config, sizes), lambda sch: gpu.fft_attention(sch, config))
    add("grad_value", rows.grad_value(config, sizes), gpu.normalise)
    add("correlation_sums", rows.correlation_sums(config, sizes), gpu_gradients.correlation_sums)
    add("weight_sums", rows.weight_sums(config, sizes), lambda sch: gpu_gradients.weight_sums(sch, config))
    add("grad_bias", rows.grad_bias(config, sizes), gpu_gradients.grad_bias)
    for name in FEATURE_MAPS:
        add(
            f"grad_features_{name}",
            rows.grad_features(config, sizes, name),
            lambda sch, name=name: gpu_gradients.grad_features(sch, config, name),
        )
    functions["backward"] = functions["backward"].with_attr(RELOAD_ATTRIBUTE, True)
    if config.blocks_per_sm:
        for name in ("backward", "value_sums"):
            functions[name] = functions[name].with_attr(BLOCKS_ATTRIBUTE, config.blocks_per_sm)
    calls = [gpu_backward_calls.gradients(config), *(gpu_backward_calls.backward(config, name) for name in FEATURE_MAPS)]
    functions |= {str(call.attrs["global_symbol"]): call.with_attr(CALLS_ATTRIBUTE, 1) for call in calls}
    return Lowered(tvm.IRModule(functions), {"source": "default"})
