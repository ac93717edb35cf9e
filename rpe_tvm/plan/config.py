"""The frozen configuration of one compiled attention operator."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

RADICES = (2, 3, 4, 5, 8)

Algorithm = Literal["direct", "fft"]


def check_factorisation(length: int, outer: tuple[int, ...], inner: tuple[int, ...]) -> None:
    """Raise ValueError unless the radices of both halves of a four-step split multiply to `length`."""
    if math.prod(outer) * math.prod(inner) != length or not outer or not inner:
        raise ValueError(
            f"Invalid factorisation: expected radices whose product is {length}, got outer {outer} and inner {inner}."
        )
    if not set(outer + inner) <= set(RADICES):
        raise ValueError(f"Invalid radix: expected radices of {RADICES}, got {outer + inner}.")


def fields_to_json(config: Any) -> dict[str, Any]:
    """Return the fields of a config as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def fields_from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that `fields_to_json` wrote."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


@dataclass(frozen=True)
class AttentionConfig:
    """What one compiled attention operator computes, and by which algorithm.

    Parameters
    ----------
    num_features : int
        Features m of the feature map.
    head_dim : int
        Channels d of query, key and value of a head.
    length : int
        Bucket length P: the operator serves every n up to it.
    algorithm : {"direct", "fft"}
        `direct` multiplies tiles of the n x n weights, `fft` transforms every feature and channel pair.
    outer, inner : tuple of int
        Only for `fft`: radices of the two halves of the four-step split, P = prod(outer) * prod(inner).
    tile : tuple of int
        Only for `direct`: queries and keys of one tile.
    lanes : int
        Float32 lanes of one vector: 16 with AVX-512, 8 with AVX2; on some AVX-512 CPUs 8 is faster.
    """

    num_features: int
    head_dim: int
    length: int
    algorithm: Algorithm
    outer: tuple[int, ...] = ()
    inner: tuple[int, ...] = ()
    tile: tuple[int, int] = (0, 0)
    lanes: int = 16

    op: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        for field in ("num_features", "head_dim", "length", "lanes"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        if self.algorithm == "fft":
            check_factorisation(self.length, self.outer, self.inner)
        elif self.algorithm == "direct":
            if min(self.tile) < 1:
                raise ValueError(f"Invalid tile: expected two positive numbers for direct, got {self.tile}.")
        else:
            raise ValueError(f"Invalid algorithm: expected 'direct' or 'fft', got {self.algorithm!r}.")

    @property
    def panel(self) -> int:
        """Only for `direct`: vectors of channels in a panel of packed values; 0 where nothing is packed.

        AVX2 packs; with 16 and with 4 lanes it has not been measured.
        """
        if self.lanes != 8:
            return 0
        vectors = -(-self.head_dim // self.lanes)
        # of those whose sums fit into 16 registers the one that fills up the fewest vectors with zeros
        return vectors if vectors < 3 else min((4, 5, 3), key=lambda panel: -vectors % panel)

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"attention-m{self.num_features}-d{self.head_dim}-n{self.length}"

    @property
    def description(self) -> str:
        """One short word for tables: the algorithm with its factorisation or tile."""
        if self.algorithm == "direct":
            return f"direct {self.tile[0]}x{self.tile[1]}"
        return f"fft {'.'.join(map(str, self.outer))}x{'.'.join(map(str, self.inner))}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> AttentionConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))
