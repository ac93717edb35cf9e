"""Gradients of the reference: against finite differences, and where they are zero by definition."""

from __future__ import annotations

import numpy as np
import pytest

from rpe_tvm import reference
from rpe_tvm.errors import ShapeError

NAMES = ("query", "key", "value", "rpe_bias", "projection")


def make_inputs(n_q, n_k, batch=2, heads=3, d=4, m=5):
    random = np.random.default_rng(n_q + 10 * n_k)
    shapes = [(batch, heads, n_q, d), (batch, heads, n_k, d), (batch, heads, n_k, d), (heads, n_q + n_k - 1), (m, d)]
    return [random.standard_normal(shape) for shape in shapes], random.standard_normal((batch, heads, n_q, d))


@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize(("n_q", "n_k", "is_causal"), [(6, 6, False), (6, 6, True), (5, 9, False), (1, 1, False)])
def test_against_finite_differences(feature_map, n_q, n_k, is_causal):
    inputs, grad_out = make_inputs(n_q, n_k)
    gradients = reference.attention_gradients(grad_out, *inputs, feature_map, is_causal)
    random = np.random.default_rng(1)
    step = 1e-5
    for number, name in enumerate(NAMES):
        direction = random.standard_normal(inputs[number].shape)

        def loss(scale, number=number, direction=direction):
            moved = list(inputs)
            moved[number] = inputs[number] + scale * direction
            return np.sum(grad_out * reference.attention(*moved, feature_map, is_causal)[2])

        expected = (loss(step) - loss(-step)) / (2 * step)
        got = np.sum(getattr(gradients, name) * direction)
        assert getattr(gradients, name).shape == inputs[number].shape
        assert abs(got - expected) <= 1e-7 * max(1.0, abs(expected)), name


def test_what_a_causal_query_does_not_see_has_no_gradient():
    inputs, grad_out = make_inputs(6, 6)
    grad_out[:, :, 3:] = 0.0
    gradients = reference.attention_gradients(grad_out, *inputs, is_causal=True)
    assert not gradients.key[:, :, 3:].any() and not gradients.value[:, :, 3:].any()
    assert not gradients.rpe_bias[:, 6:].any()


def test_zero_vectors_and_no_keys_have_zero_gradients():
    inputs, grad_out = make_inputs(4, 4)
    inputs[0][0, 0, 2] = 0.0
    gradients = reference.attention_gradients(grad_out, *inputs)
    assert not gradients.query[0, 0, 2].any() and all(np.isfinite(each).all() for each in gradients)
    inputs, grad_out = make_inputs(4, 0)
    assert not any(each.any() for each in reference.attention_gradients(grad_out, *inputs))


def test_a_gradient_of_another_shape_is_refused():
    inputs, grad_out = make_inputs(4, 4)
    with pytest.raises(ShapeError, match=r"grad_out: expected \[2, 3, 4, 4\], got \[2, 3, 3, 4\]"):
        reference.attention_gradients(grad_out[:, :, :3], *inputs)
