"""A cost of schedules for CPUs that are not at hand: cycles of the inner loops, counted in the compiled code.

The cycles of an iteration are those that the core needs to issue its instructions, its vector arithmetic and its loads
and stores, whichever takes longest. How often a loop runs follows from what its operator computes. Caches and latencies
are left out, so the cost puts schedules into an order; it is no time.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpe_tvm.errors import TuningError
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.te.lanes import lane_groups
from rpe_tvm.tune.assembly import Loop

_BUTTERFLY = {2: 4, 3: 12, 4: 16, 5: 32, 8: 52}  # least vector instructions, see tests/schedules/test_arm_code.py
_TWIDDLE = 4

_ARITHMETIC = r"(f(mla|mls|add|sub|mul|neg) v|v(fma|fms|mla|mls|add|sub|mul|neg)\.f32 q|vf?n?m?(add|sub|mul)[\d]*ps )"
_FUSED = r"(fml[as] v|vfm[as]\.f32 q|vfn?m(add|sub)\d+ps )"
_SUBTRACTION = r"(fsub v|vsub\.f32 q|vsubps )"
_MEMORY = r"(v?ld|v?st|(?!lea).*\(%r)"


@dataclass(frozen=True)
class Core:
    """What a core can begin in a cycle: instructions, vector instructions of arithmetic, loads and stores."""

    width: float
    arithmetic: float
    memory: float


# Arm's software optimization guides of these cores; Zen 4 for instructions of 256 bits.
_CORES = {
    "cortex-a7": Core(2, 0.5, 0.5),
    "cortex-a53": Core(2, 1, 1),
    "cortex-a72": Core(3, 2, 2),
    "cortex-a76": Core(4, 2, 2),
    "neoverse-n1": Core(4, 2, 2),
    "neoverse-v1": Core(8, 4, 3),
    "neoverse-v2": Core(8, 4, 3),
    "znver4": Core(6, 2, 3),
}
_DEFAULT = _CORES["cortex-a72"]


def core_of(mcpu: str) -> Core:
    """Return the core of a CPU, that of Cortex-A72 for one that is not known here."""
    return _CORES.get(mcpu, _DEFAULT)


def cost(config: AttentionConfig, loops: list[Loop], core: Core) -> float:
    """Return the cycles of one head of a full bucket.

    Parameters
    ----------
    config : AttentionConfig
        What was compiled.
    loops : list of Loop
        Of its function `attention`.
    core : Core
        For which core.

    Raises
    ------
    TuningError
        If the loops are not those of the config's algorithm, because LLVM changed them.
    """
    return _direct(config, loops, core) if config.algorithm == "direct" else _fft(config, loops, core)


def cycles(loop: Loop, core: Core) -> float:
    """Return the cycles of one iteration."""
    # an instruction of 512 bits counts twice
    double = loop.count(".*%zmm")
    arithmetic, memory = loop.count(_ARITHMETIC), loop.count(_MEMORY)
    factor = 1 + double / len(loop.instructions)
    count = len(loop.instructions) + double
    return max(count / core.width, factor * arithmetic / core.arithmetic, factor * memory / core.memory)


def _direct(config: AttentionConfig, loops: list[Loop], core: Core) -> float:
    products = [loop for loop in loops if loop.count(_FUSED) and not loop.count(_SUBTRACTION)]
    if len(products) < 2:
        raise TuningError(f"Expected inner loops of scores and of values in {config.name}, found {len(products)}.")
    scores, *values = products  # the others share the channels
    terms = config.num_features * _per_lane(scores, _FUSED, core)
    terms += config.head_dim * sum(_per_lane(loop, _FUSED, core) for loop in values) / len(values)
    return config.length**2 * terms


def _fft(config: AttentionConfig, loops: list[Loop], core: Core) -> float:
    stages = [loop for loop in loops if loop.count(_SUBTRACTION) >= 2 and loop.count(_FUSED) >= 2]
    if not stages:
        raise TuningError(f"Expected inner loops of butterflies in {config.name} ({config.description}), found none.")
    # LLVM unrolls short stages, so loops are not told apart: all stand for the average instruction of arithmetic
    weight = [loop.count(_ARITHMETIC) for loop in stages]
    each = sum(w * _per_lane(loop, _ARITHMETIC, core) for w, loop in zip(weight, stages, strict=True)) / sum(weight)
    keys = lane_groups(config.num_features, config.lanes)
    values = lane_groups(config.head_dim, config.lanes) * config.num_features
    return 2 * config.length * (keys + values) * config.lanes * _arithmetic_of_a_point(config) * each


def _per_lane(loop: Loop, pattern: str, core: Core) -> float:
    """Return the cycles for each lane of an instruction that matches."""
    lanes = 16 if loop.count(".*%zmm") else 8 if loop.count(".*%ymm") else 4
    return cycles(loop, core) / (loop.count(pattern) * lanes)


def _arithmetic_of_a_point(config: AttentionConfig) -> float:
    """Return the least vector instructions of a product there and back: butterflies, twiddles, and the spectrum."""
    radices = config.outer + config.inner
    return 2 * sum((_BUTTERFLY[radix] + _TWIDDLE * (radix - 1)) / radix for radix in radices) + _TWIDDLE
