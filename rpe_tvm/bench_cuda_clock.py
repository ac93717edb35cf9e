"""Time and memory of calls on an NVIDIA GPU: events around calls, contestants in turns, replays of a captured graph."""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from rpe_tvm.bench_turns import MIN_ROUNDS

# A contestant's turn: about as many calls as take this long, and not more than so many.
TURN_SECONDS = 0.02
TURN_CALLS = 50
# A graph holds several calls, so that starting its replay counts little.
GRAPH_CALLS = 10
REPLAYS = 30

T = TypeVar("T")


class Event(Protocol):
    """A mark in the queue of work of a GPU, as torch.cuda.Event is."""

    def record(self) -> None:
        """Put the mark behind all work so far."""

    def synchronize(self) -> None:
        """Wait until the GPU has come to the mark."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds to a later mark."""


@dataclass(frozen=True)
class Turns(Generic[T]):
    """Times in seconds by contestant, the first one's last output, and by name why others failed on the way."""

    times: dict[str, list[float]]
    output: T
    failures: dict[str, str]


@dataclass(frozen=True)
class Failure:
    """Why a call failed."""

    reason: str


@dataclass(frozen=True)
class Probe:
    """Seconds of one call, and the bytes that it takes at most beyond what is allocated before, its output included."""

    seconds: float
    peak_bytes: int


def new_event() -> Event:
    """An event of the current GPU that keeps its time."""
    import torch

    cuda: Any = torch.cuda  # torch has no types for it
    return cast(Event, cuda.Event(enable_timing=True))


def time_calls(call: Callable[[], T], count: int, untimed: int = 1) -> tuple[list[float], T]:
    """Seconds of each of `count` calls behind some untimed ones, and the last output.

    The calls are queued without waiting between them, as a model does it: where the GPU is faster than Python and the
    driver can launch, it waits for them, and their time is what is measured.
    """
    for _ in range(untimed):
        call()
    marks = [new_event() for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        output = call()
        mark.record()
    marks[-1].synchronize()
    return [1e-3 * before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)], output


def take_turns(contestants: Mapping[str, Callable[[], T]], estimates: Mapping[str, float], seconds: float) -> Turns[T]:
    """Time the contestants in turns for about `seconds`, each for its share and at least three turns.

    Parameters
    ----------
    contestants
        Calls by name.
    estimates
        Seconds of a call, by name.
    seconds
        For all of them together.

    Raises
    ------
    Exception
        What the first contestant raises. Another one that fails takes no more turns.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    failures: dict[str, str] = {}
    kept: dict[str, T] = {}
    share = seconds / len(contestants)
    first = next(iter(contestants))
    waiting, rounds = list(contestants), 0
    while waiting:
        rounds += 1
        for name in waiting:
            count = min(TURN_CALLS, int(TURN_SECONDS / max(estimates[name], 1e-9)))
            turn = functools.partial(time_calls, contestants[name], max(count, 1), untimed=min(count, 1))
            done = turn() if name == first else attempt(turn)
            if isinstance(done, Failure):
                failures[name] = done.reason
                continue
            times[name] += done[0]
            if name == first:
                kept[name] = done[1]
            del done  # the next contestant may need the memory
        waiting = [
            name for name in waiting if name not in failures and (rounds < MIN_ROUNDS or sum(times[name]) < share)
        ]
    return Turns(times, kept[first], failures)


def attempt(call: Callable[[], T]) -> T | Failure:
    """What `call` gives, or why it failed; after a failure its memory is free again."""
    import torch

    try:
        return call()
    except Exception as error:  # what compilers and drivers raise has no class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gc.collect()  # here the error, whose frames hold tensors, is gone
    torch.cuda.empty_cache()
    return Failure(reason)


def probe(call: Callable[[], object]) -> Probe:
    """Time and memory of one call; not the first one, which may compile or set up tables."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (seconds,), output = time_calls(call, 1, untimed=0)
    del output
    return Probe(seconds, torch.cuda.max_memory_allocated() - before)


def free_bytes() -> int:
    """Memory of the GPU that this process can still take."""
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def capture(call: Callable[[], T], count: int) -> tuple[Any, T]:
    """A CUDA graph of `count` calls, whose replays cost no launching, and where the last call's output will be.

    Raises
    ------
    RuntimeError
        If the call cannot be captured.
    """
    import torch

    # Torch asks for a first call on another stream, for libraries that set up their work areas then.
    cuda: Any = torch.cuda  # torch has no types for streams
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        call()
    cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            output = call()
    return graph, output


def graph_seconds(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call in a replay of a CUDA graph, and what it gave there; as `capture`."""
    graph, output = capture(call, GRAPH_CALLS)
    times, _ = time_calls(graph.replay, REPLAYS)
    return statistics.median(times) / GRAPH_CALLS, output
