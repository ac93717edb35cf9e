"""From a config to the scheduled functions of the gradients of attention."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.lower import Lowered, named, preparing_functions
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.schedules import x86
from rpe_tvm.te import shapes
from rpe_tvm.te.denominator import direct_denominator, fft_denominator
from rpe_tvm.te.direct_backward import direct_backward
from rpe_tvm.te.feature_gradients import feature_gradients
from rpe_tvm.te.features import FEATURE_MAPS
from rpe_tvm.te.fft_backward import fft_backward, fft_denominator_backward

STRIDED = frozenset(("x", "value", "grad", "grad_value"))

# Name in the library, tensor expressions, schedule.
_DIRECT = (
    ("denominator", direct_denominator, x86.direct_denominator),
    ("backward", direct_backward, x86.direct_backward),
)
_FFT = (
    ("denominator", fft_denominator, x86.fft_denominator),
    ("backward", fft_backward, x86.fft_backward),
    ("denominator_backward", fft_denominator_backward, x86.fft_denominator_backward),
)


def lower(config: BackwardConfig) -> Lowered:
    """Return the functions of `preparing_functions` and of the gradients by the config's algorithm, scheduled.

    Features and weights are computed again, in the layout of this config: that of the forward pass may be another.
    `direct` has the gradients of the feature maps, too.
    """
    is_direct = config.algorithm == "direct"
    functions = preparing_functions(config)
    for name, expressions, schedule in _DIRECT if is_direct else _FFT:
        sch = _unscheduled(expressions(config, shapes.symbolic()))
        schedule(sch, config)
        functions[name] = named(sch, name)
    for feature_map in FEATURE_MAPS if is_direct else ():
        sch = _unscheduled(feature_gradients(config, shapes.symbolic(), feature_map))
        x86.feature_gradients(sch, config, feature_map)
        functions[f"feature_gradients_{feature_map}"] = named(sch, f"feature_gradients_{feature_map}")
    return Lowered(tvm.IRModule(functions), {"source": "default"})


def _unscheduled(arguments: list[te.Tensor]) -> Schedule:
    return Schedule(relax_parameters(te.create_prim_func(arguments), STRIDED))
