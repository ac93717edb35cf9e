"""From rpe_bias to the table of Toeplitz weights on a GPU: every block finds the maximum of a head, and fills a part.

c[t] = exp(b[t] - max b), t = j - i, for -(n_q - 1) <= t <= n_k - 1; zero elsewhere and, where causal, for t > 0.
Subtracting the largest allowed b of a head cancels between numerator and denominator.
Source: Luo et al. 2021, Eqs. 11-13.
"""

from __future__ import annotations

import math

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct import WARP
from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, blocks_at_once, function, let, named
from rpe_tvm.te.cuda_warp import Expr

WARPS = 32
LOADS = 8
PART = LOADS * WARP * WARPS  # offsets of one block


def direct_weights() -> tvm.tirx.PrimFunc:
    """Return the scheduled function `weights(rpe_bias, n_query, n_key, causal, origin, table)` for CUDA.

    Arguments of the function: rpe_bias `[H, n_q + n_k - 1]` float32; n_query, n_key; causal 0 or 1; table `[H, width]`
    float32, whose entry `origin + t` becomes c[t]: `origin` is n_q rounded up to tiles, see `plan.gpu_direct`.
    """
    with function("weights") as built:
        heads, offsets, width = (named(name, T.int64()) for name in ("heads", "offsets", "width"))
        bias = argument("rpe_bias", (heads, offsets), "float32", align=4)
        n_query, n_key, causal, origin = (T.arg(name, T.int64()) for name in ("n_query", "n_key", "causal", "origin"))
        table = argument("table", (heads, width), "float32")
        with (
            T.launch_thread("blockIdx.x", (width + PART - 1) // PART) as part,
            T.launch_thread("blockIdx.y", heads) as h,
            T.launch_thread("threadIdx.x", WARP * WARPS) as thread,
            blocks_at_once(1),
        ):
            largest = named("largest", warp.registers(1, "float32"))
            T.buffer_store(largest, T.float32(-math.inf), [0])
            allowed = let("allowed", T.Select(causal != 0, n_query, offsets))
            with T.serial((allowed + PART - 1) // PART) as turn:
                for offset in _places(turn, thread):
                    with T.If(offset < allowed), T.Then():
                        # NaN is left to exp(): the maximum drops it
                        T.buffer_store(largest, T.max(largest[0], bias[h, offset]), [0])
            shared = T.alloc_buffer((WARPS,), "float32", scope="shared")
            warp.warp_max(largest, 0)
            T.buffer_store(shared, largest[0], [thread // WARP])
            T.buffer_store(largest, shared[thread % WARP], [0])
            warp.warp_max(largest, 0)
            values = named("values", warp.registers(LOADS, "float32"))
            for i, place in enumerate(_places(part, thread)):
                with T.If(_exists(place - origin, n_query, n_key, causal)), T.Then():
                    T.buffer_store(values, bias[h, place - origin + n_query - 1], [i])
            for i, place in enumerate(_places(part, thread)):
                exists = _exists(place - origin, n_query, n_key, causal)
                weight = T.Select(exists, T.exp(values[i] - largest[0]), T.float32(0))
                with T.If(place < width), T.Then():
                    T.buffer_store(table, weight, [h, place])
    return built.get()


def _places(part: Expr, thread: Expr) -> list[Expr]:
    """Return the places of one thread in a part: their loads are on the way at the same time."""
    return [part * PART + i * (WARP * WARPS) + thread for i in range(LOADS)]


def _exists(t: Expr, n_query: Expr, n_key: Expr, causal: Expr) -> Expr:
    return T.And(T.And(t > -n_query, t < n_key), T.Or(causal == 0, t <= 0))
