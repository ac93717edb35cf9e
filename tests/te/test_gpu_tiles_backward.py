"""Gradients in float32 by tiles: the generated CUDA source, run on the CPU, against float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_warp_on_cpu import Kernel  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.te.gpu_tile_backward_keys import key_gradients
from rpe_tvm.te.gpu_tile_backward_queries import query_gradients
from rpe_tvm.te.gpu_tile_diagonals import THREADS, bias_gradient

pytestmark = pytest.mark.compile

CONFIGS = {
    "default": TileBackwardConfig(32, 64, 256, 64, 128, 1),
    "odd sizes": TileBackwardConfig(11, 37, 256, 64, 32, 1),
}
SENTINEL = 12345.0
B, H = 2, 2
NAMES = ("phi_q", "phi_k", "value", "rpe_bias")


@dataclass(frozen=True)
class Kernels:
    config: TileBackwardConfig
    queries: Kernel
    keys: Kernel
    bias: Kernel


@pytest.fixture(scope="module", params=CONFIGS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("kernels")
    return Kernels(config, *(Kernel(make(config), folder) for make in (query_gradients, key_gradients, bias_gradient)))


def _rows(x: np.ndarray, fill: float = np.nan) -> tuple[np.ndarray, np.ndarray]:
    """x with positions before heads and rows that begin anywhere, and the memory, which is `fill` elsewhere."""
    batch, heads, n, d = x.shape
    memory = np.full((batch, n + 3, heads, d + 2), fill, np.float32)
    found = memory[:, :n, :, 1 : d + 1].transpose(0, 2, 1, 3)
    found[...] = x
    return found, memory


def _strides(**arrays: np.ndarray) -> dict[str, int]:
    return {
        f"{name}_{axis}_stride": array.strides[i] // 4
        for name, array in arrays.items()
        for i, axis in enumerate(("batch", "head", "row"))
    }


class Problem:
    """Arguments of one call."""

    def __init__(self, config: TileBackwardConfig, n_query: int, n_key: int, causal: bool, spread: float = 1.0) -> None:
        rng = np.random.default_rng(n_query + n_key)
        self.config, self.causal = config, causal
        m, d = config.num_features, config.head_dim
        self.phi_q, self.phi_k = (
            np.exp(spread * rng.normal(size=(B, H, n, m))).astype(np.float32) for n in (n_query, n_key)
        )
        self.value, self.grad_out = (rng.normal(size=(B, H, n, d)).astype(np.float32) for n in (n_key, n_query))
        self.bias = rng.normal(size=(H, n_query + n_key - 1)).astype(np.float32)

    def weights(self) -> np.ndarray:
        allowed = self.bias[:, : self.phi_q.shape[2] if self.causal else None].astype(np.float64)
        return np.exp(allowed - allowed.max(1, keepdims=True))

    def out(self) -> np.ndarray:
        """The result of the forward pass, rounded once."""
        phi_q, phi_k, value = (x.astype(np.float64) for x in (self.phi_q, self.phi_k, self.value))
        n_query, n_key = phi_q.shape[2], phi_k.shape[2]
        table = np.zeros(self.bias.shape)
        table[:, : self.weights().shape[1]] = self.weights()
        offset = np.arange(n_key) - np.arange(n_query)[:, None] + n_query - 1
        with np.errstate(invalid="ignore"):
            scores = np.einsum("bhim,bhjm->bhij", phi_q, phi_k) * table[:, offset]
            terms = scores[..., None] * value[:, :, None]
            if self.causal:
                hidden = offset > n_query - 1
                scores, terms = np.where(hidden, 0, scores), np.where(hidden[..., None], 0, terms)
            return (terms.sum(3) / scores.sum(3)[..., None]).astype(np.float32)

    def run(self, kernels: Kernels, late: bool = True, backwards: bool = False) -> dict[str, np.ndarray]:
        config, length = self.config, self.config.length
        n_query, n_key, m = self.phi_q.shape[2], self.phi_k.shape[2], config.num_features
        phi_q, phi_k = (np.zeros((B, H, m, length), np.float32) for _ in range(2))
        phi_q[..., :n_query], phi_k[..., :n_key] = (x.swapaxes(2, 3) for x in (self.phi_q, self.phi_k))
        table = np.zeros((H, 2 * length), np.float32)
        weights = self.weights()
        table[:, length - n_query + 1 :][:, : weights.shape[1]] = weights
        terms = np.full((2, B, H, length), np.nan, np.float32)
        grads = [np.full((B, H, m, 1, length), np.nan, np.float32) for _ in range(2)]
        diagonals = np.full((B, H, *config.diagonals), np.nan, np.float32)
        grad_value, memory = _rows(np.full(self.value.shape, SENTINEL), SENTINEL)
        grad_bias = np.full(self.bias.shape, np.nan, np.float32)
        given = dict(value=self.value, grad_out=self.grad_out, out=self.out())
        strided = {name: _rows(x)[0] for name, x in given.items()} | dict(grad_value=grad_value)
        arguments: dict[str, Any] = dict(batch=B, heads=H, n_query=n_query, n_key=n_key)
        arguments |= dict(causal=int(self.causal), offsets=n_query + n_key - 1)
        arguments |= dict(phi_q=phi_q, phi_k=phi_k, table=table, terms=terms, diagonals=diagonals)
        arguments |= dict(grad_phi_q=grads[0], grad_phi_k=grads[1], grad_rpe_bias=grad_bias)
        arguments |= _strides(**strided) | strided
        kernels.queries((-(-n_query // config.rows), H, B), arguments, late, backwards)
        kernels.keys((-(-n_key // config.rows), H, B), arguments, late, backwards)
        kernels.bias((-(-grad_bias.shape[1] // THREADS), H, 1), arguments, late, backwards)
        assert (memory[:, n_key:] == SENTINEL).all() and (memory[..., [0, -1]] == SENTINEL).all()
        found = [grad[:, :, :, 0, :n].swapaxes(2, 3) for grad, n in zip(grads, (n_query, n_key), strict=True)]
        return dict(zip(NAMES, (*found, grad_value, grad_bias), strict=True))

    def expected(self) -> dict[str, np.ndarray]:
        exact = (x.astype(np.float64) for x in (self.grad_out, self.phi_q, self.phi_k, self.value, self.bias))
        return dict(zip(NAMES, reference.core_gradients(*exact, self.causal), strict=True))


def _check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, x in found.items():
        assert np.isfinite(x).all(), name
        error = np.linalg.norm(x - expected[name]) / np.linalg.norm(expected[name])
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(
    ("n_query", "n_key", "causal", "late", "backwards"),
    [
        (70, 133, False, True, False),
        (200, 70, True, True, True),
        (37, 135, True, False, True),
        (1, 1, False, False, False),
    ],
)
def test_gradients(kernels: Kernels, n_query: int, n_key: int, causal: bool, late: bool, backwards: bool) -> None:
    problem = Problem(kernels.config, n_query, n_key, causal)
    found, expected = problem.run(kernels, late, backwards), problem.expected()
    if n_query == n_key == 1:  # all but the value's are 0, up to rounding errors
        size = np.abs(problem.grad_out).max() * np.abs(problem.value).max() * kernels.config.head_dim
        assert all(np.abs(found[name]).max() < 1e-6 * size for name in ("phi_q", "phi_k", "rpe_bias"))
        found, expected = ({"value": x["value"]} for x in (found, expected))
    _check(found, expected, 2e-6)
    if causal:
        assert (problem.run(kernels)["rpe_bias"][:, n_query:] == 0).all()
