"""From a config to the scheduled functions of the gradients of attention on a GPU."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build import lower_gpu
from rpe_tvm.build.device_code import RELOAD_ATTRIBUTE
from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules import gpu_backward as schedules
from rpe_tvm.te import gpu_backward, shapes

# functions of attention
SHARED = ("features_prf", "features_nprf", "largest", "spectrum")


def lower(config: GpuBackwardConfig) -> Lowered:
    """Return the functions `SHARED` as attention has them, and `attention`, `denominators` and `backward`, scheduled.

    `attention` is that of `config.of_values`, whose gradient it makes.
    """
    of_attention = lower_gpu.lower(config).mod
    functions = {name: of_attention[name] for name in SHARED}
    of_values = of_attention if config.of_values == config else lower_gpu.lower(config.of_values).mod
    functions["attention"] = of_values["attention"]
    for name, expressions, schedule in (
        ("denominators", gpu_backward.denominators, schedules.denominators),
        ("backward", gpu_backward.fft_backward, schedules.fft_backward),
    ):
        sch = Schedule(relax_parameters(te.create_prim_func(expressions(config, shapes.symbolic())), frozenset()))
        schedule(sch, config)
        functions[name] = named(sch, name)
    functions["backward"] = functions["backward"].with_attr(RELOAD_ATTRIBUTE, True)
    return Lowered(tvm.IRModule(functions), {"source": "default"})
