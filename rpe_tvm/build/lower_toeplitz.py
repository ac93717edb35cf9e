"""From a config to the scheduled functions of a Toeplitz product."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.lower import Lowered
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec
from rpe_tvm.te import shapes
from rpe_tvm.te.toeplitz_matmul import toeplitz_correlation, toeplitz_matmul
from rpe_tvm.te.weights import plain_weights

STRIDED = frozenset(("x", "grad", "out"))


def lower(config: ToeplitzConfig, target: TargetSpec) -> Lowered:
    """Return the functions `weights`, `matmul` and `correlation`, scheduled.

    Batch, heads and lengths are read from the arguments of each call. There is one schedule for each kind of CPU: what
    it could decide made no clear difference on znver4.
    """
    schedules = schedules_of(target.machine)
    functions: dict[str, tvm.tirx.PrimFunc] = {}
    for name, expressions, schedule in (
        ("weights", plain_weights, schedules.plain_weights),
        ("matmul", toeplitz_matmul, schedules.toeplitz_matmul),
        ("correlation", toeplitz_correlation, schedules.toeplitz_correlation),
    ):
        sch = Schedule(relax_parameters(te.create_prim_func(expressions(config, shapes.symbolic())), STRIDED))
        schedule(sch, config)
        functions[name] = sch.mod["main"].with_attr("global_symbol", name)
    return Lowered(tvm.IRModule(functions), {"source": "fixed"})
