"""Makes the table of `plan.static_rates` for a target: compiles all loops that a choice can need, counts cycles."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from tvm.s_tir import Schedule

from rpe_tvm.build import manifest
from rpe_tvm.build.workloads import function_of
from rpe_tvm.plan import static_rates, wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.static_rates import Rates
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.targets import TargetSpec
from rpe_tvm.te import shapes
from rpe_tvm.tune import static_cost
from rpe_tvm.tune.assembly import Loop, assembly_of, innermost_loops

# Loops do not depend on them.
FEATURES, HEAD_DIM, DIRECT_LENGTH = 32, 64, 512

# Of tiles: rows and vectors of the output that are summed in registers.
REGISTER_BLOCKS = ((1, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2))


def loops_of(config: AttentionConfig, choices: Choices, target: TargetSpec) -> list[Loop]:
    """Return the innermost loops of `attention`, as it is shipped, with these decisions."""
    sch = Schedule(function_of(config, shapes.symbolic()))
    schedules_of(target.machine).schedule(sch, config, choices)
    return innermost_loops(assembly_of(sch.mod["main"].with_attr("global_symbol", "attention"), target))


def table(target: TargetSpec) -> dict[str, Any]:
    """Return what `plan.static_rates` reads, as JSON values, with its provenance."""
    core = static_cost.core_of(target.mcpu)
    return {
        "format": 1,
        "source": "static",
        "made_by": "python scripts/static_cost.py --write",
        "note": "cycles counted in compiled code, not measured",
        "versions": manifest.versions(),
        "core": asdict(core),
        "register_blocks": [[*block, *cycles] for block, cycles in register_blocks(target).items()],
        "rates": rates(target).to_json(),
    }


def candidates(
    target: TargetSpec, length: int, num_features: int, head_dim: int
) -> Iterator[tuple[AttentionConfig, Choices]]:
    """Yield tiles with several register blocks, and FFTs with several factorisations."""
    schedules = schedules_of(target.machine)
    direct = wisdom.direct_config(num_features, head_dim, length, target.lanes)
    for rows, vectors in REGISTER_BLOCKS:
        if (head_dim // target.lanes) % vectors == 0:
            yield direct, replace(schedules.default_choices(direct), row_block=rows, vectors=vectors)
    for largest in (8, 5):
        for lanes in sorted({target.lanes, 8}):
            outer, inner = wisdom.factorisations(length, 1, largest)[0]
            config = AttentionConfig(num_features, head_dim, length, "fft", outer, inner, lanes=lanes)
            yield config, schedules.default_choices(config)


def describe(config: AttentionConfig, choices: Choices) -> str:
    """Return a short name of a candidate."""
    if config.algorithm == "fft":
        return f"{config.description}, {config.lanes} lanes"
    return f"{config.description}, {choices.row_block} rows of {choices.vectors} vectors"


def register_blocks(target: TargetSpec) -> dict[tuple[int, int], tuple[float, float]]:
    """Return (rows, vectors) -> cycles for a multiply-add of the scores and of the sums of values of `direct`."""
    config = wisdom.direct_config(FEATURES, HEAD_DIM, DIRECT_LENGTH, target.lanes)
    default = schedules_of(target.machine).default_choices(config)
    found = {}
    for rows, vectors in REGISTER_BLOCKS:
        if (HEAD_DIM // target.lanes) % vectors == 0:
            loops = loops_of(config, replace(default, row_block=rows, vectors=vectors), target)
            score, value = static_cost.direct_rates(config, loops, static_cost.core_of(target.mcpu))
            found[rows, vectors] = round(score, 3), round(value, 3)
    return found


def rates(target: TargetSpec) -> Rates:
    """Return the rates of a target, of `direct` with the default register block.

    Raises
    ------
    TuningError
        If LLVM changed the loops so that they cannot be told apart.
    """
    config = wisdom.direct_config(FEATURES, HEAD_DIM, DIRECT_LENGTH, target.lanes)
    choices = schedules_of(target.machine).default_choices(config)
    core = static_cost.core_of(target.mcpu)
    score, value = static_cost.direct_rates(config, loops_of(config, choices, target), core)
    cycles: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    spills: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    weights = []
    for outer, inner in _halves(wisdom.largest_radix(target.id, target.lanes)):
        length = math.prod(outer + inner)
        config = AttentionConfig(FEATURES, HEAD_DIM, length, "fft", outer, inner, lanes=target.lanes)
        loops = loops_of(config, schedules_of(target.machine).default_choices(config), target)
        points = static_cost.stage_cycles(config, loops, core)
        kinds = static_rates.stages(outer, inner)
        for (kind, radix), (cycles_of_point, spills_of_point) in zip(kinds, points, strict=True):
            cycles[kind][radix].append(cycles_of_point)
            spills[kind][radix].append(spills_of_point)
        arithmetic = sum(static_cost.least_arithmetic(kind, radix) / radix for kind, radix in kinds)
        weights.append(static_cost.WEIGHTS * sum(each for each, _ in points) / arithmetic)
    return Rates(round(score, 3), round(value, 3), **_means(cycles), weights=_mean(weights), spills=_means(spills))


def _halves(largest: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Return factorisations in which every radix up to the largest one stands at every place.

    Three stages each, so that no stage is a loop of so few iterations that LLVM unrolls it into another one; two of 8,
    as they stand in most lengths.
    """
    if largest < 8:
        return ((3, 4, 5), (2, 4, 5)), ((5, 4, 4), (3, 4, 4)), ((2, 4, 3), (5, 4, 3)), ((5, 4, 2), (3, 4, 2))
    return (
        ((2, 4, 8), (8, 8)),
        ((8, 4, 5), (5, 4, 5)),
        ((2, 4, 4), (3, 4, 4)),
        ((8, 4, 3), (8, 4, 3)),
        ((5, 4, 2), (8, 4, 2)),
    )


def _means(found: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, dict[int, float]]:
    return {kind: {radix: _mean(each) for radix, each in sorted(of_kind.items())} for kind, of_kind in found.items()}


def _mean(found: Sequence[float]) -> float:
    return round(sum(found) / len(found), 3)
