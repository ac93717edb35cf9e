"""All gradients on tensor cores as one function of the host, which calls those that launch kernels.

Why: see `te.gpu_forward`.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_workspace import places
from rpe_tvm.te.cuda_function import argument, function, named
from rpe_tvm.te.gpu_forward import FLOAT_BYTES, call, piece


def backward(config: TensorCoreBackwardConfig, feature_map: str) -> tvm.tirx.PrimFunc:
    """Return the function `backward_<map>(query, key, value, rpe_bias, projection, out, grad_out, denominators, known,
    causal, of_projection, blocks_q, blocks_k, workspace, diagonals, grad_query, grad_key, grad_value, grad_rpe_bias)`.

    Arguments of the function: query, out, grad_out and grad_query `[B, H, n_q, d]`, key, value, grad_key and
    grad_value `[B, H, n_k, d]`, in the config's dtype, with any strides that are multiples of 8, at addresses that are
    multiples of 16 bytes, the last axis contiguous; rpe_bias and grad_rpe_bias `[H, n_q + n_k - 1]` and projection
    `[m, d]` float32; denominators `[B, H, n_q]` float32 of the forward pass if known is 1, any numbers if it is 0;
    causal 0 or 1; of_projection 0 or 1: whether `exponent_q` and `exponent_k` are written; blocks_q and blocks_k: n_q
    and n_k in units of `positions`, rounded up; workspace bytes, as many as `plan.gpu_workspace` says; diagonals
    float32 as `plan.gpu_direct_backward.diagonals_shape` says.
    """
    with function(f"backward_{feature_map}") as built:
        batch, heads, n_q, n_k, size = (named(x, T.int64()) for x in ("batch", "heads", "n_query", "n_key", "size"))
        d = T.int64(config.head_dim)

        def rows(name: str, n: Any) -> Any:
            return argument(name, (batch, heads, n, d), config.dtype, strided=True, align=1)

        def compact(name: str, *shape: Any) -> Any:
            return argument(name, shape, "float32", align=FLOAT_BYTES)

        query, key, value = rows("query", n_q), rows("key", n_k), rows("value", n_k)
        bias = compact("rpe_bias", heads, n_q + n_k - 1)
        projection = compact("projection", T.int64(config.num_features), d)
        out, grad_out = rows("out", n_q), rows("grad_out", n_q)
        denominators = compact("denominators", batch, heads, n_q)
        flags = ("known", "causal", "of_projection", "blocks_q", "blocks_k")
        known, causal, of_projection, blocks_q, blocks_k = (T.arg(name, T.int64()) for name in flags)
        workspace = argument("workspace", (size,), "uint8")
        slots, width = named("slots", T.int64()), named("width", T.int64())
        diagonals = argument("diagonals", (batch, heads, slots, width), "float32")
        grad_query, grad_key, grad_value = rows("grad_query", n_q), rows("grad_key", n_k), rows("grad_value", n_k)
        grad_bias = compact("grad_rpe_bias", heads, n_q + n_k - 1)

        rows_q, rows_k = (blocks * config.positions for blocks in (blocks_q, blocks_k))
        found, _ = places(config, batch, heads, rows_q, rows_k)
        buffer = {name: piece(workspace, place, place.shape) for name, place in found.items()}
        phi_q, phi_k, table, terms = (buffer[name] for name in ("phi_q", "phi_k", "table", "terms"))
        normalised = T.int64(feature_map == "nprf")
        switches = causal, normalised, of_projection
        call(f"features_{feature_map}", query, key, projection, phi_q, phi_k)
        call("weights", bias, n_q, n_k, causal, rows_q, table)
        features = phi_q, phi_k, table
        call(
            "grad_queries",
            *(query, value, grad_out, out, denominators, *features, projection, known, *switches),
            *(buffer["exponent_q"], terms, grad_query),
        )
        call(
            "grad_keys",
            *(key, value, grad_out, *features, terms, projection, *switches, buffer["exponent_k"], diagonals),
            *(grad_key, grad_value),
        )
        call("grad_bias", diagonals, n_q, n_k, causal, rows_q, grad_bias)
    return built.get()
