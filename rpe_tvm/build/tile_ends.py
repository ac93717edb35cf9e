"""Loops over a tile that end where the sequence does: TVM's schedules compute whole tiles only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlockRealize
from tvm.sym import Analyzer

from rpe_tvm.te.complex import Expr, int64

Loops = tuple[tirx.For, ...]
Blocks = dict[str, tuple[SBlockRealize, Loops]]  # by name, each with the loops around it
Ends = dict[tirx.Var, Expr]  # how many iterations a loop needs, by its variable


@dataclass(frozen=True)
class _Tile:
    """Which axes of a block say the tile and the position in it, and which argument has all positions as its axis 2."""

    tile: int
    position: int
    argument: int


_X, _VALUE, _TABLE, _OUT = 0, 2, 3, -1
# The blocks that take the time; others are under the same loops, or cheap.
_OF_TILES = {
    "weighted": _Tile(tile=2, position=4, argument=_OUT),
    "sums_update": _Tile(tile=2, position=3, argument=_OUT),
}
_OF_PANELS = {
    "weighted": _Tile(tile=2, position=4, argument=_OUT),
    "sums_update": _Tile(tile=2, position=4, argument=_OUT),
    "product_update": _Tile(tile=3, position=8, argument=_VALUE),
}
_OF_FEATURES = {
    name: _Tile(tile=2, position=3, argument=_X) for name in ("norm", "scale", "logits_update", "activated")
}


def end_tiles(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return scheduled attention by tiles that computes no more queries than there are.

    Within a tile, loops over its queries end with the sequence, whatever the schedule has made of them; with panels
    loops over its values, too. Where weights are causal, the loop over tiles of keys ends with the last query of a
    tile. Nobody reads what is left out, or it is zero. All other functions are returned as they are.
    """
    blocks = _blocks(function.body, ())
    if "row_sum_update" not in blocks:
        return function
    tiles = _OF_PANELS if "packed_keys" in blocks else _OF_TILES
    return _ended(function, {**_ends(function, blocks, tiles), **_causal_end(function, blocks, tiles)})


def end_features(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return scheduled `te.features` of a `direct` config that compute no more positions than there are."""
    return _ended(function, _ends(function, _blocks(function.body, ()), _OF_FEATURES))


def _ended(function: tirx.PrimFunc, ends: Ends) -> tirx.PrimFunc:
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


def _ends(function: tirx.PrimFunc, blocks: Blocks, tiles: Mapping[str, _Tile]) -> Ends:
    """Return the loops over positions of each tile but those that are unrolled or vectorised."""
    ends: Ends = {}
    for name, axes in tiles.items():
        realize, loops = blocks[name]
        single = _single(loops)
        position = _with(single, realize.iter_values[axes.position])
        start = _with(single, realize.iter_values[axes.tile]) * _extent(realize, axes.position)
        left = function.params[axes.argument].shape[2] - start
        for depth, loop in enumerate(loops):
            if loop.kind != tirx.ForKind.SERIAL or not _uses(position, loop.loop_var) or loop.loop_var in single:
                continue
            before = _with({each.loop_var: int64(0) for each in loops[depth:]}, position)
            step = _with({each.loop_var: int64(int(each is loop)) for each in loops}, position)
            # never negative: features have whole blocks past the end
            needed = tirx.max(tirx.floordiv(left - before + step - 1, step), int64(0))
            ends[loop.loop_var] = Analyzer().simplify(tirx.min(loop.extent, needed))
    return ends


def _causal_end(function: tirx.PrimFunc, blocks: Blocks, tiles: Mapping[str, _Tile]) -> Ends:
    """Return the loop over tiles of keys; entry 0 of the table of weights says whether they are causal."""
    realize, loops = blocks["sums_update"]
    axes, single = tiles["sums_update"], _single(loops)
    _, head, *_, block = realize.iter_values
    loop = next((each for each in loops if _uses(block, each.loop_var)), None)
    if loop is None:  # one tile has all keys
        return {}
    end_of_tile = (_with(single, realize.iter_values[axes.tile]) + 1) * _extent(realize, axes.position)
    keys = _extent(blocks["weighted"][0], -1)
    entry = tirx.BufferLoad(function.params[_TABLE], [_with(single, head), int64(0)])
    reached = tirx.min(loop.extent, tirx.floordiv(end_of_tile + keys - 1, keys))
    return {loop.loop_var: tirx.Select(entry > 0, reached, loop.extent)}


def _single(loops: Loops) -> dict[tirx.Var, Expr]:
    """Return the variables of loops of one iteration, and what they are."""
    return {loop.loop_var: int64(0) for loop in loops if tvm_ffi.structural_equal(loop.extent, int64(1))}


def _extent(realize: SBlockRealize, axis: int) -> Expr:
    return realize.block.iter_vars[axis].dom.extent


def _with(values: dict[tirx.Var, Expr], expression: Expr) -> Expr:
    return tvm_ffi.structural_map(expression, (tirx.Var, lambda variable: values.get(variable, variable)))


def _uses(expression: Expr, variable: tirx.Var) -> bool:
    return not tvm_ffi.structural_equal(_with({variable: int64(0)}, expression), expression)
