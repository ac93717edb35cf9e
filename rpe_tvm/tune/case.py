"""What a candidate is called with and checked against: one call of a tuned function, as an `.npz` file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig

Array = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

CHECKED = 8
# relative RMS error over what is checked of an output; right candidates are at about 3e-7
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Output:
    """One output of a function, and what is known of it.

    Parameters
    ----------
    shape : tuple of int
        Of the whole output.
    index : ndarray of int
        `[checked, terms]`: places in the flattened output whose sum is checked.
    expected : ndarray
        `[checked]`: these sums in float64.
    """

    shape: tuple[int, ...]
    index: npt.NDArray[np.int64]
    expected: Exact


@dataclass(frozen=True)
class Case:
    """Arguments of a function, without its outputs, and its outputs."""

    arguments: Sequence[Array]
    outputs: Sequence[Output]

    def save(self, path: Path) -> None:
        """Write `argument<k>`, and `shape<k>`, `index<k>` and `expected<k>` of each output, to an `.npz` file."""
        named: dict[str, Any] = {f"argument{k}": argument for k, argument in enumerate(self.arguments)}
        for k, output in enumerate(self.outputs):
            named |= {f"shape{k}": output.shape, f"index{k}": output.index, f"expected{k}": output.expected}
        np.savez(path, **named)

    @classmethod
    def load(cls, path: Path) -> Case:
        """Read what `save` wrote."""
        with np.load(path) as file:
            numbers = [[key for key in file if key.startswith(name)] for name in ("argument", "shape")]
            arguments = [file[f"argument{k}"] for k in range(len(numbers[0]))]
            outputs = [
                Output(tuple(map(int, file[f"shape{k}"])), file[f"index{k}"], file[f"expected{k}"])
                for k in range(len(numbers[1]))
            ]
        return cls(arguments, outputs)

    def check(self, outputs: Sequence[Array]) -> tuple[float, str]:
        """Return the largest relative error of a call's outputs, and what is wrong with it, or nothing."""
        errors = [
            float(np.linalg.norm(found.ravel()[known.index].sum(-1, dtype=float) - known.expected))
            / float(np.linalg.norm(known.expected))
            for found, known in zip(outputs, self.outputs, strict=True)
        ]
        error = max(errors, key=lambda each: np.inf if np.isnan(each) else each)
        # written so that NaN fails
        return error, "" if error <= TOLERANCE else f"wrong result: relative error {error:.1e}, allowed {TOLERANCE:.0e}"


def checked_places(length: int) -> npt.NDArray[np.int64]:
    """Return a few of the numbers below `length`, first and last among them."""
    return np.unique(np.linspace(0, length - 1, CHECKED).astype(int))


def random_features(random: np.random.Generator, config: AttentionConfig, heads: int) -> tuple[Array, Array]:
    """Return features `[H, m, P]` by position, and as the buffer `[1, H, m, rows, columns]` that functions read."""
    positions = twiddles.feature_positions(config, config.length, config.length)
    phi = np.zeros((heads, config.num_features, positions.size), np.float32)
    scatter = random.standard_normal((heads, config.num_features, config.length))
    phi[..., : config.length] = np.exp(0.5 * scatter) / config.num_features
    return phi[..., : config.length], phi[None][..., positions]


def random_weights(random: np.random.Generator, config: AttentionConfig, heads: int) -> Exact:
    """Return Toeplitz weights `[H, 2 P - 1]`, offset t = j - i at index t + P - 1."""
    return np.exp(0.5 * random.standard_normal((heads, 2 * config.length - 1)) - 1.0)


def spectrum(config: AttentionConfig, weights: Exact) -> Array:
    """Return the digit-ordered spectrum `[H, 2, P, 2]` of Toeplitz weights, as `te.weights` makes it."""
    length = config.length
    cyclic = np.zeros((len(weights), 2 * length))
    cyclic[:, -np.arange(1 - length, length) % (2 * length)] = weights
    transformed = np.fft.fft(cyclic) / (2 * length)
    parts = np.stack([transformed[:, 2 * twiddles.frequencies(config) + parity] for parity in (0, 1)], 1)
    return np.stack([parts.real, parts.imag], -1).astype(np.float32)
