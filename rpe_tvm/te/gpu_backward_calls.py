"""All gradients on a GPU as one function of the host, as `te.gpu_forward` has the forward pass: no torch in between."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.plan.gpu_workspace import places
from rpe_tvm.te.cuda_function import argument, function, named
from rpe_tvm.te.gpu_forward import FLOAT_BYTES, call, piece


class _Arguments:
    """What both functions are called with, declared in this order."""

    def __init__(self, config: GpuBackwardConfig | TileBackwardConfig) -> None:
        names = ("batch", "heads", "n_query", "n_key", "size")
        self.batch, self.heads, self.n_q, self.n_k, self.size = (named(x, T.int64()) for x in names)
        self.config = config

    def rows(self, name: str, n: Any) -> Any:
        d = T.int64(self.config.head_dim)
        return argument(name, (self.batch, self.heads, n, d), "float32", strided=True, align=FLOAT_BYTES)

    def compact(self, name: str, *shape: Any) -> Any:
        return argument(name, shape, "float32", align=FLOAT_BYTES)

    def bias(self, name: str) -> Any:
        return self.compact(name, self.heads, self.n_q + self.n_k - 1)

    def tables(self) -> tuple[Any, ...]:
        """The tables of the FFT, none by tiles."""
        if isinstance(self.config, TileBackwardConfig):
            return ()
        return (self.compact("tables", T.int64(gpu.layout(self.config).size)),)

    def denominators(self) -> tuple[Any, ...]:
        """What the forward pass by tiles has kept, and whether it has; by FFT they are computed again."""
        if not isinstance(self.config, TileBackwardConfig):
            return ()
        return self.compact("denominators", self.batch, self.heads, self.n_q), T.arg("known", T.int64())

    def workspace(self) -> Any:
        return argument("workspace", (self.size,), "uint8")


def gradients(config: GpuBackwardConfig | TileBackwardConfig) -> tvm.tirx.PrimFunc:
    """Return the function
    `gradients(value, rpe_bias, tables, causal, grad_out, out, denominators, known, workspace, grad_value, grad_bias)`.

    value and grad_value `[B, H, n_k, d]`, grad_out and out `[B, H, n_q, d]`, the last axis contiguous; rpe_bias and
    grad_bias `[H, n_q + n_k - 1]`; tables as in `plan.gpu`, by tiles left out; causal 0 or 1; denominators
    `[B, H, n_q]` of the forward pass if known is 1, any numbers if it is 0, by tiles only; workspace bytes, as many as
    `plan.gpu_workspace` says: `phi_q` and `phi_k` are read there, `grad_phi_q` and `grad_phi_k` written.
    """
    with function("gradients") as built:
        a = _Arguments(config)
        value, bias, tables = a.rows("value", a.n_k), a.bias("rpe_bias"), a.tables()
        causal = T.arg("causal", T.int64())
        grad_out, out, denominators = a.rows("grad_out", a.n_q), a.rows("out", a.n_q), a.denominators()
        workspace, grad_value, grad_bias = a.workspace(), a.rows("grad_value", a.n_k), a.bias("grad_bias")
        arrays = value, bias, *tables, causal, grad_out, out, *denominators, workspace, grad_value, grad_bias
        if isinstance(config, TileBackwardConfig):
            _by_tiles(config, a, *arrays)
        else:
            _by_fft(config, a, *arrays)
    return built.get()


def _by_tiles(
    config: TileBackwardConfig,
    a: _Arguments,
    value: Any,
    bias: Any,
    causal: Any,
    grad_out: Any,
    out: Any,
    denominators: Any,
    known: Any,
    workspace: Any,
    grad_value: Any,
    grad_bias: Any,
) -> None:
    found, _ = places(config, a.batch, a.heads, a.n_q, a.n_k)
    buffer = {name: piece(workspace, place, place.shape) for name, place in found.items()}
    call("weights", bias, a.n_q, a.n_k, causal, T.int64(config.length), buffer["table"])
    given, terms = (buffer["phi_q"], buffer["phi_k"], buffer["table"], causal), buffer["terms"]
    call("grad_queries", value, grad_out, out, *given, denominators, known, terms, buffer["grad_phi_q"])
    call("grad_keys", value, grad_out, *given, terms, buffer["diagonals"], buffer["grad_phi_k"], grad_value)
    call("grad_bias", buffer["diagonals"], a.n_q, a.n_k, causal, grad_bias)


def _by_fft(
    config: GpuBackwardConfig,
    a: _Arguments,
    value: Any,
    bias: Any,
    tables: Any,
    causal: Any,
    grad_out: Any,
    out: Any,
    workspace: Any,
    grad_value: Any,
    grad_bias: Any,
) -> None:
    found, _ = places(config, a.batch, a.heads, a.n_q, a.n_k)
    first = config.radices[0]
    folded = config.folds, first, config.row // first

    def whole(name: str) -> Any:
        return piece(workspace, found[name], found[name].shape)

    def by_radix(name: str, *split: int, parts: int = 0) -> Any:
        """A buffer whose axis of positions or frequencies, `parts` from the last, is seen as the axes `split`."""
        shape = found[name].shape
        axis = len(shape) - 1 - parts
        return piece(workspace, found[name], (*shape[:axis], *split, *shape[axis + 1 :]))

    call("largest", bias, a.n_q, a.n_k, causal, whole("largest"))
    call("spectrum", bias, whole("largest"), a.n_q, a.n_k, causal, tables, whole("spectrum"))
    phi = whole("phi_q"), whole("phi_k")
    call("denominators", *phi, whole("spectrum"), tables, by_radix("terms", *folded))
    call("channels", whole("terms"), value, grad_out, out, tables, whole("channels"))
    sums = by_radix("correlation", *folded[1:]), *(by_radix(f"grad_phi_{x}", *folded) for x in "kq")
    call("backward", *phi, by_radix("channels", *folded, parts=1), whole("spectrum"), tables, *sums)
    partial = by_radix("partial", *folded, parts=1)
    call("value_sums", *phi, by_radix("channels", *folded, parts=1), whole("spectrum"), tables, partial)
    call("grad_value", whole("partial"), tables, grad_value)
    call("correlation_sums", whole("correlation"), whole("summed"))
    call("weight_sums", by_radix("summed", *folded[1:]), tables, by_radix("lags", *folded))
    call("grad_bias", whole("lags"), bias, whole("largest"), a.n_q, a.n_k, causal, grad_bias)


def backward(config: GpuBackwardConfig | TileBackwardConfig, feature_map: str) -> tvm.tirx.PrimFunc:
    """Return the function `backward_<map>(query, key, value, rpe_bias, projection, tables, causal, grad_out, out,
    denominators, known, workspace, grad_query, grad_key, grad_value, grad_bias)`.

    As `gradients`, with query and grad_query `[B, H, n_q, d]`, key and grad_key `[B, H, n_k, d]`, projection `[m, d]`.
    """
    with function(f"backward_{feature_map}") as built:
        a = _Arguments(config)
        query, key, value = a.rows("query", a.n_q), a.rows("key", a.n_k), a.rows("value", a.n_k)
        bias = a.bias("rpe_bias")
        projection = a.compact("projection", T.int64(config.num_features), T.int64(config.head_dim))
        tables, causal = a.tables(), T.arg("causal", T.int64())
        grad_out, out, denominators = a.rows("grad_out", a.n_q), a.rows("out", a.n_q), a.denominators()
        workspace = a.workspace()
        grad_query, grad_key, grad_value = (
            a.rows("grad_query", a.n_q),
            a.rows("grad_key", a.n_k),
            a.rows("grad_value", a.n_k),
        )
        grad_bias = a.bias("grad_bias")
        found, _ = places(config, a.batch, a.heads, a.n_q, a.n_k)
        phi = [piece(workspace, found[name], found[name].shape) for name in ("phi_q", "phi_k")]
        call(f"features_{feature_map}", query, key, projection, *phi)
        inputs = value, bias, *tables, causal, grad_out, out, *denominators
        call("gradients", *inputs, workspace, grad_value, grad_bias)
        pieces = [piece(workspace, found[x], found[x].shape) for x in ("phi_q", "phi_k", "grad_phi_q", "grad_phi_k")]
        call(f"grad_features_{feature_map}", query, key, projection, *pieces, grad_query, grad_key)
    return built.get()
