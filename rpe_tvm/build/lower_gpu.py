"""From a config to the scheduled functions of attention on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build.device_code import ALIGNED_ATTRIBUTE, BLOCKS_ATTRIBUTE
from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.lower_forward import forward_functions
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.schedules import gpu
from rpe_tvm.schedules import gpu_long as gpu_long_schedules
from rpe_tvm.te import gpu_attention, gpu_features, gpu_long, gpu_weights, shapes

STRIDED = frozenset(("query", "key", "value", "out"))


Function = tuple[str, list[te.Tensor], Callable[[Schedule, GpuAttentionConfig], None]]


def _short(config: GpuAttentionConfig, sizes: shapes.Sizes) -> list[Function]:
    return [
        ("spectrum", gpu_weights.spectrum(config, sizes), gpu.spectrum),
        ("attention", gpu_attention.fft_attention(config, sizes), gpu.fft_attention),
    ]


def _long(config: GpuAttentionConfig, sizes: shapes.Sizes) -> list[Function]:
    return [
        ("spectrum_columns", gpu_long.spectrum_columns(config, sizes), gpu_long_schedules.spectrum_columns),
        ("spectrum_rows", gpu_long.spectrum_rows(config, sizes), gpu_long_schedules.spectrum_rows),
        ("columns", gpu_long.columns(config, sizes), gpu_long_schedules.columns),
        ("rows", gpu_long.rows(config), gpu_long_schedules.rows),
        ("back_columns", gpu_long.back_columns(config), gpu_long_schedules.back_columns),
    ]


def _scheduled(
    schedule: Callable[[Schedule, GpuAttentionConfig], None], config: GpuAttentionConfig, sch: Schedule
) -> None:
    schedule(sch, config)


def _function(name: str, expressions: list[te.Tensor], schedule: Callable[[Schedule], None]) -> tvm.tirx.PrimFunc:
    sch = Schedule(relax_parameters(te.create_prim_func(expressions), STRIDED))
    schedule(sch)
    return named(sch, name)


def feature_functions(
    config: gpu_features.FeatureSizes, widest_row: int = gpu.WIDEST_ROW
) -> dict[str, tvm.tirx.PrimFunc]:
    """Return `features_prf` and `features_nprf`."""
    return {
        f"features_{feature_map}": _function(
            f"features_{feature_map}",
            gpu_features.features(config, shapes.symbolic(), feature_map),
            lambda sch: gpu.features(sch, config, widest_row),
        )
        for feature_map in gpu_features.FEATURE_MAPS
    }


def lower(config: GpuAttentionConfig, widest_row: int = gpu.WIDEST_ROW) -> Lowered:
    """Return the scheduled functions; `widest_row` as in `schedules.gpu.features`.

    `features_prf`, `features_nprf`, `largest`, `spectrum`, `attention` and `normalise`; where a transform does not
    fit into shared memory `spectrum_columns` and `spectrum_rows`, and `columns`, `rows` and `back_columns`. Batch,
    heads and lengths are read from the arguments of each call. Where one transform fits, `forward_prf` and
    `forward_nprf` call the others.
    """
    sizes = shapes.symbolic()
    functions = feature_functions(config, widest_row)

    def add(name: str, expressions: list[te.Tensor], schedule: Callable[[Schedule], None]) -> None:
        functions[name] = _function(name, expressions, schedule)

    add("largest", gpu_weights.largest_bias(sizes), gpu.largest_bias)
    for name, expressions, schedule in (_short if config.columns == 1 else _long)(config, sizes):
        add(name, expressions, functools.partial(_scheduled, schedule, config))
        if config.has_aligned_tables and name == "attention":
            functions[name] = functions[name].with_attr(ALIGNED_ATTRIBUTE, True)
        if config.blocks_per_sm and name in ("attention", "rows"):
            functions[name] = functions[name].with_attr(BLOCKS_ATTRIBUTE, config.blocks_per_sm)
    add("normalise", gpu_attention.normalise(config, sizes), gpu.normalise)
    if config.columns == 1:
        functions |= forward_functions(config)
    return Lowered(tvm.IRModule(functions), {"source": "default"})
