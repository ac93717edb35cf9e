"""Which algorithm and factorisation where no board measured it: from cycles that were counted in compiled code.

`scripts/static_cost.py --write` compiles the inner loops for a target and writes `static.json` beside its tuning logs.
Nothing is compiled here. The cycles put choices into an order; they are no time.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

LOGS = Path(__file__).resolve().parent.parent / "tuning_logs"
FILE = "static.json"

# CPUs of a machine without a table of their own take this one's.
_ANY_OF_MACHINE = {"aarch64": "aarch64-generic", "armv7": "armv7-cortex-a7"}

# Factorisations are about the same up to this ratio of their cycles.
_SAME = 1.02

Halves = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Rates:
    """Cycles for a vector of lanes.

    Parameters
    ----------
    score, value : float
        A multiply-add of the scores of `direct`, and of its sums of values.
    forward, backward : mapping
        Radix -> a point in a stage of columns or rows that is not the last (first) one.
    split, unsplit : mapping
        Radix -> a point in the last forward and the first inverse stage of columns, with the twiddles between halves.
    turn : mapping
        Radix -> a point in the loop where a row turns around: last forward stage, spectrum, first inverse stage.
    weights : float
        A point, for its weights of features and their sum.
    spills : mapping
        Name of one of the fields by radix -> radix -> registers that the loop of a point stores to the stack.
    """

    score: float
    value: float
    forward: Mapping[int, float]
    backward: Mapping[int, float]
    split: Mapping[int, float]
    unsplit: Mapping[int, float]
    turn: Mapping[int, float]
    weights: float
    spills: Mapping[str, Mapping[int, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rates:
        """Return the rates that `to_json` wrote."""
        return cls(**{field.name: _plain(values[field.name]) for field in fields(cls)})

    def direct(self, length: int, num_features: int, head_dim: int, lanes: int) -> float:
        """Return the cycles of one head by tiles."""
        return length**2 * (num_features * self.score + head_dim * self.value) / lanes

    def fft(self, halves: Halves, num_features: int, head_dim: int, lanes: int) -> float:
        """Return the cycles of one head by FFT: products of groups of keys and, for each feature, of values."""
        keys, values = (-(-count // (2 * lanes)) for count in (num_features, head_dim))
        products = keys + values * num_features
        length = math.prod(halves[0]) * math.prod(halves[1])
        return 2 * length * (self._cycles(halves) * products + self.weights * values * num_features)

    def best_halves(self, length: int) -> Halves:
        """Return the (outer, inner) radices of the fewest cycles; of about as many, of the fewest loads and stores.

        Raises
        ------
        ValueError
            If the length has a prime that is no radix.
        """
        splits = {
            points: abs(math.log2(points**2 / length))
            for points in range(2, length // 2 + 1)
            if length % points == 0 and self._factors(points) and self._factors(length // points)
        }
        if not splits:
            raise ValueError(f"Invalid length: expected a product of {sorted(self.turn)}, got {length}.")
        # columns and rows live in L1, so neither may be much longer than the other
        allowed = max(1.0, min(splits.values()))
        found = [
            (self._cycles(halves), imbalance, halves)
            for points, imbalance in splits.items()
            if imbalance <= allowed
            for halves in itertools.product(self._factors(points), self._factors(length // points))
        ]
        enough = _SAME * min(cycles for cycles, _, _ in found)
        close = [each for each in found if each[0] <= enough]
        return min(close, key=lambda each: (round(self._memory(each[2]), 6), round(each[0], 6), each[1:]))[2]

    def _cycles(self, halves: Halves) -> float:
        return sum(float(getattr(self, kind)[radix]) for kind, radix in stages(*halves))

    def _memory(self, halves: Halves) -> float:
        """Return the vectors that are loaded and stored for a point: 4 in every loop, and 2 for each that spills."""
        return sum(4 + 2 * self.spills[kind][radix] for kind, radix in stages(*halves))

    def _factors(self, points: int) -> tuple[tuple[int, ...], ...]:
        return _factors(points, tuple(sorted(self.turn)))


def stages(outer: tuple[int, ...], inner: tuple[int, ...]) -> list[tuple[str, int]]:
    """Return (kind, radix) of the loops of a product in order; kinds are the fields of `Rates` by radix."""
    return [
        *(("forward", radix) for radix in outer[:-1]),
        ("split", outer[-1]),
        *(("forward", radix) for radix in inner[:-1]),
        ("turn", inner[-1]),
        *(("backward", radix) for radix in inner[-2::-1]),
        ("unsplit", outer[-1]),
        *(("backward", radix) for radix in outer[-2::-1]),
    ]


@functools.cache
def rates(target_id: str) -> Rates | None:
    """Return the table of a target, or None where there is none: x86."""
    path = path_of(target_id)
    if not path.exists():
        path = path_of(_ANY_OF_MACHINE.get(target_id.partition("-")[0], target_id))
    if not path.exists():
        return None
    return Rates.from_json(json.loads(path.read_text(encoding="utf-8"))["rates"])


def targets() -> list[str]:
    """Return the targets that have a table."""
    return sorted(path.parent.name for path in LOGS.glob(f"*/{FILE}"))


def path_of(target_id: str) -> Path:
    """Return the file of a target's table."""
    return LOGS / target_id / FILE


def _plain(value: Any) -> Any:
    """Return numbers as keys where JSON has text."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if str(key).isdigit() else key: _plain(each) for key, each in value.items()}


@functools.cache
def _factors(points: int, radices: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the ways to factor into radices: any but 2 may be the last one, those before ascend.

    After a radix, a loop has as many iterations as the product of the next ones; LLVM unrolls one of two, and spills.
    """
    ways = set()
    for way in _ascending(points, radices, 1):
        for at, last in enumerate(way):
            if last > 2 or way[-1] == 2:
                ways.add((*way[:at], *way[at + 1 :], last))
    return tuple(sorted(ways))


def _ascending(points: int, radices: tuple[int, ...], least: int) -> list[tuple[int, ...]]:
    if points == 1:
        return [()]
    return [
        (radix, *rest)
        for radix in radices
        if radix >= least and points % radix == 0
        for rest in _ascending(points // radix, radices, radix)
    ]
