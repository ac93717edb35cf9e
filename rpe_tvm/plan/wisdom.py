"""Which algorithm and factorisation at which length: measured, else by counted cycles (ARM) or operations (x86)."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpe_tvm.errors import TuningError
from rpe_tvm.plan import static_rates
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import RADICES, AttentionConfig

LOGS = Path(__file__).resolve().parent.parent / "tuning_logs"

# Key in the manifest of logs that were measured on an emulated board.
EMULATED = "emulated"

# Lanes of a target -> sustained GFLOP/s of one thread by tiles and by FFT, for targets without counted cycles: tiles
# run near the peak of the multipliers, butterflies have more additions and memory traffic (measured on znver4 and
# znver3; their ratio is what counts).
_RATES = {16: (95.0, 75.0), 8: (89.0, 57.0)}

# Longer products of 8 lanes are made by parts (`schedules/cpu_parts.py`), one for each first radix of the columns.
_LONGEST_WHOLE = 32768


@dataclass(frozen=True)
class Wisdom:
    """One measured choice.

    Parameters
    ----------
    config : AttentionConfig
        The fastest config at its length, features and head dimension.
    ms : float
        Its time with the tuned schedule, in the setting that the manifest beside the table names.
    default_ms : float
        Its time with the default schedule, in the same run.
    """

    config: AttentionConfig
    ms: float
    default_ms: float


def directory(target_id: str, op: str) -> Path:
    """Return where the tuning logs of a target and an operator are shipped."""
    return LOGS / target_id / op


def is_emulated(logs: Path) -> bool:
    """Return whether the manifest of a directory of tuning logs says that an emulator measured them."""
    manifest = logs / "manifest.json"
    return manifest.exists() and bool(json.loads(manifest.read_text(encoding="utf-8")).get(EMULATED))


def refuse_emulated(logs: Path) -> None:
    """Raise where `is_emulated`.

    Raises
    ------
    TuningError
        If an emulator measured these logs.
    """
    if is_emulated(logs):
        raise TuningError(
            f"The tuning logs in {logs} were measured on an emulated board: their times mean nothing. Remove them, and "
            "tune on hardware (docs/tuning.md)."
        )


@functools.cache
def records(target_id: str, kind: type[AttentionConfig] = AttentionConfig) -> tuple[Wisdom, ...]:
    """Return the measured choices that are shipped for a target and the operator of `kind`, empty if there are none.

    Raises
    ------
    TuningError
        If an emulator measured them.
    """
    refuse_emulated(directory(target_id, kind.op))
    path = directory(target_id, kind.op) / "wisdom.json"
    if not path.exists():
        return ()
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return tuple(Wisdom(kind.from_json(e["config"]), e["ms"], e["default_ms"]) for e in entries)


def largest_radix(target_id: str, lanes: int) -> int:
    """Return the largest radix of a target: 8 complex vectors fill the 16 registers of 32-bit ARM and of AVX2."""
    has_16_registers = target_id.startswith("armv7") or (target_id.startswith("x86_64") and lanes == 8)
    return 5 if has_16_registers else max(RADICES)


def greedy_radices(points: int, largest: int = max(RADICES)) -> tuple[int, ...] | None:
    """Factor into few radices of 8, 5, 4, 3 and 2 up to `largest`, or return None if another prime is left."""
    radices = []
    for radix in (8, 5, 3, 4, 2):
        while radix <= largest and points % radix == 0:
            radices.append(radix)
            points //= radix
    if largest < max(RADICES) and radices[:1] == [3] and 4 in radices:
        # measured on znver3: 3, 4, 9 and 17 % less time at 3072, 2304, 1152 and 4608
        radices.remove(4)
        radices.insert(0, 4)
    return tuple(radices) if points == 1 else None


def factorisations(
    length: int, count: int = 4, largest: int = max(RADICES)
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the most promising (outer, inner) radices: few stages, halves of like size."""
    found = []
    for n1 in range(2, length // 2 + 1):
        if length % n1:
            continue
        outer, inner = greedy_radices(n1, largest), greedy_radices(length // n1, largest)
        if outer is None or inner is None:
            continue
        stages = len(outer) + len(inner)
        found.append((stages + 0.5 * abs(math.log2(n1 * n1 / length)), n1, outer, inner))
    return [(outer, inner) for _, _, outer, inner in sorted(found)[:count]]


def direct_config(num_features: int, head_dim: int, length: int, lanes: int) -> AttentionConfig:
    """Return the default config of the direct algorithm."""
    # 128 queries share a tile of keys and values where there are enough tiles for all threads
    tile = (128, 64) if length >= 512 else (64, 64)
    if lanes == 8:
        # 16 registers sum scores of 6 queries; two tiles of 32 fill a bucket of 64
        rows = min((48, 54, 60), key=lambda rows: -length % rows)
        tile = (rows, 64) if length > 64 else (32, 64)
    return AttentionConfig(num_features, head_dim, length, "direct", tile=tile, lanes=lanes)


def fft_lanes(target_id: str, lanes: int) -> int:
    """Return the lanes of the fft algorithm: Zen 4 splits 512-bit instructions, half the working set is faster."""
    return 8 if target_id.endswith("znver4") else lanes


def fft_config(target_id: str, num_features: int, head_dim: int, length: int, lanes: int) -> AttentionConfig:
    """Return the default config of the fft algorithm: the fewest cycles of a target whose code was counted."""
    rates = static_rates.rates(target_id)
    outer, inner = rates.best_halves(length) if rates else factorisations(length, 1, largest_radix(target_id, lanes))[0]
    lanes = fft_lanes(target_id, lanes)
    # fewer lanes where more would be filled up with zeros
    while lanes > 4 and -(-head_dim // lanes) * lanes < -(-head_dim // (2 * lanes)) * 2 * lanes:
        lanes //= 2
    return AttentionConfig(num_features, head_dim, length, "fft", outer, inner, lanes=lanes)


def forward_config(target_id: str, num_features: int, head_dim: int, length: int, lanes: int) -> AttentionConfig:
    """Return `fft_config` for the forward pass: with AVX2 a long product has parts of an eighth, which fit into L2."""
    config = fft_config(target_id, num_features, head_dim, length, lanes)
    if largest_radix(target_id, lanes) == max(RADICES) or static_rates.rates(target_id) or length <= _LONGEST_WHOLE:
        return config
    inner, outer = factorisations(length // 8, 1, largest_radix(target_id, lanes))[0]
    return replace(config, outer=(8, *outer), inner=inner)


def rule(target_id: str, length: int, num_features: int, head_dim: int, lanes: int) -> AttentionConfig:
    """Return a config from cycles counted in compiled code, or from operation counts where there are none."""
    found = forward_config(target_id, num_features, head_dim, length, lanes)
    rates = static_rates.rates(target_id)
    if rates:
        direct = rates.direct(length, num_features, head_dim, lanes)
        fft = rates.fft((found.outer, found.inner), num_features, head_dim, lanes)
    else:
        direct_rate, fft_rate = _RATES.get(lanes, _RATES[16])
        direct = 2 * length**2 * (num_features + head_dim) / direct_rate
        fft = 10 * length * math.log2(length) * num_features * head_dim / fft_rate
    return direct_config(num_features, head_dim, length, lanes) if direct <= fft else found


def choose(target_id: str, n: int, num_features: int, head_dim: int, lanes: int) -> AttentionConfig:
    """Return the config for up to `n` positions.

    A measured choice for the same bucket, features and head dimension is taken as it is. Where only other lengths were
    measured with these features and head dimension, the algorithm of the nearest one is taken, else that of the rule.

    Parameters
    ----------
    target_id : str
        As `x86_64-znver4`.
    n : int
        The larger of the numbers of queries and keys.
    num_features, head_dim : int
        Features m and channels d.
    lanes : int
        Float32 lanes of the target's vectors.
    """
    length = bucket_length(n)
    ruled = rule(target_id, length, num_features, head_dim, lanes)
    measured = [
        w.config for w in records(target_id) if (w.config.num_features, w.config.head_dim) == (num_features, head_dim)
    ]
    if not measured:
        return ruled
    nearest = min(measured, key=lambda config: abs(math.log(config.length / length)))
    if nearest.length == length:
        return nearest
    if nearest.algorithm == "direct":
        default = direct_config(num_features, head_dim, length, lanes)
        # with AVX2 rows fit the length: where the rule's tile was the best one, its tile for this length is better
        is_ruled = lanes == 8 and nearest == direct_config(num_features, head_dim, nearest.length, lanes)
        # a tile that is right for many queries has more rows than a much shorter sequence
        return default if is_ruled or 2 * length < nearest.length else replace(nearest, length=length)
    return replace(forward_config(target_id, num_features, head_dim, length, lanes), lanes=nearest.lanes)
