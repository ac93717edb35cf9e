"""The functions that are tuned: one for each operator, with symbolic sizes to compile, with constant ones to search."""

from __future__ import annotations

import tvm
from tvm import te

from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.te import shapes
from rpe_tvm.te.direct_attention import direct_attention
from rpe_tvm.te.direct_backward import direct_backward
from rpe_tvm.te.fft_attention import fft_attention
from rpe_tvm.te.fft_backward import fft_backward
from rpe_tvm.te.panel_attention import panel_attention

TUNING_HEADS = 4
STRIDED = frozenset(("x", "value", "grad", "grad_out", "out", "grad_value"))

# operators with tuning logs -> their config
TUNED: dict[str, type[AttentionConfig]] = {kind.op: kind for kind in (AttentionConfig, BackwardConfig)}


def function_of(config: AttentionConfig, sizes: shapes.Sizes) -> tvm.tirx.PrimFunc:
    """Return the unscheduled function `attention` or `backward` of a config."""
    if isinstance(config, BackwardConfig):
        arguments = (direct_backward if config.algorithm == "direct" else fft_backward)(config, sizes)
    else:
        direct = panel_attention if config.panel else direct_attention
        arguments = (direct if config.algorithm == "direct" else fft_attention)(config, sizes)
    return relax_parameters(te.create_prim_func(arguments), STRIDED if sizes.is_symbolic else frozenset())


def tuning_workload(config: AttentionConfig) -> tvm.tirx.PrimFunc:
    """Return the function of constant sizes that MetaSchedule tunes: batch 1, four heads, a full bucket."""
    return function_of(config, shapes.fixed(config, 1, TUNING_HEADS))
