"""The inner loops that are compiled for AVX2: 16 vector registers are enough for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rpe_tvm import targets
from rpe_tvm.build.lower import lower
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune.assembly import Loop, assembly_of, innermost_loops

pytestmark = pytest.mark.compile

TARGET = targets.preset("haswell")
FUSED = r"vfn?m(add|sub)\d+ps .*%ymm"
ARITHMETIC = r"v(fn?m(add|sub)\d+|add|sub|mul)ps .*%ymm"
STORED = r"vmov[au]ps %ymm\d+, "
SPILLED = STORED + r".*\(%r[sb]p"


def _loops_of(config: AttentionConfig, name: str) -> list[Loop]:
    function = next(f for f in lower(config, TARGET).mod.functions.values() if f.attrs["global_symbol"] == name)
    return innermost_loops(assembly_of(function, TARGET))


@pytest.mark.parametrize(
    ("m", "d", "length"),
    [
        (32, 64, 64),
        (32, 64, 128),
        (32, 64, 1024),
        (64, 64, 256),
        (32, 128, 256),
        (32, 40, 512),
        (16, 72, 256),
        (32, 256, 96),
    ],
)
def test_tiles(m: int, d: int, length: int) -> None:
    loops = _loops_of(wisdom.direct_config(m, d, length, TARGET.lanes), "attention")
    products = [loop for loop in loops if loop.count(FUSED) >= 8]
    assert len(products) >= 2  # scores and values
    for loop in products:
        assert loop.count(SPILLED) == 0, loop.label
        # two products begin in a cycle, and six instructions
        assert len(loop.instructions) <= 2.2 * loop.count(FUSED), loop.label


def test_features() -> None:
    loops = _loops_of(wisdom.direct_config(32, 64, 512, TARGET.lanes), "features_nprf")
    products = [loop for loop in loops if loop.count(FUSED) >= 16 and loop.count(FUSED) == loop.count(ARITHMETIC)]
    assert products and all(loop.count(SPILLED) == 0 for loop in products)


def _spills(config: AttentionConfig) -> float:
    """What part of the vectors that butterflies store are spilled registers."""
    butterflies = [loop for loop in _loops_of(config, "attention") if loop.count(ARITHMETIC) >= 16]
    stored, spilled = (sum(loop.count(pattern) for loop in butterflies) for pattern in (STORED, SPILLED))
    print(f"{config.description}: {stored} stores, {spilled} of them spills")
    return spilled / stored


def test_products_by_fft() -> None:
    config = wisdom.fft_config(TARGET.id, 32, 64, 2048, TARGET.lanes)
    assert max(config.outer + config.inner) == 4
    # loops of few iterations, which LLVM unrolls, keep twiddles on the stack
    assert _spills(config) <= 0.3
    assert _spills(replace(config, outer=(8, 8), inner=(8, 4))) > 0.4
