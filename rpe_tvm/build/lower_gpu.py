"""From a config to the scheduled functions of attention on GPUs."""

from __future__ import annotations

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.schedules import gpu
from rpe_tvm.te import gpu_attention, shapes

STRIDED = frozenset(("query", "key", "value", "out"))


def lower(config: GpuAttentionConfig) -> Lowered:
    """Return the functions of `rpe_tvm.runtime.gpu_operator`, scheduled; sizes are read from the arguments."""
    functions: dict[str, tvm.tirx.PrimFunc] = {}
    for name, expressions, schedule in (("attention", gpu_attention.fft_attention, gpu.fft_attention),):
        sch = Schedule(relax_parameters(te.create_prim_func(expressions(config, shapes.symbolic())), STRIDED))
        schedule(sch, config)
        functions[name] = named(sch, name)
    return Lowered(tvm.IRModule(functions), {"source": "default"})
