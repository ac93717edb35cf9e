"""Small functions with a schedule for GPUs, so that building and loading are tested apart from the real kernels."""

from __future__ import annotations

from typing import Any

from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.runtime.gpu_operator import function_names

CONFIG = GpuAttentionConfig(3, 8, 64, (8, 8), 32)

# y = 4 x reversed in rows, through shared memory; with more than 64 floats of that, values mean nothing.
_FUNCTION = """
    @T.prim_func(s_tir=True)
    def NAME(x_: T.handle, y_: T.handle):
        T.func_attr({"global_symbol": "NAME", "tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, 64), "float32", align=4)
        y = T.match_buffer(y_, (n, 64), "float32", align=4)
        with T.sblock("root"):
            row = T.sblock_alloc_buffer((n, SHARED), "float32", scope="shared.dyn")
            for i in T.thread_binding(n, thread="blockIdx.x"):
                for j in T.thread_binding(64, thread="threadIdx.x"):
                    with T.sblock("row"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        row[vi, vj] = x[vi, vj] * T.float32(2)
                for j in T.thread_binding(64, thread="threadIdx.x"):
                    with T.sblock("y"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        y[vi, vj] = row[vi, SHARED - 1 - vj] + row[vi, 63 - vj]
"""


def module(*names: str, shared: int = 64) -> Any:
    """A module of functions of these names; a block has `shared` floats of shared memory."""
    import tvm

    functions = "".join(_FUNCTION.replace("NAME", name).replace("SHARED", str(shared)) for name in names)
    return tvm.script.from_source(f"@I.ir_module\nclass Module:{functions}")


def operator() -> Any:
    """A module with the names of the functions of attention, which goes with `CONFIG`."""
    return module(*function_names(CONFIG))
