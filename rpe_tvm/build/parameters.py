"""What a compiled function may assume of its arguments: element alignment, and open strides where declared.

`te.create_prim_func` promises 64-byte alignment and compact arrays; a sliced tensor then crashes the process or is
refused. TVM has no call to change the parameters of a function, so its JSON graph is edited.
"""

from __future__ import annotations

from typing import Any

import tvm

from rpe_tvm.build.json_graph import from_graph, to_graph

FLOAT_BYTES = 4


def relax_parameters(function: tvm.tirx.PrimFunc, strided: frozenset[str]) -> tvm.tirx.PrimFunc:
    """Return `function` with parameters that may lie at any float, and some of them with open strides.

    Parameters
    ----------
    function : PrimFunc
        Made by `te.create_prim_func`, not yet scheduled; parameter shapes are 64-bit.
    strided : frozenset of str
        Names of parameters whose axes but the last may have any stride; the last one's is 1.

    Returns
    -------
    PrimFunc
        The same computation.
    """
    graph = to_graph(function)
    nodes: list[dict[str, Any]] = graph["nodes"]

    def add(kind: str, data: Any) -> int:
        nodes.append({"type": kind, "data": data})
        return len(nodes) - 1

    def field(node: dict[str, Any], name: str) -> dict[str, Any]:
        found: dict[str, Any] = nodes[node["data"][name]]
        return found

    int64 = next(
        i for i, node in enumerate(nodes) if node["type"] == "ir.PrimType" and node["data"]["dtype"] == "int64"
    )
    one = add("ir.IntImm", {"span": 0, "ty": int64, "value": add("int", 1)})
    for parameter in (nodes[index] for index in field(nodes[graph["root_index"]], "params")["data"]):
        buffer = field(parameter, "ty")
        if buffer["type"] != "tirx.BufferType":
            continue
        buffer["data"]["data_alignment"] = FLOAT_BYTES
        name = field(parameter, "name")["data"]
        if name in strided:
            axes = range(len(field(buffer, "shape")["data"]) - 1)
            names = [add("ffi.String", f"{name}_stride{axis}") for axis in axes]
            strides = [add("ir.Var", {"span": 0, "ty": int64, "name": name}) for name in names]
            buffer["data"]["strides"] = add("ffi.Array", [*strides, one])
    return from_graph(graph)
