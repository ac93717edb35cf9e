"""The order that the static cost gives."""

import pytest

from rpe_tvm import targets
from rpe_tvm.errors import TuningError
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune import static_cost, static_table
from rpe_tvm.tune.assembly import Loop
from rpe_tvm.tune.static_cost import Core

CORE = Core(width=3, arithmetic=2, memory=1, accumulation=4)
DIRECT = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=4)
FFT = AttentionConfig(8, 16, 64, "fft", (8,), (8,), lanes=4)


def loop(**counts):
    texts = {
        "fused": "fmla v{}.4s, v1.4s, v2.s[0]",
        "sub": "fsub v0.4s, v1.4s, v2.4s",
        "load": "ldr q0, [x0]",
        "spill": "ldr q0, [sp, #16]",
        "other": "add x0, x0, #16",
    }
    return Loop("f", ".L0", tuple(texts[name].format(10 + n) for name, count in counts.items() for n in range(count)))


def test_cycles_are_those_of_what_is_scarcest():
    assert static_cost.cycles(loop(fused=16), CORE) == 8
    assert static_cost.cycles(loop(fused=2, load=9), CORE) == 9
    assert static_cost.cycles(loop(fused=2, other=28), CORE) == 10
    wide = Loop("f", ".L0", tuple(f"vfmadd231ps %zmm0, %zmm1, %zmm{n}" for n in range(2, 18)))
    assert static_cost.cycles(wide, CORE) == 16  # twice as many as of 256 bits
    # a single sum, on x86 by either form of the instruction, waits for each of its terms
    one = Loop("f", ".L0", ("fmla v0.4s, v1.4s, v2.s[0]", "ldr q1, [x0]", "fmla v0.4s, v1.4s, v2.s[1]"))
    assert static_cost.cycles(one, CORE) == 8
    one = Loop("f", ".L0", ("vfmadd132ps (%rax), %zmm0, %zmm1", "vfmadd132ps 64(%rax), %zmm1, %zmm0"))
    assert static_cost.cycles(one, CORE) == 8
    butterfly = Loop("f", ".L0", ("fmul v0.4s, v1.4s, v2.s[0]", "fmla v0.4s, v1.4s, v2.s[0]"))
    assert static_cost.cycles(butterfly, CORE) == 1


def test_register_blocks_with_fewer_loads_are_cheaper():
    def cost(fused, loads):
        return static_cost.cost(DIRECT, [loop(fused=16, load=8), loop(fused=fused, load=loads)], CORE)

    assert cost(16, 8) == 64 * 64 * (8 + 16) * 8 / (16 * 4)
    assert cost(16, 8) < cost(4, 4) < cost(1, 2)


def test_spills_make_ffts_dearer():
    stage = {"fused": 8, "sub": 8, "load": 8}
    plain, spilt = (static_cost.cost(FFT, [loop(**stage, spill=count)], CORE) for count in (0, 4))
    assert plain < spilt
    longer = AttentionConfig(8, 16, 512, "fft", (8,), (8, 8), lanes=4)
    assert static_cost.cost(longer, [loop(**stage)], CORE) > 8 * plain


def test_other_loops_are_refused():
    for config in (DIRECT, FFT):
        with pytest.raises(TuningError, match="Expected inner loops of"):
            static_cost.cost(config, [loop(other=4)], CORE)


def test_stages_are_told_apart_and_their_spills_counted():
    def butterflies(function, arithmetic, *others):
        fused = ("fmla v0.4s, v1.4s, v2.s[0]",) * 4
        return Loop(function, ".L0", fused + ("fsub v0.4s, v1.4s, v2.4s",) * (arithmetic - 4) + others)

    config = AttentionConfig(8, 16, 16, "fft", (2, 2), (2, 2), lanes=4)
    # forward, split, forward, turn, backward, unsplit, backward; one unrolled, one in two parts
    counts = [8, 12, 16, 16, 8, 8, 12, 8]
    keys = [butterflies("f", count) for count in counts]
    values = [butterflies("g", 16, "stp q0, q1, [sp, #32]", "ldr q0, [sp, #32]")]
    points = static_cost.stage_cycles(config, keys + values, CORE)
    assert [cycles for cycles, _ in points] == [2.0, 3.0, 2.0, 4.0, 2.0, 3.0, 2.0]
    assert [spills for _, spills in points] == [0, 0, 0.5, 1, 0, 0, 0]
    with pytest.raises(TuningError, match=r"Expected inner loops of \[\('forward', 2\)"):
        static_cost.stage_cycles(config, keys[1:] + values, CORE)
    assert static_cost.spills(butterflies("f", 8, "vstmia r1, {d16, d17}", "vst1.32 {d2, d3}, [r0]!")) == 1


# Zen 4, n = 1024, m = 32, d = 64, four heads, one thread, minima of turns on a quiet machine: docs/decisions.md
MEASURED = {
    "direct 128x64, 4 rows of 4 vectors": 8.24,
    "direct 128x64, 1 rows of 1 vectors": 13.7,
    "fft 8.4x8.4, 16 lanes": 9.31,
    "fft 4.4x4.4.4, 8 lanes": 11.2,
}


@pytest.mark.compile
def test_the_order_is_that_of_times_on_x86():
    target = targets.preset("znver4")
    costs = {}
    for config, choices in static_table.candidates(target, 1024, 32, 64):
        label = static_table.describe(config, choices)
        if label in MEASURED:
            loops = static_table.loops_of(config, choices, target)
            costs[label] = static_cost.cost(config, loops, static_cost.core_of(target.mcpu))
    assert sorted(costs, key=costs.__getitem__) == sorted(MEASURED, key=MEASURED.__getitem__)
