"""The four-step split of a config by FFT: P points as N1 x N2, and the order in which columns are transformed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol


class Factorised(Protocol):
    """A config of an operator by FFT: `AttentionConfig` (of `fft`) or `ToeplitzConfig`."""

    @property
    def length(self) -> int: ...
    @property
    def outer(self) -> tuple[int, ...]: ...
    @property
    def inner(self) -> tuple[int, ...]: ...
    @property
    def lanes(self) -> int: ...


@dataclass(frozen=True)
class Split:
    """Sizes of the four-step split of `config.length`.

    Parameters
    ----------
    n1, n2 : int
        Points of a column (outer radices) and of a row (inner radices).
    q, s : int
        A column's first radix s, and n1 / s: a position is (s * Q + q) * N2 + n2, packed as `[n2, q, s]`.
    """

    n1: int
    n2: int
    q: int
    s: int

    def position(self, n2: Any, q: Any, s: Any) -> Any:
        """Return the position of (n2, q, s): numbers, NumPy arrays or TVM expressions."""
        return (s * self.q + q) * self.n2 + n2

    def packed(self, position: Any) -> tuple[Any, Any, Any]:
        """Return (n2, q, s) of a position."""
        n1 = position // self.n2
        return position % self.n2, n1 % self.q, n1 // self.q


def split_of(config: Factorised) -> Split:
    """Return the four-step split of a config by FFT."""
    n1 = math.prod(config.outer)
    return Split(n1=n1, n2=config.length // n1, q=n1 // config.outer[0], s=config.outer[0])
