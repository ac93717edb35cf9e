"""The inner loops that are compiled for ARM: arithmetic in vectors, near the least that there can be, without spills.

The least counts vector instructions, an addition, a multiplication or a fused multiply-add each, for one vector of four
lanes at each point:

- A butterfly of radix 2, 4 or 8 takes 4, 16 or 52: 2, 8 or 24 complex additions, and for radix 8 two rotations by 45
  degrees, of one complex addition each; their factor sqrt(1/2) can ride in fused multiply-adds of the next additions.
- A twiddle, or an element of the spectrum, takes 4: two multiplications and two fused multiply-adds.
- The weight of a feature takes 2, of which 1 rides in the additions of the first butterfly; the sum over features takes
  2 fused multiply-adds.
- Tiles take one fused multiply-add for four multiply-adds.
"""

from __future__ import annotations

import json
import re

import pytest

from rpe_tvm import targets
from rpe_tvm.build.lower import lower
from rpe_tvm.plan import static_rates, wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.tune.assembly import Loop, assembly_of, innermost_loops
from rpe_tvm.tune.static_cost import least_arithmetic, spills
from rpe_tvm.tune.static_table import loops_of

pytestmark = pytest.mark.compile

M, D = 32, 64
ARITHMETIC = r"(f(mla|mls|add|sub|mul|neg) v|v(fma|fms|mla|mls|add|sub|mul|neg)\.f32 q)"
FUSED = r"(fml[as] v|vfm[as]\.f32 q)"
SUBTRACTION = r"(fsub v|vsub\.f32 q)"
SCALAR = r"(fn?(mul|add|sub|madd|msub|div) [sd]\d|v(fma|fms|mla|mls|add|sub|mul|div)\.f32 s)"
STACK = r".*\[?\bsp\b"


def loops_in(config: AttentionConfig, target: targets.TargetSpec, name: str) -> list[Loop]:
    function = next(f for f in lower(config, target).mod.functions.values() if f.attrs["global_symbol"] == name)
    return [loop for loop in innermost_loops(assembly_of(function, target)) if loop.count(ARITHMETIC) >= 4]


# Registers that a loop stores to the stack, at most. On 64-bit ARM none does. 32-bit ARM has 16 of them, where a radix
# of 4 takes 8 and its twiddles up to 6; radix 2 would store none, and take 1.4 times the cycles. `sum` adds to the
# output.
SPILLS = {"cortex-a72": {}, "armv7": {"forward": 2, "split": 4, "turn": 6, "unsplit": 1, "sum": 6}}


@pytest.mark.parametrize(("name", "length", "most"), [("cortex-a72", 2048, 1.1), ("armv7", 4096, 1.13)])
def test_products_by_fft(name: str, length: int, most: float) -> None:
    target = targets.preset(name)
    config = wisdom.fft_config(target.id, M, D, length, target.lanes)
    choices = schedules_of(target.machine).default_choices(config)
    stages = [loop for loop in loops_of(config, choices, target) if loop.count(SUBTRACTION) >= 4]
    kinds = static_rates.stages(config.outer, config.inner)
    assert len(stages) == 2 * len(kinds)
    for loops, is_value in ((stages[: len(kinds)], False), (stages[len(kinds) :], True)):
        found = least = 0.0
        for number, (loop, (kind, radix)) in enumerate(zip(loops, kinds, strict=True)):
            # of values, weights of features in the first, their sum in the last
            weights = is_value * {0: radix, len(kinds) - 1: 2 * radix}.get(number, 0)
            minimum = least_arithmetic(kind, radix) + weights
            butterflies = max(1, round(loop.count(ARITHMETIC) / minimum))  # LLVM unrolls some
            assert minimum <= loop.count(ARITHMETIC) / butterflies <= most * minimum, (loop.label, kind)
            assert loop.count(FUSED) > 0 and loop.count(SCALAR) == 0, (loop.label, kind)
            place = "sum" if is_value and number == len(kinds) - 1 else kind
            assert spills(loop) / butterflies <= SPILLS[name].get(place, 0), (loop.label, place)
            # on 64-bit ARM, most of what is read from the stack is the constant sqrt(1/2), loaded once or twice
            assert name != "cortex-a72" or loop.count(STACK) <= 14, loop.label
            found += loop.count(ARITHMETIC) / butterflies / radix
            least += minimum / radix
        print(f"{name} {config.description}: arithmetic for each point {found:.1f}, at least {least:.1f}")
        assert found <= 1.08 * least
        instructions = sum(len(loop.instructions) for loop in loops)
        assert name != "cortex-a72" or sum(loop.count(STACK) for loop in loops) <= 0.03 * instructions


@pytest.mark.parametrize(("name", "accumulators"), [("cortex-a72", 16), ("armv7", 8)])
def test_tiles(name: str, accumulators: int) -> None:
    target = targets.preset(name)
    config = wisdom.direct_config(M, D, 512, target.lanes)
    loops = loops_of(config, schedules_of(target.machine).default_choices(config), target)
    products = [loop for loop in loops if loop.count(FUSED) >= 4]
    assert len(products) >= 2  # scores and values
    for loop in products:
        # not one instruction of arithmetic beside the multiply-adds: the ratio is 1
        assert loop.count(ARITHMETIC) == loop.count(FUSED) == accumulators, loop.label
        assert loop.count(SCALAR) == loop.count(STACK) == 0, loop.label
        assert len(loop.instructions) <= 1.7 * accumulators + 14, loop.label


@pytest.mark.parametrize("target_id", static_rates.targets())
def test_register_blocks_take_the_fewest_cycles(target_id: str) -> None:
    table = json.loads(static_rates.path_of(target_id).read_text(encoding="utf-8"))["register_blocks"]
    cycles = {(rows, vectors): M * score + D * value for rows, vectors, score, value in table}
    choices = schedules_of(target_id.partition("-")[0]).default_choices(wisdom.direct_config(M, D, 512, 4))
    assert cycles[choices.row_block, choices.vectors] == min(cycles.values()) < cycles[1, 1]


def test_features() -> None:
    target = targets.preset("cortex-a72")
    loops = loops_in(wisdom.direct_config(M, D, 512, target.lanes), target, "features_nprf")
    products = [loop for loop in loops if loop.count(FUSED) == loop.count(ARITHMETIC) == 16]
    assert products and all(loop.count(SCALAR) == loop.count(STACK) == 0 for loop in products)
    exponential = [loop for loop in loops if loop.count("frintm v") > 0]
    assert exponential and all(loop.count(SCALAR) == 0 and loop.count("bl ") == 0 for loop in exponential)


def test_loops_are_found_in_assembly() -> None:
    text = """
    .type f,@function
f:
    mov x0, #4
.LBB0_1:
    mov x1, #8
.LBB0_2:
    fmla v0.4s, v1.4s, v2.s[0] // comment
    subs x1, x1, #1
    b.ne .LBB0_2
    cbnz x0, .LBB0_1
    ret
"""
    (loop,) = innermost_loops(re.sub("    ", "\t", text))
    assert (loop.function, loop.label) == ("f", ".LBB0_2")
    assert loop.instructions == ("fmla v0.4s, v1.4s, v2.s[0]", "subs x1, x1, #1", "b.ne .LBB0_2")
    assert loop.count(FUSED) == 1 and loop.count(SCALAR) == 0
