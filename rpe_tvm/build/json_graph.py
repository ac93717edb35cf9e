"""A TVM function as a graph of JSON nodes and back, to edit what TVM's Python has no call for."""

from __future__ import annotations

import json
from typing import Any

import tvm
from tvm_ffi.serialization import from_json_graph_str


def to_graph(function: tvm.tirx.PrimFunc) -> dict[str, Any]:
    """Return the nodes of a function and which of them is the function."""
    graph: dict[str, Any] = json.loads(tvm.ir.save_json(function))
    return graph


def from_graph(graph: dict[str, Any]) -> tvm.tirx.PrimFunc:
    """Return the function of a graph that `to_graph` made."""
    # Not tvm.ir.load_json, which first looks for what older versions wrote: a tenth of the time of a compilation.
    return from_json_graph_str(json.dumps(graph, separators=(",", ":")))
