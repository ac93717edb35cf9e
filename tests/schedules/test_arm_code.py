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

import re

import pytest

from rpe_tvm import targets
from rpe_tvm.build.lower import lower
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune.assembly import Loop, assembly_of, innermost_loops

pytestmark = pytest.mark.compile

M, D = 32, 64
BUTTERFLY = {2: 4, 4: 16, 8: 52}
ARITHMETIC = r"(f(mla|mls|add|sub|mul|neg) v|v(fma|fms|mla|mls|add|sub|mul|neg)\.f32 q)"
FUSED = r"(fml[as] v|vfm[as]\.f32 q)"
SUBTRACTION = r"(fsub v|vsub\.f32 q)"
SCALAR = r"(fn?(mul|add|sub|madd|msub|div) [sd]\d|v(fma|fms|mla|mls|add|sub|mul|div)\.f32 s)"
STACK = r".*\[?\bsp\b"


def loops_of(config: AttentionConfig, target: targets.TargetSpec, name: str) -> list[Loop]:
    function = next(f for f in lower(config, target).mod.functions.values() if f.attrs["global_symbol"] == name)
    return [loop for loop in innermost_loops(assembly_of(function, target)) if loop.count(ARITHMETIC) >= 4]


def stage_minima(config: AttentionConfig, is_value: bool) -> list[tuple[int, int]]:
    """(points, least arithmetic) of one iteration of each stage of a product by FFT, in order.

    The last forward and the first inverse stage of rows are one loop.
    """
    *outer, outer_last = config.outer
    *inner, inner_last = config.inner
    stages = [(r, BUTTERFLY[r] + 4 * (r - 1)) for r in outer]
    stages += [(outer_last, BUTTERFLY[outer_last] + 4 * outer_last)]  # with the twiddles of the split
    stages += [(r, BUTTERFLY[r] + 4 * (r - 1)) for r in inner]
    stages += [(inner_last, 2 * BUTTERFLY[inner_last] + 4 * inner_last)]
    stages += [(r, BUTTERFLY[r] + 4 * (r - 1)) for r in reversed(inner)]
    stages += [(outer_last, BUTTERFLY[outer_last] + 4 * outer_last)]
    stages += [(r, BUTTERFLY[r] + 4 * (r - 1)) for r in reversed(outer)]
    if is_value:  # weights of features in the first, their sum in the last
        (first, least), (last, least_of_last) = stages[0], stages[-1]
        stages[0], stages[-1] = (first, least + first), (last, least_of_last + 2 * last)
    return stages


def test_products_by_fft() -> None:
    target = targets.preset("cortex-a72")
    config = wisdom.fft_config(M, D, 2048, target.lanes)
    assert config.description == "fft 8.4x8.8"
    stages = [loop for loop in loops_of(config, target, "attention") if loop.count(SUBTRACTION) >= 4]
    half = len(stages) // 2
    for loops, is_value in ((stages[:half], False), (stages[half:], True)):
        minima = stage_minima(config, is_value)
        assert len(loops) == len(minima)
        for loop, (_, least) in zip(loops, minima, strict=True):
            assert least <= loop.count(ARITHMETIC) <= 1.1 * least, loop.label
            assert loop.count(FUSED) > 0 and loop.count(SCALAR) == 0, loop.label
            # most of what is kept on the stack is the constant sqrt(1/2), loaded once or twice
            assert loop.count(STACK) <= 14, loop.label
        found, least = (
            sum(loop.count(ARITHMETIC) / points for loop, (points, _) in zip(loops, minima, strict=True)),
            sum(count / points for points, count in minima),
        )
        print(f"arithmetic for each point: {found:.1f}, at least {least:.1f}: {found / least:.3f}")
        assert found <= 1.08 * least
        assert sum(loop.count(STACK) for loop in loops) <= 0.03 * sum(len(loop.instructions) for loop in loops)


@pytest.mark.parametrize(("name", "accumulators"), [("cortex-a72", 16), ("armv7", 8)])
def test_tiles(name: str, accumulators: int) -> None:
    target = targets.preset(name)
    loops = loops_of(wisdom.direct_config(M, D, 512, target.lanes), target, "attention")
    products = [loop for loop in loops if loop.count(FUSED) >= 4]
    assert len(products) >= 2  # scores and values
    for loop in products:
        # not one instruction of arithmetic beside the multiply-adds: the ratio is 1
        assert loop.count(ARITHMETIC) == loop.count(FUSED) == accumulators, loop.label
        assert loop.count(SCALAR) == loop.count(STACK) == 0, loop.label
        assert len(loop.instructions) <= 1.7 * accumulators + 14, loop.label


def test_features() -> None:
    target = targets.preset("cortex-a72")
    loops = loops_of(wisdom.direct_config(M, D, 512, target.lanes), target, "features_nprf")
    (product, *_) = [loop for loop in loops if loop.count(FUSED) == 16]
    assert product.count(ARITHMETIC) == 16 and product.count(SCALAR) == product.count(STACK) == 0
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
