"""Schedules of `te.gpu_long_backward`: as those of `te.gpu_long`, whose schedule of columns serves here, too."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.gpu import COMPOSITE
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.schedules import gpu
from rpe_tvm.schedules.gpu_backward import decompose, nest, sum_in_registers, two_sides
from rpe_tvm.schedules.gpu_long import columns_of, halves, into_registers


def rows(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_long_backward.rows`: a block of threads for each feature, parity and row."""
    results = {name: sch.get_sblock(name) for name in ("correlation", "of_grads", "of_values")}
    f, p, k1, c, s, q, pair = sch.get_loops(results["correlation"])
    sch.reorder(q, pair, c, s)
    for name in ("of_grads", "of_values"):
        pair, p, f, k1, s, q, c = sch.get_loops(results[name])
        sch.reorder(f, p, k1, q, pair, s, c)
    f, p, k1, q, pair = nest(sch, results, grid=3)
    gpu.bind_grid(sch, f, p, k1)
    sum_in_registers(sch, results["correlation"], q)
    two_sides(sch, config, pair, {"values": "values", "grads": "grads"})
    for name in ("of_grads", "of_values"):
        *loops, c = gpu.below(sch, results[name], pair)
        gpu.unroll(sch, loops)
        sch.vectorize(c)
    decompose(sch, results["correlation"], q, pair)


def dots(sch: Schedule, config: GpuBackwardConfig) -> None:
    """Schedule `te.gpu_long_backward.dots`: a thread has one column of a feature, and sums over pairs of channels."""
    grad_phi = sch.get_sblock("grad_phi")
    f, row, column, pair, parity = sch.get_loops(grad_phi)
    tile, thread = columns_of(sch, column)
    sch.reorder(f, tile, thread, pair, parity, row)
    gpu.bind_grid(sch, f, tile)
    sum_in_registers(sch, grad_phi, thread)
    into_registers(sch, sch.get_sblock("back"), parity)
    halves(sch, config, parity)
    entry = sch.get_sblock("column_first" if config.columns in COMPOSITE else "back")
    for reader, name in ((entry, "product"), (grad_phi, "channels")):
        load = sch.cache_read(reader, gpu.read_index(sch, reader, name), "local", [reader])
        into_registers(sch, load, parity, vectorized=True)
    sch.unroll(row)
    start = sch.decompose_reduction(grad_phi, pair)
    gpu.unroll(sch, gpu.below(sch, start, thread))
