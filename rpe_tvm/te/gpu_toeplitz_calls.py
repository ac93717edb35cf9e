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

    Arguments of the function: weights `[H, n_out + n - 1]`; x `[B, H, n, d]` and out `[B, H, n_out, d]`, as
    `te.gpu_toeplitz.whole_pairs_of` has them, the last axis contiguous; tables as in `plan.gpu`; spectrum, memory of
    the shape that `plan.gpu_buffers.spectrum` says.
    """
    with function("matmul") as built:
        batch, heads, n_out, n = (named(x, T.int64()) for x in ("batch", "heads", "n_out", "n"))

        def compact(name: str, *shape: Any) -> Any:
            return argument(name, shape, "float32", align=FLOAT_BYTES)

        def rows(name: str, count: Any) -> Any:
            d = config.head_dim
            dtype, columns = ("float32", d) if d % 2 else ("int64", config.pairs)
            return argument(name, (batch, heads, count, T.int64(columns)), dtype, strided=True, align=FLOAT_BYTES)

        weights, x = compact("weights", heads, n_out + n - 1), rows("x", n)
        tables = compact("tables", T.int64(gpu.layout(config).size))
        spectrum = compact("spectrum", heads, *map(T.int64, gpu_buffers.spectrum(config, 1)[1:]))
        out = rows("out", n_out)
        call("spectrum", weights, n_out, n, tables, spectrum)
        call("product", x, spectrum, tables, n_out, out)
    return built.get()
