"""Arguments of the attention function of one bucket, and rows of its result in float64 to check candidates with."""

from __future__ import annotations

import numpy as np

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune.case import Array, Case, Exact, Output, checked_places, random_features, random_weights, spectrum


def _direct_table(config: AttentionConfig, weights: Exact) -> Array:
    length = config.length
    table = np.zeros(twiddles.weight_table_shape(config, len(weights), length, length), np.float32)
    middle = table.shape[1] // 2
    table[:, middle - length + 1 : middle + length] = weights
    return table


def attention_case(config: AttentionConfig, heads: int) -> Case:
    """Return a full bucket, batch 1; algorithm and factorisation decide how features and weights are laid out."""
    random = np.random.default_rng(0)
    length, d = config.length, config.head_dim
    (q, phi_q), (k, phi_k) = (random_features(random, config, heads) for _ in range(2))
    value = random.standard_normal((1, heads, length, d)).astype(np.float32)
    weights = random_weights(random, config, heads)
    table = (_direct_table if config.algorithm == "direct" else spectrum)(config, weights)
    rows = checked_places(length)
    expected = np.empty((heads, len(rows), d))
    for head in range(heads):
        for index, row in enumerate(rows):
            toeplitz = weights[head, length - 1 - row : 2 * length - 1 - row]
            scores = q[head, :, row].astype(float) @ k[head] * toeplitz
            expected[head, index] = scores @ value[0, head] / scores.sum()
    places = np.arange(value.size).reshape(heads, length, d)[:, rows]
    out = Output(value.shape, places.reshape(-1, 1), expected.ravel())
    return Case((phi_q, phi_k, value, table, twiddles.tables(config)), (out,))
