"""From a config to the scheduled functions of one operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import te
from tvm.s_tir import Schedule

from rpe_tvm.build import records
from rpe_tvm.build.finish import finish
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.build.tile_ends import end_features
from rpe_tvm.build.workloads import STRIDED, function_of, tuning_workload
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.cpu_schedules import CpuSchedules
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec
from rpe_tvm.te import shapes
from rpe_tvm.te.features import FEATURE_MAPS, features
from rpe_tvm.te.weights import direct_weights, fft_weights


@dataclass(frozen=True)
class Lowered:
    """Scheduled functions, and where their schedule comes from ("tuned" with its record, or "default")."""

    mod: tvm.IRModule
    schedule: Mapping[str, Any]


def preparing_functions(config: AttentionConfig, schedules: CpuSchedules) -> dict[str, tvm.tirx.PrimFunc]:
    """Return the functions `features_prf`, `features_nprf` and `weights` in the layout of a config, scheduled."""
    functions: dict[str, tvm.tirx.PrimFunc] = {}
    for feature_map in FEATURE_MAPS:
        arguments = te.create_prim_func(features(config, shapes.symbolic(), feature_map))
        sch = Schedule(relax_parameters(arguments, STRIDED))
        schedules.features(sch, config)
        function = named(sch, f"features_{feature_map}")
        functions[f"features_{feature_map}"] = end_features(function) if config.algorithm == "direct" else function
    weights = (direct_weights if config.algorithm == "direct" else fft_weights)(config, shapes.symbolic())
    sch = Schedule(relax_parameters(te.create_prim_func(weights), frozenset()))
    schedules.weights(sch, config)
    functions["weights"] = named(sch, "weights")
    return functions


def named(sch: Schedule, name: str) -> tvm.tirx.PrimFunc:
    """Return a scheduled function under its name in the library."""
    return sch.mod["main"].with_attr("global_symbol", name)


def lower(config: AttentionConfig, target: TargetSpec) -> Lowered:
    """Return the functions `features_prf`, `features_nprf`, `weights` and `attention`, scheduled.

    Batch, heads and lengths are read from the arguments of each call. The attention function follows the tuned record
    of `config` for this target if one is shipped, else the default schedule.

    Parameters
    ----------
    config : AttentionConfig
        What to compute.
    target : TargetSpec
        For which CPU.
    """
    functions = preparing_functions(config, schedules_of(target.machine))
    functions["attention"], schedule = tuned_function(config, target)
    return Lowered(tvm.IRModule(functions), schedule)


def tuned_function(config: AttentionConfig, target: TargetSpec) -> tuple[tvm.tirx.PrimFunc, Mapping[str, Any]]:
    """Return the function named as the config's operator, scheduled, and where its schedule comes from."""
    sch = Schedule(function_of(config, shapes.symbolic()))
    record = records.find(config, target.id, tuning_workload)
    if record is None:
        schedules_of(target.machine).default(sch, config)
        return finish(named(sch, config.op)), {"source": "default"}
    record.replay(sch)
    return finish(named(sch, config.op)), {"source": "tuned", **record.provenance}
