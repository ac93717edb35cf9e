"""Arrays that are one: what schedules declare by `schedules.in_place.write_in_place`."""

from __future__ import annotations

from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.tirx import IndexMap

from rpe_tvm.build.json_graph import from_graph, to_graph
from rpe_tvm.schedules.in_place import IN_PLACE
from rpe_tvm.te.complex import Expr, int64


def share_arrays(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return a scheduled function in which blocks with the annotation `IN_PLACE` have no arrays of their own."""
    declared = _Graph(function).declared()
    if not declared:
        return function
    # Not a step of the schedule itself: TVM cannot write a map of indices to a record of tuning.
    sch = Schedule(function)
    for rows, columns in declared.items():
        _lay_out(sch, rows, columns)
    return _Graph(sch.mod["main"]).with_shared(declared)


def _lay_out(sch: Schedule, rows: str, columns: str) -> None:
    """Lay out what rows write, `[..., N1, 1, Q, S, 2, lanes]`, as columns are, `[..., N2, N1 / R, 1, R, 2, lanes]`."""
    block = sch.get_sblock(rows)
    of_rows, of_columns = (sch.get(sch.get_sblock(name)).writes[0].source.ty.shape for name in (rows, columns))
    quotient, radix = int(of_rows[-4]), int(of_columns[-3])

    def as_column(*at: Expr) -> tuple[Expr, ...]:
        *lead, k1, _, q, s, part, lane = at
        return (*lead, s * quotient + q, k1 // radix, int64(0), k1 % radix, part, lane)

    to_column = IndexMap.from_func(as_column, ndim=len(of_rows), index_dtype="int64")
    sch.transform_layout(block, ("write", 0), to_column, assume_injective_transform=True)


class _Graph:
    """The JSON graph of a function: TVM's Python has nothing that replaces variables."""

    def __init__(self, function: tvm.tirx.PrimFunc) -> None:
        self._graph = to_graph(function)
        self._nodes: list[dict[str, Any]] = self._graph["nodes"]
        blocks = (node["data"] for node in self._nodes if node["type"] == "s_tir.SBlock")
        self._blocks = {self._text(block["name_hint"]): block for block in blocks}

    def _text(self, index: int) -> str:
        return str(self._nodes[index]["data"])

    def _array_of(self, block: str) -> int:
        (region,) = self._nodes[self._blocks[block]["writes"]]["data"]
        return int(self._nodes[region]["data"]["source"])

    def declared(self) -> dict[str, str]:
        """Return each block with the annotation `IN_PLACE`, and what it says."""
        found = {}
        for name, block in self._blocks.items():
            annotations = self._nodes[block["annotations"]]["data"]
            for key, value in zip(annotations[::2], annotations[1::2], strict=True):
                if self._text(key) == IN_PLACE:
                    found[name] = self._text(value)
        return found

    def with_shared(self, declared: dict[str, str]) -> tvm.tirx.PrimFunc:
        """Return the function with the arrays of `declared` in the place of those of the blocks that it names."""
        same = {self._array_of(block): self._array_of(other) for block, other in declared.items()}
        for node in self._nodes:
            data = node.get("data")
            for field in ("buffer", "source"):  # of stores, of loads and regions
                if isinstance(data, dict) and data.get(field) in same:
                    data[field] = same[data[field]]
        for block in self._blocks.values():
            arrays = self._nodes[block["alloc_buffers"]]
            arrays["data"] = [each for each in arrays["data"] if each not in same]
        return from_graph(self._graph)
