"""Places the buffers of calls that run one after the other in one piece of memory, which they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """A buffer that is needed for a while.

    Attributes
    ----------
    size
        Bytes.
    first, last
        The first and the last call that it is needed at.
    """

    size: int
    first: int
    last: int


def place(buffers: Sequence[Buffer]) -> list[int]:
    """Return where each buffer starts; no two that are needed at the same call overlap.

    The largest buffer is placed first, each in the lowest gap that is large enough among those that are needed at the
    same time: "greedy by size" of Pisarchyk and Lee 2020, *Efficient Memory Management for Deep Neural Net Inference*.
    """
    starts: dict[int, int] = {}
    for number in sorted(range(len(buffers)), key=lambda each: -buffers[each].size):
        buffer, start = buffers[number], 0
        at_the_same_time = (
            (starts[other], buffers[other].size)
            for other in starts
            if buffers[other].first <= buffer.last and buffer.first <= buffers[other].last
        )
        for taken, size in sorted(at_the_same_time):
            if start + buffer.size <= taken:
                break
            start = max(start, taken + size)
        starts[number] = start
    return [starts[number] for number in range(len(buffers))]
