"""Loops over a tile that end where the sequence does: TVM's schedules compute whole tiles only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlockRealize
from tvm.sym import Analyzer

from rpe_tvm.te.complex import Expr, int64

Loops = tuple[tirx.For, ...]
Blocks = dict[str, tuple[SBlockRealize, Loops]]  # by name, each with the loops around it


@dataclass(frozen=True)
class _Tile:
    """Which axes of a block say the tile and the position in it, and which argument has all positions as its axis 2."""

    tile: int
    position: int
    argument: int


_X, _VALUE, _OUT = 0, 2, -1
# The blocks that take the time; others are under the same loops, or cheap.
_OF_PANELS = {
    "weighted": _Tile(tile=2, position=4, argument=_OUT),
    "sums_update": _Tile(tile=2, position=4, argument=_OUT),
    "product_update": _Tile(tile=3, position=8, argument=_VALUE),
}
_ONLY_OF_PANELS = "packed_keys"
_OF_FEATURES = {
    name: _Tile(tile=2, position=3, argument=_X) for name in ("norm", "scale", "logits_update", "activated")
}


def end_tiles(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled `te.panel_attention` that computes no more queries, and sums no more values, than there are.

    Within a tile, the outermost loop over its queries or over its values ends with the sequence, whatever the schedule
    has made of them. Nobody reads what is left out. All other functions are returned as they are.
    """
    blocks = _blocks(function.body, ())
    return _ended(function, blocks, _OF_PANELS) if _ONLY_OF_PANELS in blocks else function


def end_features(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return scheduled `te.features` of a `direct` config that compute no more positions than there are."""
    return _ended(function, _blocks(function.body, ()), _OF_FEATURES)


def _ended(function: tirx.PrimFunc, blocks: Blocks, tiles: Mapping[str, _Tile]) -> tirx.PrimFunc:
    ends = dict(end for name, tile in tiles.items() for end in _ends(function, *blocks[name], tile))

    def ended(loop: tirx.For) -> tirx.For:
        extent = ends.get(loop.loop_var)
        if extent is None:
            return loop
        return tirx.For(loop.loop_var, loop.min, extent, loop.kind, loop.body, annotations=loop.annotations)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, ended)))


def _blocks(statement: Any, loops: Loops) -> Blocks:
    if isinstance(statement, tirx.For):
        return _blocks(statement.body, (*loops, statement))
    if isinstance(statement, tirx.SeqStmt):
        return {name: found for each in statement.seq for name, found in _blocks(each, loops).items()}
    if isinstance(statement, SBlockRealize):
        return {str(statement.block.name_hint): (statement, loops), **_blocks(statement.block.body, loops)}
    return {}


def _ends(
    function: tirx.PrimFunc, realize: SBlockRealize, loops: Loops, axes: _Tile
) -> Iterator[tuple[tirx.Var, Expr]]:
    """Yield the variable of the outermost loop over positions of a tile, and how many iterations it needs.

    A tile whose positions are all unrolled has none.
    """
    once = {loop.loop_var: int64(0) for loop in loops if tvm_ffi.structural_equal(loop.extent, int64(1))}
    tile = _with(once, realize.iter_values[axes.tile])
    position = _with(once, realize.iter_values[axes.position])
    loop = next(each for each in loops if each.loop_var not in once and _uses(position, each.loop_var))
    if loop.kind != tirx.ForKind.SERIAL:
        return
    first = {each.loop_var: int64(0) for each in loops}
    step = Analyzer().simplify(_with({**first, loop.loop_var: int64(1)}, position))
    length = function.params[axes.argument].shape[2]
    left = length - tile * realize.block.iter_vars[axes.position].dom.extent
    # never negative: features have whole blocks past the end
    needed = tirx.max(tirx.floordiv(left + step - 1, step), int64(0))
    yield loop.loop_var, Analyzer().simplify(tirx.min(loop.extent, needed))


def _with(values: dict[tirx.Var, Expr], expression: Expr) -> Expr:
    return tvm_ffi.structural_map(expression, (tirx.Var, lambda variable: values.get(variable, variable)))


def _uses(expression: Expr, variable: tirx.Var) -> bool:
    return not tvm_ffi.structural_equal(_with({variable: int64(0)}, expression), expression)
