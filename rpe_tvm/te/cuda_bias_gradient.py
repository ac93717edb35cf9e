"""The gradient of the bias from what blocks of keys have summed up along diagonals: a sum in a fixed order."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import argument, function, let, named

THREADS = 128


def bias_gradient() -> tvm.tirx.PrimFunc:
    """Return the scheduled function `grad_bias(diagonals, n_query, n_key, causal, origin, grad_rpe_bias)` for CUDA.

    Arguments of the function: diagonals `[B, H, slots, width]` float32 as `te.cuda_backward_keys` writes it, offset t
    at index `origin + t`; n_query, n_key; causal 0 or 1; grad_rpe_bias `[H, n_q + n_k - 1]` float32, 0 for t > 0 where
    causal.
    """
    with function("grad_bias") as built:
        names = ("batch", "heads", "slots", "width", "offsets")
        batch, heads, slots, width, offsets = (named(name, T.int64()) for name in names)
        diagonals = argument("diagonals", (batch, heads, slots, width), "float32")
        n_query, n_key, causal, origin = (T.arg(name, T.int64()) for name in ("n_query", "n_key", "causal", "origin"))
        grad_bias = argument("grad_rpe_bias", (heads, offsets), "float32", align=4)
        with (
            T.launch_thread("blockIdx.x", (offsets + THREADS - 1) // THREADS) as block,
            T.launch_thread("blockIdx.y", heads) as h,
            T.launch_thread("threadIdx.x", THREADS) as thread,
        ):
            place = let("place", block * THREADS + thread)
            total = named("total", warp.registers(1, "float32"))
            with T.If(place < offsets), T.Then():
                T.buffer_store(total, T.float32(0), [0])
                seen = T.Or(causal == 0, place < n_query)
                with T.If(seen), T.Then(), T.serial(batch) as b, T.serial(slots) as slot:
                    T.buffer_store(total, total[0] + diagonals[b, h, slot, place + origin - n_query + 1], [0])
                T.buffer_store(grad_bias, total[0], [h, place])
    return built.get()
