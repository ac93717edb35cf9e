"""A whole call on a GPU as one function of the host: it calls the functions that launch kernels, one after the other.

Called from Python one by one, they and the allocation of what lies between them cost more time than the kernels of
short sequences. Here the buffers in between are pieces of one array, see `plan.gpu_workspace`.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx.op import buffer_data

from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig, round_up
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.plan.gpu_workspace import Place, places
from rpe_tvm.te.cuda_function import argument, function, named

# What TVM prefixes a function's name with in a library.
SYMBOL = "__tvm_ffi_"

FLOAT_BYTES = 4


def forward(config: GpuConfig, feature_map: str) -> tvm.tirx.PrimFunc:
    """Return the function `forward_<map>(query, key, value, rpe_bias, projection, tables, causal, workspace, out)`."""
    return _forward(config, feature_map, is_recorded=False)


def recorded(config: TensorCoreConfig | TileConfig, feature_map: str) -> tvm.tirx.PrimFunc:
    """Return the function `recorded_<map>(query, key, value, rpe_bias, projection, causal, workspace, denominators,
    out)`: `forward_<map>` for which gradients will be asked, denominators `[B, H, n_q]` being what they take from it.
    """
    return _forward(config, feature_map, is_recorded=True)


def _forward(config: GpuConfig, feature_map: str, is_recorded: bool) -> tvm.tirx.PrimFunc:
    """Return either function.

    Arguments of the function: query and out `[B, H, n_q, d]`, key and value `[B, H, n_k, d]`, in the config's dtype and
    with strides as the functions that are called take them; rpe_bias `[H, n_q + n_k - 1]` and projection `[m, d]`
    float32; tables as in `plan.gpu`, by tiles left out; causal 0 or 1; workspace bytes, as many as
    `plan.gpu_workspace` says.
    """
    with function(f"{'recorded' if is_recorded else 'forward'}_{feature_map}") as built:
        batch, heads, n_q, n_k, size = (named(x, T.int64()) for x in ("batch", "heads", "n_query", "n_key", "size"))
        d = T.int64(config.head_dim)

        def rows(name: str, n: Any) -> Any:
            return argument(name, (batch, heads, n, d), config.dtype, strided=True, align=1)

        def compact(name: str, *shape: Any) -> Any:
            return argument(name, shape, "float32", align=FLOAT_BYTES)

        query, key, value = rows("query", n_q), rows("key", n_k), rows("value", n_k)
        bias = compact("rpe_bias", heads, n_q + n_k - 1)
        projection = compact("projection", T.int64(config.num_features), d)
        tables = None
        if isinstance(config, GpuAttentionConfig):
            tables = compact("tables", T.int64(gpu.layout(config).size))
        causal = T.arg("causal", T.int64())
        workspace = argument("workspace", (size,), "uint8")
        kept = {"denominators": compact("denominators", batch, heads, n_q)} if is_recorded else {}
        out = rows("out", n_q)

        found, _ = places(config, batch, heads, n_q, n_k)
        buffer = {name: piece(workspace, place, place.shape) for name, place in found.items()} | kept
        call(f"features_{feature_map}", query, key, projection, buffer["phi_q"], buffer["phi_k"])
        if isinstance(config, TensorCoreConfig | TileConfig):
            origin = round_up(n_q, config.tile_q)
            call("weights", bias, n_q, n_k, causal, origin, buffer["table"])
            # tensor cores have a kernel without them: to store them takes 1 % of it
            sums = (buffer["denominators"],) if "denominators" in buffer else ()
            name = "recorded_attention" if is_recorded and isinstance(config, TensorCoreConfig) else "attention"
            call(name, buffer["phi_q"], buffer["phi_k"], value, buffer["table"], causal, *sums, out)
        else:
            call("largest", bias, n_q, n_k, causal, buffer["largest"])
            call("spectrum", bias, buffer["largest"], n_q, n_k, causal, tables, buffer["spectrum"])
            *lead, length, part = found["partial"].shape
            radix = config.radices[0]
            by_first_radix = (*lead, config.folds, radix, length // (config.folds * radix), part)
            partial = piece(workspace, found["partial"], by_first_radix)
            call("attention", buffer["phi_q"], buffer["phi_k"], value, buffer["spectrum"], tables, partial)
            call("normalise", buffer["partial"], tables, out)
    return built.get()


def call(name: str, *arguments: Any) -> None:
    """Call a function of the same library."""
    T.evaluate(T.call_cpacked(SYMBOL + name, *arguments))


def piece(workspace: Any, place: Place, shape: tuple[Any, ...]) -> Any:
    """Return a part of the workspace as an argument."""
    start = tirx.call_intrin("handle", "tirx.handle_add_byte_offset", buffer_data(workspace), place.offset)
    sizes = T.tvm_stack_make_shape(*(T.int64(size) if isinstance(size, int) else size for size in shape))
    return T.tvm_stack_make_array(start, sizes, 0, len(shape), tirx.const(0, place.dtype), 0)
