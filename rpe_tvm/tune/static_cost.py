"""A cost of schedules for CPUs that are not at hand: cycles of the inner loops, counted in the compiled code.

The cycles of an iteration are those that the core needs to issue its instructions, its vector arithmetic and its loads
and stores, whichever takes longest. How often a loop runs follows from what its operator computes. Caches and latencies
are left out, so the cost puts schedules into an order; it is no time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rpe_tvm.errors import TuningError
from rpe_tvm.plan import static_rates
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.te.lanes import lane_groups
from rpe_tvm.tune.assembly import Loop

_BUTTERFLY = {2: 4, 3: 12, 4: 16, 5: 32, 8: 52}  # least vector instructions, see tests/schedules/test_arm_code.py
_TWIDDLE = 4
WEIGHTS = 3  # of a point: weights of features, and their sum

_ARITHMETIC = r"(f(mla|mls|add|sub|mul|neg) v|v(fma|fms|mla|mls|add|sub|mul|neg)\.f32 q|vf?n?m?(add|sub|mul)[\d]*ps )"
_FUSED = r"(fml[as] v|vfm[as]\.f32 q|vfn?m(add|sub)\d+ps )"
_SUBTRACTION = r"(fsub v|vsub\.f32 q|vsubps )"
_MEMORY = r"(v?ld|v?st|(?!lea).*\(%r)"


@dataclass(frozen=True)
class Core:
    """What a core can begin in a cycle: instructions, vector instructions of arithmetic, loads and stores.

    `accumulation` is the cycles until a sum can be added to again.
    """

    width: float
    arithmetic: float
    memory: float
    accumulation: float


# Arm's software optimization guides of these cores; Zen 4 for instructions of 256 bits.
_CORES = {
    "cortex-a7": Core(2, 0.5, 0.5, 8),
    "cortex-a53": Core(2, 1, 1, 4),
    "cortex-a72": Core(3, 2, 2, 3),
    "cortex-a76": Core(4, 2, 2, 2),
    "neoverse-n1": Core(4, 2, 2, 2),
    "neoverse-v1": Core(8, 4, 3, 2),
    "neoverse-v2": Core(8, 4, 3, 2),
    "znver4": Core(6, 2, 3, 4),
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
    begun = max(count / core.width, factor * arithmetic / core.arithmetic, factor * memory / core.memory)
    return max(begun, core.accumulation * _longest_sum(loop))


def _longest_sum(loop: Loop) -> float:
    """Return how many terms the loop adds, one after the other, to a sum of earlier iterations."""
    terms: dict[str, float] = {}  # 0 for what comes from an earlier iteration
    for instruction in loop.instructions:
        registers = re.findall(r"(?:%[xyz]mm|\b[vq])(\d+)", instruction)
        if registers:
            result = registers[-1] if "%" in instruction else registers[0]  # AT&T's syntax names it last
            is_sum = re.match(_FUSED, instruction) is not None
            # x86's 132 multiplies the result and adds the operand before it
            addend = registers[-2] if is_sum and "132" in instruction else result
            terms[result] = terms.get(addend, 0) + 1 if is_sum else -math.inf
    return max([0, *terms.values()])


def direct_rates(config: AttentionConfig, loops: list[Loop], core: Core) -> tuple[float, float]:
    """Return the cycles of a multiply-add of a vector of `config.lanes` in the scores and in the sums of values.

    Raises
    ------
    TuningError
        As of `cost`.
    """
    products = [loop for loop in loops if loop.count(_FUSED) and not loop.count(_SUBTRACTION)]
    if len(products) < 2:
        raise TuningError(f"Expected inner loops of scores and of values in {config.name}, found {len(products)}.")
    scores, *values = products  # the others share the channels
    value = sum(_per_lane(loop, _FUSED, core) for loop in values) / len(values)
    return _per_lane(scores, _FUSED, core) * config.lanes, value * config.lanes


def least_arithmetic(kind: str, radix: int) -> int:
    """Return the least vector instructions of a butterfly in a loop of `static_rates.stages`."""
    butterfly, twiddles = _BUTTERFLY[radix], _TWIDDLE * radix
    return {"turn": 2 * butterfly + twiddles, "split": butterfly + twiddles, "unsplit": butterfly + twiddles}.get(
        kind, butterfly + twiddles - _TWIDDLE
    )


def spills(loop: Loop) -> int:
    """Return how many vector registers an iteration stores to the stack.

    What it only loads from there was stored before the loop, and would be loaded from elsewhere. On 32-bit ARM LLVM
    spills by `vstm`, and stores to arrays by `vst1`.
    """
    return 2 * loop.count(r"stp [qd].*\bsp\b") + loop.count(r"(str|stur) [qd].*\bsp\b|vstm")


def stage_cycles(config: AttentionConfig, loops: list[Loop], core: Core) -> list[tuple[float, float]]:
    """Return the cycles and the `spills` of a point in each of `static_rates.stages`.

    Cycles are those of the product of the keys, which has no weights of features in it; spills those of either product.

    Raises
    ------
    TuningError
        If LLVM changed the loops so that they cannot be told apart.
    """
    butterflies = [loop for loop in loops if loop.count(_SUBTRACTION) >= 2 and loop.count(_FUSED) >= 2]
    of_keys = [loop for loop in butterflies if loop.function == butterflies[0].function]
    kinds = static_rates.stages(config.outer, config.inner)
    found: list[list[tuple[float, float]]] = []
    for loop in of_keys:
        # a stage is two loops where LLVM unrolled the one around it
        at = next((at for at in (len(found), len(found) - 1) if _butterflies(loop, kinds, at)), None)
        if at is None:
            found = []
            break
        if at == len(found):
            found.append([])
        points = _butterflies(loop, kinds, at) * kinds[at][1]
        same = [spills(each) for each in butterflies if _operations(each) == _operations(loop)]
        found[at].append((cycles(loop, core) / points, max(same) / points))
    if len(found) != len(kinds):
        raise TuningError(
            f"Expected inner loops of {kinds} in {config.name} ({config.description}), found arithmetic of "
            f"{[loop.count(_ARITHMETIC) for loop in of_keys]}."
        )
    return [(_mean([each[0] for each in stage]), _mean([each[1] for each in stage])) for stage in found]


def _operations(loop: Loop) -> tuple[int, int, int]:
    return loop.count(_ARITHMETIC), loop.count(_SUBTRACTION), loop.count(_FUSED)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _butterflies(loop: Loop, kinds: list[tuple[str, int]], at: int) -> int:
    """Return how many butterflies of a stage an iteration has, LLVM unrolls some; 0 if it is of another stage."""
    if not 0 <= at < len(kinds):
        return 0
    least, found = least_arithmetic(*kinds[at]), loop.count(_ARITHMETIC)
    count = round(found / least)
    return count if count * least <= found <= 1.2 * count * least else 0


def _direct(config: AttentionConfig, loops: list[Loop], core: Core) -> float:
    score, value = direct_rates(config, loops, core)
    return config.length**2 * (config.num_features * score + config.head_dim * value) / config.lanes


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
