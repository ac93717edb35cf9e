"""From a config to the scheduled functions of the gradients of attention on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build import lower_gpu
from rpe_tvm.build.device_code import ALIGNED_ATTRIBUTE, BLOCKS_ATTRIBUTE, CALLS_ATTRIBUTE, RELOAD_ATTRIBUTE
from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules import gpu, gpu_gradients, gpu_long
from rpe_tvm.schedules import gpu_backward as schedules
from rpe_tvm.schedules import gpu_joint_backward as joint
from rpe_tvm.schedules import gpu_long_backward as gpu_long_backward_schedules
from rpe_tvm.te import gpu_backward, gpu_backward_calls, gpu_joint_backward, gpu_long_backward, shapes
from rpe_tvm.te import gpu_gradients as rows
from rpe_tvm.te.gpu_features import FEATURE_MAPS

# functions of attention, where a transform fits into shared memory, and where columns and rows take turns
SHORT = ("features_prf", "features_nprf", "largest", "spectrum")
LONG = (*SHORT[:3], "spectrum_columns", "spectrum_rows", "columns", "rows", "back_columns")
STRIDED = frozenset(("query", "key", "value", "grad_out", "out", "grad_q", "grad_k"))

Function = tuple[str, list[te.Tensor], Callable[[Schedule], None]]


def lower(config: GpuBackwardConfig) -> Lowered:
    """Return functions as attention has them, and those of the gradients, scheduled.

    `channels`, `grad_value` and `grad_features_<map>`; where a transform fits into shared memory `denominators`,
    `backward`, `value_sums`, `correlation_sums`, `weight_sums` and `grad_bias`, and the functions `gradients` and
    `backward_<map>`, which call the others; else `columns_backward`, `rows_backward` and `dots_backward`.
    """
    of_attention = lower_gpu.lower(config).mod
    functions = {name: of_attention[name] for name in (SHORT if config.columns == 1 else LONG)}
    for name, expressions, schedule in _rows(config) + (_short if config.columns == 1 else _long)(config):
        sch = Schedule(relax_parameters(te.create_prim_func(expressions), STRIDED))
        schedule(sch)
        functions[name] = named(sch, name)
    name = "backward" if config.columns == 1 else "rows_backward"
    functions[name] = functions[name].with_attr(RELOAD_ATTRIBUTE, True)
    for name in {"backward", "value_sums", "rows_backward"} & {*functions}:
        if name != "value_sums" or config.has_aligned_tables:
            functions[name] = functions[name].with_attr(ALIGNED_ATTRIBUTE, True)
        blocks = config.blocks_of_sums if name == "value_sums" else config.blocks_per_sm
        if blocks:
            functions[name] = functions[name].with_attr(BLOCKS_ATTRIBUTE, blocks)
    if config.columns == 1:
        calls = [gpu_backward_calls.gradients(config)]
        calls += [gpu_backward_calls.backward(config, feature_map) for feature_map in FEATURE_MAPS]
        functions |= {str(call.attrs["global_symbol"]): call.with_attr(CALLS_ATTRIBUTE, 1) for call in calls}
    return Lowered(tvm.IRModule(functions), {"source": "default"})


def _rows(config: GpuBackwardConfig) -> list[Function]:
    sizes = shapes.symbolic()
    found: list[Function] = [
        ("channels", rows.channels(config, sizes), gpu_gradients.channels),
        ("grad_value", rows.grad_value(config, sizes), gpu.normalise),
    ]
    for feature_map in FEATURE_MAPS:
        schedule = functools.partial(_with, gpu_gradients.grad_features, config, feature_map)
        found.append((f"grad_features_{feature_map}", rows.grad_features(config, sizes, feature_map), schedule))
    return found


def _short(config: GpuBackwardConfig) -> list[Function]:
    sizes = shapes.symbolic()

    def of_config(schedule: Callable[..., None]) -> Callable[[Schedule], None]:
        return functools.partial(_with, schedule, config)

    kernel, schedule = (gpu_joint_backward, joint) if config.sides_together else (gpu_backward, schedules)
    return [
        ("denominators", gpu_backward.denominators(config, sizes), of_config(schedules.denominators)),
        ("backward", kernel.fft_backward(config, sizes), of_config(schedule.fft_backward)),
        ("value_sums", gpu_backward.value_sums(config, sizes), of_config(gpu.fft_attention)),
        ("correlation_sums", rows.correlation_sums(config, sizes), gpu_gradients.correlation_sums),
        ("weight_sums", rows.weight_sums(config, sizes), of_config(gpu_gradients.weight_sums)),
        ("grad_bias", rows.grad_bias(config, sizes), gpu_gradients.grad_bias),
    ]


def _long(config: GpuBackwardConfig) -> list[Function]:
    def of_config(schedule: Callable[..., None]) -> Callable[[Schedule], None]:
        return functools.partial(_with, schedule, config)

    return [
        ("columns_backward", gpu_long_backward.columns(config), of_config(gpu_long.columns)),
        ("rows_backward", gpu_long_backward.rows(config), of_config(gpu_long_backward_schedules.rows)),
        ("dots_backward", gpu_long_backward.dots(config), of_config(gpu_long_backward_schedules.dots)),
    ]


def _with(schedule: Callable[..., None], config: GpuBackwardConfig, *more: str | Schedule) -> None:
    *names, sch = more
    schedule(sch, config, *names)
