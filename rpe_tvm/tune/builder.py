"""Builds candidates in worker processes that import tvm once and none of its tensor intrinsics."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from rpe_tvm.build import link
from rpe_tvm.build.finish import finish
from rpe_tvm.build.stack_arrays import compile_for

BUILD_TIMEOUT = 180.0


def build_function(mod: tvm.IRModule, target: tvm.target.Target) -> Any:
    """Compile a scheduled module; workers call it by reference."""
    return compile_for(tvm.IRModule({"main": finish(mod["main"])}), target)


def export_function(module: Any, machine: str = "") -> str:
    """Link a module compiled for `machine` with our hooks, as operators are, into a library of its own directory."""
    directory = Path(tempfile.mkdtemp(prefix="rpe_tvm_candidate_"))
    code = directory / "code.o"
    module.write_to_file(str(code))
    library = directory / "lib.so"
    link.link(code, library, machine)
    return str(library)


def _build(mod: tvm.IRModule, target: tvm.target.Target, _params: Any) -> Any:
    return build_function(mod, target)


def local_builder(workers: int | None = None, machine: str = "") -> ms.builder.Builder:
    """Return MetaSchedule's builder with our build and link functions; candidates are linked for `machine`."""
    return ms.builder.LocalBuilder(
        max_workers=workers or os.cpu_count() or 1,
        timeout_sec=BUILD_TIMEOUT,
        f_build=_build,
        f_export=functools.partial(export_function, machine=machine),
    )


def build_schedules(
    schedules: Sequence[Schedule], target: tvm.target.Target, workers: int | None = None, machine: str = ""
) -> list[Path | str]:
    """Compile scheduled functions and return for each its library, or the error's text."""
    mods = [tvm.IRModule({"main": sch.mod["main"].with_attr("global_symbol", "main")}) for sch in schedules]
    built = local_builder(workers, machine).build([ms.builder.BuilderInput(mod, target) for mod in mods])
    return [str(each.error_msg) if each.error_msg else Path(str(each.artifact_path)) for each in built]
