"""Local memory of AMD GPUs as LLVM has to see it. Two things that TVM 0.27 generates would give wrong numbers:

- Where arrays of local memory lie in the same place, the later ones are read and written as if they were global memory.
- A barrier is the bare instruction: it does not wait for what was written to local memory, and LLVM may move reads and
  writes across it. LLVM's manual of AMDGPU asks for a fence on both sides.

What is generated is checked for both afterwards.
"""

from __future__ import annotations

import re
from typing import Any

import tvm

from rpe_tvm.build.json_graph import from_graph, to_graph
from rpe_tvm.errors import BuildError

# Linked to every code object, and inlined.
BARRIER = """\
target triple = "amdgcn-amd-amdhsa-hcc"
declare void @llvm.amdgcn.s.barrier()
define i32 @rpe_tvm_barrier() {
  fence syncscope("workgroup") release
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire
  ret i32 0
}
"""
_BARRIER_NAME = "rpe_tvm_barrier"

_BARRIER_INSTRUCTION = re.compile(r"s_barrier(_signal)?\b")
# As LLVM writes them up to the eleventh generation, and from the twelfth on.
_WAIT = re.compile(r"s_waitcnt .*\blgkmcnt\(0\)|s_wait_(?:loadcnt_|storecnt_)?dscnt 0x[0-9a-f]*[048c]?0\b|s_wait_idle")
_CAST = re.compile(r"addrspacecast \(?ptr addrspace\(3\)")


def corrected(device: tvm.IRModule) -> tvm.IRModule:
    """Return lowered kernels whose arrays in the same place are one array, and whose barriers are `BARRIER`."""
    return tvm.IRModule({name: _corrected(kernel) for name, kernel in device.functions_items()})


def _corrected(kernel: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    # TVM's Python has nothing that replaces variables of a function: its JSON graph is edited, as in `parameters`.
    graph = to_graph(kernel)
    nodes: list[dict[str, Any]] = graph["nodes"]

    def add(kind: str, data: Any) -> int:
        nodes.append({"type": kind, "data": data})
        return len(nodes) - 1

    def called(node: dict[str, Any]) -> str | None:
        return str(nodes[node["data"]["op"]]["data"]) if node["type"] == "ir.Call" else None

    same: dict[int, int] = {}
    for node in list(nodes):
        if node["type"] == "tirx.DeclBuffer" and called(nodes[node["data"]["data"]]) == "tirx.buffer_data":
            (place,) = nodes[nodes[node["data"]["data"]]["data"]["args"]]["data"]
            same[node["data"]["buffer"]] = place
            zero = add(
                "ir.IntImm",
                {"span": 0, "ty": add("ir.PrimType", {"span": 0, "dtype": "int32"}), "value": add("int", 0)},
            )
            node["type"], node["data"] = "tirx.Evaluate", {"span": 0, "value": zero}
        elif called(node) == "tirx.tvm_storage_sync":
            (scope,) = nodes[node["data"]["args"]]["data"]
            if nodes[nodes[scope]["data"]["value"]]["data"] == "shared":
                name = dict(nodes[scope]["data"], value=add("ffi.String", _BARRIER_NAME))
                node["data"]["op"] = add("ir.Op", "tirx.call_extern")
                node["data"]["args"] = add("ffi.Array", [add("ir.StringImm", name)])
    for buffer, place in same.items():
        kinds = [nodes[nodes[nodes[each]["data"]["ty"]]["data"]["dtype"]] for each in (buffer, place)]
        if kinds[0]["data"] != kinds[1]["data"]:
            raise BuildError("Arrays of two types lie in one place of local memory: expected one type.")

    def first(place: int) -> int:
        return first(same[place]) if place in same else place

    for node in nodes:
        data = node.get("data")
        if isinstance(data, dict):
            node["data"] = {key: first(value) for key, value in data.items()}
        elif isinstance(data, list):
            node["data"] = [first(value) for value in data]
    return from_graph(graph)


def check(ir: str, assembly: str) -> None:
    """Raise `BuildError` if LLVM's code takes local memory for global, or a barrier follows a write without a wait.

    Parameters
    ----------
    ir, assembly
        LLVM's intermediate code, and what it became, as text.
    """
    if _CAST.search(ir):
        raise BuildError("LLVM's code takes local memory for global memory: install the pinned version of TVM.")
    waited = True
    for line in assembly.splitlines():
        instruction = line.strip()
        if instruction.startswith(("ds_write", "ds_store")):
            waited = False
        elif _WAIT.match(instruction):
            waited = True
        elif _BARRIER_INSTRUCTION.match(instruction) and not waited:
            raise BuildError("A barrier does not wait for local memory: install the pinned version of TVM.")
