"""Sums over the lanes of several vectors at once: halves of two vectors are added as one vector."""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import te

from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr


def step_names(name: str, lanes: int) -> list[str]:
    """Return the blocks of `sums_over_lanes` in the order in which they are computed."""
    return [f"{name}{2**step}" for step in reversed(range(lanes.bit_length() - 1))]


def summed_at_once(vectors: int, lanes: int) -> int:
    """Return how many vectors are summed together: as many sums then lie in one vector."""
    return math.gcd(vectors, lanes)


def sums_over_lanes(name: str, wide: te.Tensor) -> Callable[..., Expr]:
    """Return the function (indices but the last) -> sum over the last axis; blocks are as `step_names` says.

    A vector is summed in log2(lanes) steps, each of which adds one half to the other. `summed_at_once` vectors share
    them: as long as there are two, a step adds the halves of both and puts the results into one vector. So 8 vectors of
    8 lanes take 7 additions in place of 24, and their sums lie side by side.

    Parameters
    ----------
    name : str
        Of the blocks.
    wide : te.Tensor
        `[..., vectors, lanes]`, the number of lanes a power of two.
    """
    lead, count, lanes = list(wide.shape[:-2]), int(wide.shape[-2]), int(wide.shape[-1])
    at_once = vectors = summed_at_once(count, lanes)
    width = lanes  # lanes of each sum that are still to be added

    def load(*index: Expr) -> Expr:
        *at, block, vector, lane = index
        return wide[(*at, block * at_once + vector, lane)]

    for each in step_names(name, lanes):
        merged = 2 if vectors > 1 else 1
        vectors, lanes, half = vectors // merged, lanes * merged // 2, width // 2

        def add(
            *index: Expr,
            load: Callable[..., Expr] = load,
            vectors: int = vectors,
            merged: int = merged,
            half: int = half,
        ) -> Expr:
            *at, vector, lane = index
            source = vector + lane // half % merged * vectors
            first = lane // (merged * half) * (2 * half) + lane % half
            return load(*at, source, first) + load(*at, source, first + half)

        step = cx.compute((*lead, count // at_once, vectors, lanes), add, each)
        load, width = (lambda *index, step=step: step[index]), half
    return lambda *index: load(*index[:-1], index[-1] // at_once, 0, index[-1] % at_once)
