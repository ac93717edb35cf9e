"""The frozen configuration of one compiled Toeplitz product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rpe_tvm.plan import wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import check_factorisation, fields_from_json, fields_to_json


@dataclass(frozen=True)
class ToeplitzConfig:
    """What one compiled Toeplitz product computes: y_i = sum_j w[j-i] x_j for each head and channel.

    Parameters
    ----------
    head_dim : int
        Channels d of a head.
    length : int
        Bucket length P: the operator serves every number of inputs and of outputs up to it.
    outer, inner : tuple of int
        Radices of the two halves of the four-step split, P = prod(outer) * prod(inner).
    lanes : int
        Float32 lanes of one vector.
    """

    head_dim: int
    length: int
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    lanes: int

    op: ClassVar[str] = "toeplitz"

    def __post_init__(self) -> None:
        for field in ("head_dim", "length", "lanes"):
            if getattr(self, field) < 1:
                raise ValueError(f"Invalid {field}: expected a positive number, got {getattr(self, field)}.")
        check_factorisation(self.length, self.outer, self.inner)

    @property
    def name(self) -> str:
        """Readable name of the compiled operator, one per bucket."""
        return f"toeplitz-d{self.head_dim}-n{self.length}"

    @property
    def description(self) -> str:
        """One short word for tables: the factorisation."""
        return f"fft {'.'.join(map(str, self.outer))}x{'.'.join(map(str, self.inner))}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ToeplitzConfig:
        """Return the config that `to_json` wrote."""
        return cls(**fields_from_json(fields))


def choose(target_id: str, n: int, head_dim: int, lanes: int) -> ToeplitzConfig:
    """Return the config for up to `n` inputs and outputs: the factorisation of attention by fft.

    Parameters
    ----------
    target_id : str
        As `x86_64-znver4`.
    n : int
        The larger of the numbers of inputs and outputs.
    head_dim : int
        Channels d.
    lanes : int
        Float32 lanes of the target's vectors.
    """
    fft = wisdom.fft_config(target_id, 1, head_dim, bucket_length(n), lanes)
    return ToeplitzConfig(head_dim, fft.length, fft.outer, fft.inner, fft.lanes)
