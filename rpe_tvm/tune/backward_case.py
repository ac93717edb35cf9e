"""Arguments of the gradients' function of one bucket, and parts of its results in float64 to check candidates with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.tune.case import Array, Case, Exact, Output, checked_places, random_features, random_weights, spectrum


def backward_case(config: BackwardConfig, heads: int) -> Case:
    """Return a full bucket, batch 1, of `te.fft_backward`; its sums over parts are checked."""
    random = np.random.default_rng(0)
    length, d = config.length, config.head_dim
    (q, phi_q), (k, phi_k) = (random_features(random, config, heads) for _ in range(2))
    value, grad_out = random.standard_normal((2, 1, heads, length, d)).astype(np.float32)
    inverse = random.uniform(0.5, 1.5, (heads, length)).astype(np.float32)
    weights = random_weights(random, config, heads)
    of_matrix = spectrum(config, weights)
    grad = grad_out[0].astype(float) * inverse[..., None]
    arguments = (
        np.stack((phi_q, phi_k)),
        value,
        grad_out,
        inverse[None][..., twiddles.feature_positions(config, length, length)],
        np.stack((of_matrix, of_matrix * np.array([1, -1], np.float32))),
        twiddles.tables(config),
    )
    rows = checked_places(length)
    of_phi, of_value = _rows(q, k, value[0], grad, weights, rows)
    places = np.arange(value.size).reshape(heads, length, d)[:, rows]
    outputs = (
        _grad_phi(config, of_phi, rows),
        _correlation(config, q, k, value[0], grad, rows),
        Output(value.shape, places.reshape(-1, 1), of_value.ravel()),
    )
    return Case(arguments, outputs)


def _rows(
    q: Array, k: Array, value: Array, grad: Exact, weights: Exact, rows: npt.NDArray[np.int64]
) -> tuple[Exact, Exact]:
    """Return gradients of features `[H, 2, m, rows]`, queries first, and of value `[H, rows, d]`."""
    heads, m, length = q.shape
    of_phi = np.empty((heads, 2, m, len(rows)))
    of_value = np.empty((heads, len(rows), value.shape[2]))
    for head in range(heads):
        for index, row in enumerate(rows):
            of_row = weights[head, length - 1 - row : 2 * length - 1 - row]
            of_column = weights[head, row : length + row][::-1]
            of_phi[head, 0, :, index] = k[head] @ (of_row * (value[head] @ grad[head, row]))
            of_phi[head, 1, :, index] = q[head] @ (of_column * (grad[head] @ value[head, row]))
            of_value[head, index] = (of_column * (k[head, :, row].astype(float) @ q[head])) @ grad[head]
    return of_phi, of_value


def _grad_phi(config: BackwardConfig, of_phi: Exact, rows: npt.NDArray[np.int64]) -> Output:
    heads, _, m, _ = of_phi.shape
    split = split_of(config)
    shape = (1, heads, config.parts, 2, m, split.n2, split.q, split.s)
    columns = np.argsort(twiddles.feature_positions(config, config.length, config.length).ravel())[rows]
    places = np.arange(np.prod(shape)).reshape(heads, config.parts, 2, m, config.length)[..., columns]
    return Output(shape, np.moveaxis(places, 1, -1).reshape(-1, config.parts), of_phi.ravel())


def _correlation(
    config: BackwardConfig, q: Array, k: Array, value: Array, grad: Exact, places: npt.NDArray[np.int64]
) -> Output:
    heads, length, d = value.shape
    split, radix, lanes = split_of(config), config.inner[-1], config.lanes
    positions = np.arange(length)

    def pairs(x: npt.NDArray[np.floating]) -> npt.NDArray[np.complex128]:
        """Two channels in one complex number, as they ride in one lane: `[H, n, pairs]`."""
        padded = np.zeros((heads, length, -(-d // (2 * lanes)), 2, lanes))
        padded.reshape(heads, length, -1)[..., :d] = x
        return (padded[..., 0, :] + 1j * padded[..., 1, :]).reshape(heads, length, -1)

    values, grads = pairs(value), pairs(grad)
    expected = np.empty((heads, 2, len(places)), complex)
    for parity in (0, 1):
        for index, frequency in enumerate(twiddles.frequencies(config)[places]):
            wave = np.exp(-2j * np.pi * positions * ((frequency + parity / 2) / length))
            first, second = (k * wave) @ values, (q * wave) @ grads
            expected[:, parity, index] = np.sum(first * second.conj(), axis=(1, 2))
    shape = (1, heads, config.parts, 2, split.n1, split.n2 // radix, radix, 2)
    found = np.arange(np.prod(shape)).reshape(heads, config.parts, 2, length, 2)[:, :, :, places]
    exact = np.stack((expected.real, expected.imag), -1)
    return Output(shape, np.moveaxis(found, 1, -1).reshape(-1, config.parts), exact.ravel())
