"""The last tiles of queries and of keys are as long as what is left of the sequence."""

from __future__ import annotations

import pytest
import tvm_ffi
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.sym import Analyzer

from rpe_tvm.build.lower import preparing_functions
from rpe_tvm.build.tile_ends import end_tiles
from rpe_tvm.build.workloads import function_of
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import x86
from rpe_tvm.te import shapes


def _scheduled(config: AttentionConfig) -> tirx.PrimFunc:
    sch = Schedule(function_of(config, shapes.symbolic()))
    x86.SCHEDULES.default(sch, config)
    return sch.mod["main"]


def _at(extent: tirx.PrimExpr, n_query: int, n_key: int, task: int, block: int = 0) -> int:
    known = {"n_query": n_query, "n_key": n_key, "batch": 1, "heads": 1, "blocks": 9, "ax7": block}
    known |= {"ax3_0": 0, "ax4_0": 0}  # the first 64 rows of larger tiles, or fewer

    def value(variable: tirx.Var) -> tirx.PrimExpr:
        return tirx.IntImm("int64", known.get(str(variable.name), task))

    return int(Analyzer().simplify(tvm_ffi.structural_map(extent, (tirx.Var, value))))


def _iterations(function: tirx.PrimFunc, n_query: int, n_key: int, task: int, block: int) -> set[int]:
    """How often the loops that end with the sequence run, for one head."""
    found = set()

    def note(loop: tirx.For) -> None:
        if isinstance(loop.extent, tirx.Min | tirx.Max):
            found.add(_at(loop.extent, n_query, n_key, task, block))

    tvm_ffi.structural_walk(function.body, (tirx.For, note))
    return found


@pytest.mark.parametrize("rows", [48, 54, 60])
def test_loops_end_with_the_sequence(rows: int) -> None:
    function = end_tiles(_scheduled(AttentionConfig(32, 64, 512, "direct", tile=(rows, 64), lanes=8)))
    # 6 queries at once for scores, 2 for values; as many values as there are
    assert _iterations(function, 500, 500, task=0, block=0) == {rows // 6, rows // 2, 64}
    assert _iterations(function, rows + 17, 130, task=1, block=2) == {3, 9, 2}
    assert _iterations(function, rows + 1, 65, task=1, block=1) == {1}


def test_tiles_of_more_than_64_rows() -> None:
    function = end_tiles(_scheduled(AttentionConfig(32, 64, 512, "direct", tile=(96, 64), lanes=8)))
    assert _iterations(function, 96 + 17, 65, task=1, block=1) == {1, 3, 9}
    assert _iterations(function, 96 + 49, 512, task=1, block=0) == {2, 8, 24, 64}


def test_tiles_without_panels() -> None:
    function = end_tiles(_scheduled(AttentionConfig(32, 64, 512, "direct", tile=(128, 64), lanes=16)))
    assert _iterations(function, 128 + 17, 512, task=1, block=0) == {1, 5, 9}
    assert _iterations(function, 128 + 65, 512, task=1, block=0) == {2, 16, 32}


@pytest.mark.parametrize(("tile", "blocks"), [(0, 1), (1, 2), (2, 3), (9, 8)])
def test_causal_tiles_end_with_their_last_query(tile: int, blocks: int) -> None:
    function = end_tiles(_scheduled(AttentionConfig(32, 64, 512, "direct", tile=(48, 64), lanes=8)))
    extents = []

    def note(loop: tirx.For) -> None:
        if isinstance(loop.extent, tirx.Select):
            extents.append(loop.extent)

    tvm_ffi.structural_walk(function.body, (tirx.For, note))
    (extent,) = extents
    assert _at(extent.true_value, n_query=512, n_key=500, task=tile) == blocks
    assert _at(extent.false_value, n_query=512, n_key=500, task=tile) == 8


@pytest.mark.parametrize("feature_map", ["prf", "nprf"])
def test_features_end_with_the_sequence(feature_map: str) -> None:
    config = AttentionConfig(32, 64, 512, "direct", tile=(48, 64), lanes=8)
    function = preparing_functions(config, x86.SCHEDULES)[f"features_{feature_map}"]
    # one position at once, and two for the logits
    assert _iterations(function, 512, 0, task=7, block=0) == {64, 32}
    assert _iterations(function, 467, 0, task=7, block=0) == {19, 10}
    assert _iterations(function, 512, 0, task=8, block=0) == {0}
    assert _iterations(function, 440, 0, task=7, block=0) == {0}


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(16, 16, 64, "fft", (8,), (8,), lanes=8),
        BackwardConfig(16, 16, 64, "direct", tile=(64, 64), lanes=8),
    ],
    ids=lambda config: config.op,
)
def test_other_functions_stay_as_they_are(config: AttentionConfig) -> None:
    function = _scheduled(config)
    assert end_tiles(function).same_as(function)
