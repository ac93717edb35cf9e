"""Arguments of the attention function of one bucket, and rows of its result in float64 to check candidates with."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig

Array = npt.NDArray[np.float32]

CHECKED_ROWS = 8


def _spectrum(config: AttentionConfig, weights: npt.NDArray[np.float64]) -> Array:
    """Return the digit-ordered spectrum of the Toeplitz weights `[H, 2 P - 1]`, as `te.weights` makes it."""
    length = config.length
    cyclic = np.zeros((len(weights), 2 * length))
    cyclic[:, -np.arange(1 - length, length) % (2 * length)] = weights
    spectrum = np.fft.fft(cyclic) / (2 * length)
    n1 = math.prod(config.outer)
    frequency = twiddles.digit_order(config.outer)[:, None] + n1 * twiddles.digit_order(config.inner)
    parts = np.stack([spectrum[:, 2 * frequency.ravel() + parity] for parity in (0, 1)], 1)
    return np.stack([parts.real, parts.imag], -1).astype(np.float32)


def _direct_table(config: AttentionConfig, weights: npt.NDArray[np.float64]) -> Array:
    length = config.length
    table = np.zeros(twiddles.weight_table_shape(config, len(weights), length, length), np.float32)
    middle = table.shape[1] // 2
    table[:, middle - length + 1 : middle + length] = weights
    return table


def save(config: AttentionConfig, heads: int, path: Path) -> None:
    """Write the arguments of a full bucket, batch 1, and rows of the result, to an `.npz` file.

    Parameters
    ----------
    config : AttentionConfig
        The bucket; algorithm and factorisation decide how the weights are laid out.
    heads : int
        Heads H.
    path : Path
        Where to write `argument0` ... `argument4`, `rows` `[rows]` and `expected` `[H, rows, d]`.
    """
    random = np.random.default_rng(0)
    length, m, d = config.length, config.num_features, config.head_dim
    positions = twiddles.feature_positions(config, length, length)

    def features() -> Array:
        phi = np.zeros((1, heads, m, positions.size), np.float32)
        phi[..., :length] = np.exp(0.5 * random.standard_normal((1, heads, m, length))) / m
        return phi

    phi_q, phi_k = features(), features()
    value = random.standard_normal((1, heads, length, d)).astype(np.float32)
    weights = np.exp(0.5 * random.standard_normal((heads, 2 * length - 1)) - 1.0)
    table = (_direct_table if config.algorithm == "direct" else _spectrum)(config, weights)
    rows = np.unique(np.linspace(0, length - 1, CHECKED_ROWS).astype(int))
    expected = np.empty((heads, len(rows), d))
    for head in range(heads):
        for index, row in enumerate(rows):
            toeplitz = weights[head, length - 1 - row : 2 * length - 1 - row]
            scores = phi_q[0, head, :, row].astype(float) @ phi_k[0, head, :, :length] * toeplitz
            expected[head, index] = scores @ value[0, head] / scores.sum()
    arguments = (phi_q[..., positions], phi_k[..., positions], value, table, twiddles.tables(config))
    named = {f"argument{number}": argument for number, argument in enumerate(arguments)}
    np.savez(path, rows=rows, expected=expected, **named)  # type: ignore[arg-type]
