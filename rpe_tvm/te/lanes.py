"""Two real channels in one complex lane, and the twist that makes a skew-circulant product a circulant one."""

from __future__ import annotations

from tvm import tirx

from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.complex import Complex, Expr


def lane_groups(channels: int, lanes: int) -> int:
    """Return how many complex vectors hold `channels` real channels; the last one is filled up with zeros."""
    return -(-channels // (2 * lanes))


def channel(group: Expr, part: Expr, lane: Expr, lanes: int) -> Expr:
    """Return the channel in the real (part 0) or imaginary (part 1) half of a lane of a group."""
    return group * (2 * lanes) + part * lanes + lane


def place(ch: Expr, lanes: int) -> tuple[Expr, Expr, Expr]:
    """Return (group, part, lane) of a channel."""
    return ch // (2 * lanes), ch // lanes % 2, ch % lanes


def existing(ch: Expr, channels: int, lanes: int, element: Expr) -> Expr:
    """Return zero in lanes past the last channel, where there are any."""
    return element if channels % (2 * lanes) == 0 else tirx.if_then_else(ch < channels, element, cx.real(0.0))


def twist(tables: dft.Tables, parity: Expr, position: Expr, value: Complex) -> Complex:
    """Return D value for parity 1, value for parity 0."""
    turned = cx.mul(value, tables.parity(position))
    return tuple(tirx.Select(parity == 0, value[k], turned[k]) for k in (0, 1))


def untwisted_sum(tables: dft.Tables, position: Expr, values: list[Complex]) -> Complex:
    """Return the sum of both parities, D* applied to the second."""
    return cx.add(values[0], cx.mul_conj(values[1], tables.parity(position)))
