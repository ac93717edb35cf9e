"""Compiles for CPUs; on ARM and with AVX2 the halves of composite butterflies stay in registers.

TVM takes memory for every small array from the heap and lets arrays share it, so LLVM has to store what they held last
after the loop: it keeps all of it in registers until there, and spills. An array on the stack that shares its memory
with no other one is gone in the first pass of LLVM. AVX-512 has 32 registers, and its records were measured without
this, so it does without.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock, Schedule

from rpe_tvm.targets import has_avx512

DEFAULT = "default"  # TVM's own pipeline
_ON_THE_STACK = "rpe_tvm_on_the_stack"


def pipeline_of(target: tvm.target.Target) -> str:
    """Return the name of the pipeline by which `compile_for` lowers functions for a target."""
    return DEFAULT if target.kind.name != "llvm" or has_avx512(target) else _ON_THE_STACK


def compile_for(mod: tvm.IRModule, target: tvm.target.Target) -> Any:
    """Compile scheduled functions and return the runtime module.

    Parameters
    ----------
    mod : tvm.IRModule
        Scheduled PrimFuncs.
    target : tvm.target.Target
        A CPU.
    """
    pipeline = pipeline_of(target)
    if pipeline != DEFAULT:
        mod = _with_local_halves(mod)
    return tvm.compile(mod, target, tir_pipeline=pipeline).mod


def _with_local_halves(mod: tvm.IRModule) -> tvm.IRModule:
    """Give the arrays `<stage>_first` of `te.dft` the scope `local`: arrays share memory only within a scope."""
    sch = Schedule(mod)
    for variable, function in mod.functions_items():
        sch.work_on(variable.name_hint)
        for block in _block_names(function):
            if block.endswith("_first"):
                sch.set_scope(sch.get_sblock(block), 0, "local")
    return sch.mod


def _block_names(function: tirx.PrimFunc) -> list[str]:
    names: list[str] = []
    tvm_ffi.structural_walk(function.body, (SBlock, lambda block: names.append(str(block.name_hint))))
    return names


def _on_the_stack(statement: tirx.AllocBuffer) -> tirx.AllocBuffer:
    """Keep TVM from turning a local array into an allocation."""
    if statement.buffer.scope() != "local":
        return statement
    return tirx.AllocBuffer(statement.buffer, {"disable_lower_builtin": tirx.const(1, "int32")})


def _make_pipeline() -> tuple[Any, Any, Any]:
    lower, finish_host, finish_device = tirx.get_tir_pipeline(DEFAULT)

    def lower_to_the_stack(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        functions = {
            name: function.with_body(tvm_ffi.structural_map(function.body, (tirx.AllocBuffer, _on_the_stack)))
            for name, function in lower(mod).functions.items()
        }
        return tvm.IRModule(functions, attrs=mod.attrs)

    return tvm.transform.module_pass(lower_to_the_stack, opt_level=0), finish_host, finish_device


tirx.compilation_pipeline.register_tir_pipeline(_ON_THE_STACK, _make_pipeline)
