"""A whole Toeplitz product on a GPU as one function of the host, as `te.gpu_forward` has attention."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan import gpu, gpu_buffers
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.te.cuda_function import argument, function, named
from rpe_tvm.te.gpu_forward import FLOAT_BYTES, call


def matmul(config: GpuToeplitzConfig) -> tvm.tirx.PrimFunc:
    """Return the function `matmul(weights, x, tables, spectrum, out)`, for a config without columns.

    Arguments of the function: weights `[H, n_out + n - 1]`; x `[B, H, n, d]`, as `te.gpu_toeplitz.whole_pairs_of` has
    it, and out `[B, H, n_out, d]`, the last axis contiguous; tables as in `plan.gpu`; spectrum, memory of the shape
    that `plan.gpu_buffers.spectrum` says.
    """
    with function("matmul") as built:
        batch, heads, n_out, n = (named(x, T.int64()) for x in ("batch", "heads", "n_out", "n"))

        def compact(name: str, *shape: Any) -> Any:
            return argument(name, shape, "float32", align=FLOAT_BYTES)

        def rows(name: str, count: Any, columns: int, dtype: str) -> Any:
            shape = (batch, heads, count, T.int64(columns))
            return argument(name, shape, dtype, strided=True, align=FLOAT_BYTES)

        d = config.head_dim
        weights = compact("weights", heads, n_out + n - 1)
        x = rows("x", n, d, "float32") if d % 2 else rows("x", n, config.pairs, "int64")
        tables = compact("tables", T.int64(gpu.layout(config).size))
        spectrum = compact("spectrum", heads, *map(T.int64, gpu_buffers.spectrum(config, 1)[1:]))
        out = rows("out", n_out, d, "float32")
        call("spectrum", weights, n_out, n, tables, spectrum)
        call("product", x, spectrum, tables, n_out, out)
    return built.get()
