"""From a config to the scheduled functions of a Toeplitz product on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import te
from tvm.s_tir import Schedule
from tvm.s_tir import transform as s_tir
from tvm.tirx.transform import StmtSimplify

from rpe_tvm.build.device_code import ALIGNED_ATTRIBUTE, BLOCKS_ATTRIBUTE, CALLS_ATTRIBUTE
from rpe_tvm.build.lower import Lowered, named
from rpe_tvm.build.lower_toeplitz import STRIDED
from rpe_tvm.build.parameters import relax_parameters
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.schedules import gpu, gpu_long, gpu_long_toeplitz, gpu_toeplitz
from rpe_tvm.te import gpu_long as te_gpu_long
from rpe_tvm.te import gpu_long_toeplitz as te_gpu_long_toeplitz
from rpe_tvm.te import gpu_toeplitz as te_gpu_toeplitz
from rpe_tvm.te import gpu_toeplitz_calls, shapes

Function = tuple[str, list[te.Tensor], Callable[[Schedule, GpuToeplitzConfig], None]]


def lower(config: GpuToeplitzConfig) -> Lowered:
    """Return the scheduled functions.

    Where a transform fits into shared memory `spectrum`, `product`, `correlation`, and `matmul`, which calls the first
    two; else `spectrum_columns` and `spectrum_rows`, `columns`, `rows` and `back_columns`, and `correlation_rows`.
    Batch, heads and lengths are read from the arguments of each call.
    """
    functions: dict[str, tvm.tirx.PrimFunc] = {}
    for name, expressions, schedule in (_short if config.columns == 1 else _long)(config):
        sch = Schedule(relax_parameters(te.create_prim_func(expressions), STRIDED))
        schedule(sch, config)
        functions[name] = _with_plain_indices(named(sch, name))
    if config.columns == 1:
        if config.has_aligned_tables:
            functions["product"] = functions["product"].with_attr(ALIGNED_ATTRIBUTE, True)
        if config.blocks_per_sm:
            functions["product"] = functions["product"].with_attr(BLOCKS_ATTRIBUTE, config.blocks_per_sm)
        functions["matmul"] = gpu_toeplitz_calls.matmul(config).with_attr(CALLS_ATTRIBUTE, 1)
    return Lowered(tvm.IRModule(functions), {"source": "default"})


def _short(config: GpuToeplitzConfig) -> list[Function]:
    sizes = shapes.symbolic()
    return [
        ("spectrum", te_gpu_toeplitz.spectrum(config, sizes), gpu.spectrum),
        ("product", te_gpu_toeplitz.product(config, sizes), gpu_toeplitz.product),
        ("correlation", te_gpu_toeplitz.correlation(config, sizes), gpu_toeplitz.correlation),
    ]


def _long(config: GpuToeplitzConfig) -> list[Function]:
    sizes, expressions, schedules = shapes.symbolic(), te_gpu_long_toeplitz, gpu_long_toeplitz
    return [
        ("spectrum_columns", expressions.spectrum_columns(config, sizes), gpu_long.spectrum_columns),
        ("spectrum_rows", te_gpu_long.spectrum_rows(config, sizes), gpu_long.spectrum_rows),
        ("columns", expressions.columns(config, sizes), schedules.columns),
        ("rows", expressions.rows(config), gpu_long.rows),
        ("back_columns", expressions.back_columns(config, sizes), schedules.back_columns),
        ("correlation_rows", expressions.correlation_rows(config), schedules.correlation_rows),
    ]


def _with_plain_indices(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return the function lowered so far that indices are simplified before buffers are cut to what a thread uses.

    TVM cuts before it simplifies: sums that are read at i // rest and i % rest would stay arrays of whole blocks.
    """
    passes = [
        s_tir.LowerInitBlock(),
        s_tir.PlanAndUpdateBufferAllocationLocation(),
        s_tir.ConvertBlocksToOpaque(),
        StmtSimplify(),
    ]
    name = str(function.attrs["global_symbol"])
    return tvm.ir.transform.Sequential(passes)(tvm.IRModule({name: function}))[name]
