"""Buffers that are needed at once never overlap, and the others share memory."""

from __future__ import annotations

import random

from rpe_tvm.edge.arena import Buffer, place


def test_no_two_that_are_needed_at_once_overlap() -> None:
    numbers = random.Random(0)
    for count in (0, 1, 2, 5, 40):
        buffers = []
        for _ in range(count):
            first = numbers.randrange(20)
            buffers.append(Buffer(64 * numbers.randrange(9), first, first + numbers.randrange(6)))
        starts = place(buffers)
        spans = list(zip(buffers, starts, strict=True))
        for k, (a, at) in enumerate(spans):
            for b, bt in spans[:k]:
                apart_in_time = a.last < b.first or b.last < a.first
                assert apart_in_time or at + a.size <= bt or bt + b.size <= at, (a, at, b, bt)


def test_a_chain_takes_two_places() -> None:
    starts = place([Buffer(64, call, call + 1) for call in range(10)])
    assert sorted(set(starts)) == [0, 64]


def test_a_gap_is_filled() -> None:
    # the second one leaves room below the third
    buffers = [Buffer(256, 0, 1), Buffer(128, 0, 9), Buffer(64, 2, 3)]
    assert place(buffers) == [0, 256, 0]
