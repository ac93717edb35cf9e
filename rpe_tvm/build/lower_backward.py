"""From a config to the scheduled functions of the gradients of attention."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.lower import Lowered, named, preparing_functions, tuned_function
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.build.workloads import STRIDED
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.schedules.cpu_schedules import CpuSchedules
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec
from rpe_tvm.te import shapes
from rpe_tvm.te.denominator_backward import fft_denominator_backward, fft_row_weights
from rpe_tvm.te.features import FEATURE_MAPS
from rpe_tvm.te.features_backward import features_backward

# What FFTs have beside `backward`: name in the library, tensor expressions, schedule.
_FFT = (
    ("row_weights", fft_row_weights, CpuSchedules.fft_row_weights),
    ("denominator_backward", fft_denominator_backward, CpuSchedules.fft_denominator_backward),
)


def lower(config: BackwardConfig, target: TargetSpec) -> Lowered:
    """Return the functions of `preparing_functions` and of the gradients by the config's algorithm, scheduled.

    Arguments are as of `lower.lower`.

    Features and weights are computed again, in the layout of this config: that of the forward pass may be another.
    """
    schedules = schedules_of(target.machine)
    functions = preparing_functions(config, schedules)
    for feature_map in FEATURE_MAPS:
        sch = _unscheduled(features_backward(config, shapes.symbolic(), feature_map))
        schedules.features_backward(sch, config, feature_map)
        functions[f"features_{feature_map}_backward"] = named(sch, f"features_{feature_map}_backward")
    for name, expressions, apply in () if config.algorithm == "direct" else _FFT:
        sch = _unscheduled(expressions(config, shapes.symbolic()))
        apply(schedules, sch, config)
        functions[name] = named(sch, name)
    functions["backward"], schedule = tuned_function(config, target)
    return Lowered(tvm.IRModule(functions), schedule)


def _unscheduled(arguments: list[te.Tensor]) -> Schedule:
    return Schedule(relax_parameters(te.create_prim_func(arguments), STRIDED))
