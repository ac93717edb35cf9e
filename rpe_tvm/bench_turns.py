"""How benchmarks check and time: right numbers or none, and contestants that take turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from rpe_tvm.errors import RpeTvmError

if TYPE_CHECKING:
    import torch

# The operator's error may be this many times the torch.fft formula's, plus a floor below float32's rounding.
ERROR_RATIO = 2.0
ERROR_FLOOR = 1e-7
# A peer with a larger error computes something else, and it is no yardstick for the operator's error.
PEER_ERROR_LIMIT = 1e-2

SAMPLED_ROWS = 64
MIN_ROUNDS = 3
# A contestant's turn: calls for this long, after one that is not timed and brings its data into cache.
TURN_SECONDS = 0.2

T = TypeVar("T")


class WrongResultError(RpeTvmError, ArithmeticError):
    """A contestant's numbers are wrong, so that its speed means nothing."""


@dataclass(frozen=True)
class PeerTime:
    """Median time of one peer in milliseconds; None where it was not run, and why."""

    name: str
    ms: float | None
    skipped: str | None = None


def ratio(peers: Sequence[PeerTime], name: str, ms: float) -> float | None:
    """How many times the operator's `ms` the peer of this name takes; None where it was not run."""
    of_peer = {each.name: each.ms for each in peers}[name]
    return None if of_peer is None else of_peer / ms


def peers_to_json(peers: Sequence[PeerTime], ms: float) -> dict[str, Any]:
    """The peers of a row by name, with their ratios to the operator's `ms`."""
    return {each.name: {"ms": each.ms, "ratio": ratio(peers, each.name, ms), "skipped": each.skipped} for each in peers}


def skip_notes(n: int, peers: Sequence[PeerTime], titles: Mapping[str, str]) -> list[str]:
    """Why peers of a row are missing, one line for each."""
    return [f"n={n}: {titles[each.name]} skipped: {each.skipped}" for each in peers if each.skipped is not None]


def check_sizes(lengths: Sequence[int], shortest: int, **sizes: int) -> None:
    """Raise ValueError for a size below 1 or a length below `shortest`."""
    named = [*((name, 1, size) for name, size in sizes.items()), *(("length", shortest, n) for n in lengths)]
    for name, least, size in named:
        if size < least:
            raise ValueError(f"Invalid {name}: expected at least {least}, got {size}; pass a larger number")


def rows_of(
    lengths: Sequence[int],
    threads: int | None,
    measure: Callable[[int, Callable[[str], None]], T],
    on_row: Callable[[T], None] | None,
) -> list[T]:
    """The rows that `measure` makes of each length, on so many torch threads, under a progress bar.

    `measure` gets the length and a function that shows what it is doing; `on_row` each row as soon as it is there.
    """
    import torch
    from tqdm import tqdm

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    rows = []
    try:
        with tqdm(lengths, unit="length", file=sys.stderr, leave=False) as progress:
            for n in progress:
                progress.set_description(f"n={n}")
                rows.append(measure(n, progress.set_postfix_str))
                if on_row is not None:
                    progress.clear()
                    on_row(rows[-1])
    finally:
        torch.set_num_threads(threads_before)
    return rows


def take_turns(
    contestants: Mapping[str, Callable[[], T]], seconds: float, on_round: Callable[[int], None]
) -> tuple[dict[str, list[float]], T]:
    """Time the contestants in turns for `seconds`, at least three rounds.

    Returns the times in seconds by name, and the last output of the first contestant.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    first = next(iter(contestants))
    kept: dict[str, T] = {}
    rounds = 0
    end = time.perf_counter() + seconds
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        rounds += 1
        on_round(rounds)
        for name, call in contestants.items():
            if times[name] and times[name][-1] < TURN_SECONDS:
                call()
            turn = time.perf_counter()
            while True:
                start = time.perf_counter()
                output = call()
                now = time.perf_counter()
                times[name].append(now - start)
                if now - turn > TURN_SECONDS:
                    break
            if name == first:
                kept[name] = output
            del output  # the next contestant may need the memory
    return times, kept[first]


def relative_error(output: torch.Tensor, rows: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """RMS of the error of `output[:, :, rows]` over the RMS of `expected`; NaN where anything is NaN."""
    return rms_error(output[:, :, rows.tolist()].double().cpu().numpy(), expected)


def rms_error(got: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """RMS of the error of `got` over the RMS of `expected`; NaN where anything is NaN."""
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def sample_rows(n: int) -> npt.NDArray[np.int64]:
    """One row at random from each of at most 64 stretches of equal length, and the last one."""
    edges = np.linspace(0, n, min(n, SAMPLED_ROWS) + 1).astype(np.int64)
    rows = np.random.default_rng(n).integers(edges[:-1], edges[1:])
    return np.unique(np.append(rows, n - 1))


def check_peer(title: str, place: str, error: float) -> None:
    """Raise WrongResultError if a peer computes something else; `place` says where, such as "n=1024"."""
    if not error <= PEER_ERROR_LIMIT:  # a NaN fails, too
        raise WrongResultError(
            f"Wrong result of {title} at {place}: expected a relative error of at most {PEER_ERROR_LIMIT:.0e} against "
            f"float64, got {error:.1e}; no speed is shown: check torch"
        )


def check_operator(place: str, error: float, torch_error: float, ratio: float = ERROR_RATIO) -> None:
    """Raise WrongResultError unless the operator is nearly as exact as the same formula in torch, at `torch_error`."""
    limit = ratio * torch_error + ERROR_FLOOR
    if not error <= limit:  # a NaN fails, too
        raise WrongResultError(
            f"Wrong result of rpe_tvm at {place}: expected a relative error of at most {limit:.1e} against float64 "
            f"({ratio:g} times torch's {torch_error:.1e}), got {error:.1e}; no speed is shown: run "
            "`python -m rpe_tvm cache clear`, measure again, and report it if it comes back"
        )
