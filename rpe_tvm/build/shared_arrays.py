"""Arrays that are one: what schedules declare by `schedules.in_place`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.tirx import IndexMap

from rpe_tvm.build.json_graph import from_graph, to_graph
from rpe_tvm.schedules.in_place import IN_PARTS, IN_PLACE
from rpe_tvm.te.complex import Expr, int64


def share_arrays(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Return a scheduled function in which blocks with an annotation of `in_place` have no arrays of their own."""
    graph = _Graph(function)
    in_place, in_parts = graph.declared(IN_PLACE), graph.declared(IN_PARTS)
    if not in_place and not in_parts:
        return function
    # Not steps of the schedule itself: TVM cannot write a map of indices to a record of tuning.
    sch = Schedule(function)
    for rows, columns in in_place.items():
        _lay_out(sch, rows, columns)
    for last, first in in_parts.items():
        _lay_out_in_parts(sch, last, first)
    return _Graph(sch.mod["main"]).with_shared(in_place | in_parts)


def _lay_out(sch: Schedule, rows: str, columns: str) -> None:
    """Lay out what rows write, `[..., N1, 1, Q, S, 2, lanes]`, as columns are, `[..., N2, N1 / R, 1, R, 2, lanes]`."""
    of_rows, of_columns = _shape(sch, rows), _shape(sch, columns)
    quotient, radix = int(of_rows[-4]), int(of_columns[-3])

    def as_column(*at: Expr) -> tuple[Expr, ...]:
        *lead, k1, _, q, s, part, lane = at
        return (*lead, s * quotient + q, k1 // radix, int64(0), k1 % radix, part, lane)

    _transform(sch, rows, as_column)


def _lay_out_in_parts(sch: Schedule, last: str, first: str) -> None:
    """Lay out `[..., N2, 1, Q, R, 2, lanes]` of the first stage and `[..., N2, R, q, s, 2, lanes]` of the last one of a
    part, Q = q s, as `[..., R, N2, Q, 1, 2, lanes]`.
    """
    *_, columns, _, quotient, _, part, lanes = _shape(sch, last)
    points = int(columns) * int(_shape(sch, first)[-4])

    def of_first(*at: Expr) -> tuple[Expr, ...]:
        *lead, n2, _, q, t, part, lane = at
        return (*lead, t, n2, q, int64(0), part, lane)

    def of_last(*at: Expr) -> tuple[Expr, ...]:
        *lead, n2, t, q, s, part, lane = at
        return (*lead, t, n2, s * quotient + q, int64(0), part, lane)

    _transform(sch, first, of_first)
    _transform(sch, last, of_last)
    line = int(part) * int(lanes)
    # one line between parts, so that the same position of all of them does not fall on one cache set
    sch.storage_align(sch.get_sblock(first), 0, len(_shape(sch, first)) - 6, points * line, line)


def _shape(sch: Schedule, block: str) -> Any:
    return sch.get(sch.get_sblock(block)).writes[0].source.ty.shape


def _transform(sch: Schedule, block: str, layout: Callable[..., tuple[Expr, ...]]) -> None:
    index_map = IndexMap.from_func(layout, ndim=len(_shape(sch, block)), index_dtype="int64")
    sch.transform_layout(sch.get_sblock(block), ("write", 0), index_map, assume_injective_transform=True)


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

    def declared(self, annotation: str) -> dict[str, str]:
        """Return each block with an annotation, and what it says."""
        found = {}
        for name, block in self._blocks.items():
            annotations = self._nodes[block["annotations"]]["data"]
            for key, value in zip(annotations[::2], annotations[1::2], strict=True):
                if self._text(key) == annotation:
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
