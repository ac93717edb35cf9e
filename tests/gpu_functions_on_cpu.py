"""Runs all functions of a GPU library on the CPU, called as the library's own: launches as their host code says.

Kernels are the generated CUDA source, see `cuda_on_cpu`; functions that call others are compiled, see `calls_on_cpu`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from calls_on_cpu import compile_calls  # noqa: E402
from cuda_on_cpu import compile_kernel  # noqa: E402

from rpe_tvm.runtime import launch_rules as sizes_by_rules


def functions_on_cpu(mod: Any, directory: Path) -> dict[str, Callable[..., None]]:
    """The functions of a module by name; they take torch tensors and integers."""
    import tvm
    import tvm_ffi
    from tvm.target import Target
    from tvm.tirx import get_default_tir_pipeline

    from rpe_tvm.build import launch_rules
    from rpe_tvm.build.device_code import CALLS_ATTRIBUTE

    functions = {str(each.attrs["global_symbol"]): each for each in mod.functions.values()}
    callers = {name: functions.pop(name) for name in [*functions] if CALLS_ATTRIBUTE in functions[name].attrs}
    target = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024}, host={"kind": "llvm"})
    lower, _, finish = get_default_tir_pipeline(target)
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):  # kernels take sizes by name
        lowered = lower(tvm.tirx.transform.BindTarget(target)(tvm.IRModule(functions)))
    hosts, kernels = {}, {}
    for name, function in lowered.functions_items():
        is_kernel = str(function.attrs["target"].kind.name) == "cuda"
        (kernels if is_kernel else hosts)[name if is_kernel else str(function.attrs["global_symbol"])] = function
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
        source = str(
            tvm_ffi.get_global_func("target.build.cuda")(finish()(tvm.IRModule(kernels)), target).inspect_source()
        )

    made: dict[str, Callable[..., None]] = {}
    with pytest.MonkeyPatch.context() as patch:
        # bytes of shared memory in the place of a third axis of threads, which no kernel has
        patch.setitem(launch_rules._AXES, "tirx.use_dyn_shared_memory", ("thread", 2))
        for name, function in functions.items():
            parameters = launch_rules.arguments_of(function)
            tensors = frozenset(each["name"] for each in parameters if "shape" in each)
            launches = launch_rules.kernels_of(hosts[f"__tvm_ffi_{name}"], tensors)
            assert launches
            made[name] = _function(name, parameters, launches, source, directory)
    for name, function in callers.items():
        made[name] = compile_calls(function, made, directory)
    return made


def _function(name: str, parameters: Any, launches: Any, source: str, directory: Path) -> Callable[..., None]:
    kernels = [compile_kernel(source, directory, launch["name"]) for launch in launches]

    def run(*arguments: Any) -> None:
        sizes: dict[str, Any] = sizes_by_rules.sizes_of(name, parameters, arguments)
        given = {each["name"]: x for each, x in zip(parameters, arguments, strict=True)}
        arrays = {each: x.numpy() for each, x in given.items() if isinstance(x, torch.Tensor)}
        for launch, kernel in zip(launches, kernels, strict=True):
            grid, threads = ([sizes_by_rules.value(rule, sizes) for rule in launch[kind]] for kind in ("grid", "block"))
            kernel(grid, threads[0], {**sizes, **arrays})

    return run
