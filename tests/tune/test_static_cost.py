"""The order that the static cost gives."""

import pytest

from rpe_tvm.errors import TuningError
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune import static_cost
from rpe_tvm.tune.assembly import Loop
from rpe_tvm.tune.static_cost import Core

CORE = Core(width=3, arithmetic=2, memory=1)
DIRECT = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=4)
FFT = AttentionConfig(8, 16, 64, "fft", (8,), (8,), lanes=4)


def loop(**counts):
    texts = {
        "fused": "fmla v0.4s, v1.4s, v2.s[0]",
        "sub": "fsub v0.4s, v1.4s, v2.4s",
        "load": "ldr q0, [x0]",
        "spill": "ldr q0, [sp, #16]",
        "other": "add x0, x0, #16",
    }
    return Loop("f", ".L0", tuple(texts[name] for name, count in counts.items() for _ in range(count)))


def test_cycles_are_those_of_what_is_scarcest():
    assert static_cost.cycles(loop(fused=16), CORE) == 8
    assert static_cost.cycles(loop(fused=2, load=9), CORE) == 9
    assert static_cost.cycles(loop(fused=2, other=28), CORE) == 10
    wide = Loop("f", ".L0", ("vfmadd231ps %zmm0, %zmm1, %zmm2",) * 4)
    assert static_cost.cycles(wide, CORE) == 4  # twice as many as of 256 bits


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
