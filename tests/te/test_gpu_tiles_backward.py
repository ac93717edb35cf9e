"""Gradients in float32 by tiles: the generated CUDA source, run on the CPU, against float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm.s_tir.analysis import calculate_allocated_bytes
from tvm.target import Target

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
    "few channels": TileBackwardConfig(5, 7, 256, 32, 128, 1),  # which several groups of warps share
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

    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """The index of each pair into the bias, and which pairs meet."""
        n_query, n_key = self.phi_q.shape[2], self.phi_k.shape[2]
        offset = np.arange(n_key) - np.arange(n_query)[:, None] + n_query - 1
        return offset, offset < n_query if self.causal else np.full(offset.shape, True)

    def factors(self) -> np.ndarray:
        """The weight of each pair."""
        table = np.zeros(self.bias.shape)
        table[:, : self.weights().shape[1]] = self.weights()
        return table[:, self.offsets()[0]]

    def scores(self) -> np.ndarray:
        """Weighted scores of all pairs, 0 for those that do not meet."""
        with np.errstate(invalid="ignore"):
            scores = self.phi_q.astype(np.float64) @ self.phi_k.astype(np.float64).swapaxes(2, 3) * self.factors()
        return np.where(self.offsets()[1], scores, 0)

    def out(self) -> np.ndarray:
        """The result of the forward pass, rounded once; of keys that a query does not meet nothing is added."""
        _, meet = self.offsets()
        scores = self.scores()
        with np.errstate(invalid="ignore"):
            terms = np.where(meet[..., None], scores[..., None] * self.value[:, :, None].astype(np.float64), 0)
            return (terms.sum(3) / scores.sum(3)[..., None]).astype(np.float32)

    def run(
        self, kernels: Kernels, late: bool = True, backwards: bool = False, known: bool = False
    ) -> dict[str, np.ndarray]:
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
        denominators = self.scores().sum(3) if known else np.full((B, H, n_query), np.nan)
        arguments: dict[str, Any] = dict(batch=B, heads=H, n_query=n_query, n_key=n_key)
        arguments |= dict(causal=int(self.causal), offsets=n_query + n_key - 1)
        arguments |= dict(denominators=denominators.astype(np.float32), known=int(known))
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
    found, expected = problem.run(kernels, late, backwards, known=late != backwards), problem.expected()
    if n_query == n_key == 1:  # all but the value's are 0, up to rounding errors
        size = np.abs(problem.grad_out).max() * np.abs(problem.value).max() * kernels.config.head_dim
        assert all(np.abs(found[name]).max() < 1e-6 * size for name in ("phi_q", "phi_k", "rpe_bias"))
        found, expected = ({"value": x["value"]} for x in (found, expected))
    _check(found, expected, 2e-6)
    if causal:
        assert (problem.run(kernels)["rpe_bias"][:, n_query:] == 0).all()


def _dense(problem: Problem) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The result and the gradients of the dense formula in float32, by torch."""
    offset, meet = (torch.from_numpy(x) for x in problem.offsets())
    leaves = [torch.from_numpy(getattr(problem, name)).requires_grad_() for name in ("phi_q", "phi_k", "value", "bias")]
    phi_q, phi_k, value, bias = leaves
    allowed = bias[:, : phi_q.shape[2] if problem.causal else None]
    weights = torch.exp(bias - allowed.amax(1, keepdim=True).detach())[:, offset]
    scores = torch.where(meet, phi_q @ phi_k.mT * weights, 0.0)
    out = scores @ value / scores.sum(-1, keepdim=True)
    grads = torch.autograd.grad(out, leaves, torch.from_numpy(problem.grad_out))
    return out.detach().numpy(), dict(zip(NAMES, (x.numpy() for x in grads), strict=True))


@pytest.mark.parametrize(("n_query", "n_key", "causal"), [(250, 250, True), (130, 256, False)])
def test_every_row_is_as_exact_as_the_dense_formula(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, n_query: int, n_key: int, causal: bool
) -> None:
    """Features from 1e-8 to 1e7, as those of PRF without normalisation in training."""
    problem = Problem(kernels.config, n_query, n_key, causal)
    rng = np.random.default_rng(0)
    for phi in (problem.phi_q, problem.phi_k):
        phi[...] = 10 ** rng.uniform(-8, 7, phi.shape)
    out, dense = _dense(problem)
    monkeypatch.setattr(problem, "out", lambda: out)
    found, expected = problem.run(kernels), problem.expected()
    for name, size in _sizes(problem).items():
        errors = [np.abs(x - expected[name]) for x in (found[name], dense[name])]
        # of what cancels, as where one key has nearly all weight, only the error of its parts is bounded
        worst = [(error[size > 0] / size[size > 0]).max() for error in errors]
        assert worst[0] < 2 * worst[1] < 4e-6, (name, worst)
        if name != "rpe_bias":
            of_rows = [np.linalg.norm(x, axis=-1) for x in (*errors, expected[name])]
            exists = of_rows[2] > 0
            typical = [np.quantile(x[exists] / of_rows[2][exists], (0.5, 0.9, 0.99)) for x in of_rows[:2]]
            assert (typical[0] < 2 * typical[1]).all(), (name, typical)


def _sizes(problem: Problem) -> dict[str, np.ndarray]:
    """Sums of the sizes of all parts of each gradient."""
    phi_q, phi_k, value, grad_out, out = (
        np.abs(x.astype(np.float64))
        for x in (problem.phi_q, problem.phi_k, problem.value, problem.grad_out, problem.out())
    )
    _, meet = problem.offsets()
    scores = problem.scores()
    of_rows = scores.sum(3, keepdims=True)
    pulls = grad_out @ value.swapaxes(2, 3) + (grad_out * out).sum(3, keepdims=True)
    weighted = np.where(meet, pulls * problem.factors() / of_rows, 0)
    products = (scores / of_rows * pulls).sum(0)
    bias = [np.trace(products, t, axis1=1, axis2=2) for t in range(1 - meet.shape[0], meet.shape[1])]
    of_features = weighted @ phi_k, weighted.swapaxes(2, 3) @ phi_q
    of_value = (scores / of_rows).swapaxes(2, 3) @ grad_out
    return dict(zip(NAMES, (*of_features, of_value, np.stack(bias, axis=-1)), strict=True))


def _of_pairs(problem: Problem) -> dict[str, np.ndarray]:
    """The gradients, where pairs that do not meet add nothing, not even 0 times NaN."""
    _, meet = problem.offsets()
    phi_q, phi_k, value, grad_out, out = (
        x.astype(np.float64) for x in (problem.phi_q, problem.phi_k, problem.value, problem.grad_out, problem.out())
    )

    def total(pairs: np.ndarray, rows: np.ndarray, axis: int) -> np.ndarray:
        terms = pairs[..., None] * (rows[:, :, None] if axis == 3 else rows[:, :, :, None])
        return np.where(meet[..., None], terms, 0).sum(axis)

    with np.errstate(all="ignore"):
        scores = problem.scores()
        of_rows = scores.sum(3, keepdims=True)
        pulls = grad_out @ value.swapaxes(2, 3) - (grad_out * out).sum(3, keepdims=True)
        probabilities, weighted = scores / of_rows, pulls * problem.factors() / of_rows
        products = np.where(meet, probabilities * pulls, 0).sum(0)
        n_query, n_key = meet.shape
        bias = [np.trace(products, t, axis1=1, axis2=2) for t in range(1 - n_query, n_key)]
        grads = total(weighted, phi_k, 3), total(weighted, phi_q, 2), total(probabilities, grad_out, 2)
    return dict(zip(NAMES, (*grads, np.stack(bias, axis=-1)), strict=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["phi_q", "phi_k", "value", "grad_out"])
def test_what_is_not_finite_reaches_what_depends_on_it(kernels: Kernels, where: str, bad: float) -> None:
    problem = Problem(kernels.config, 90, 110, causal=True)
    getattr(problem, where)[(1, 1, 45, 3)] = bad
    found, expected = problem.run(kernels), _of_pairs(problem)
    assert not all(np.isfinite(x).all() for x in expected.values())
    for name in NAMES:
        is_finite = np.isfinite(expected[name])
        np.testing.assert_array_equal(np.isfinite(found[name]), is_finite, name)
        x, y = found[name][is_finite], expected[name][is_finite]
        assert np.linalg.norm(x - y) <= 2e-6 * np.linalg.norm(y), name


@pytest.mark.parametrize("known", [False, True])
def test_rows_without_weight_pass_nothing(kernels: Kernels, known: bool) -> None:
    problem = Problem(kernels.config, 70, 70, causal=True)
    problem.bias[:, 70 - 20 :] = -np.inf  # keys that lie at least 20 back have a weight
    found, expected = problem.run(kernels, known=known), problem.expected()
    assert np.isnan(problem.out()[:, :, :20]).all() and (found["phi_q"][:, :, :20] == 0).all()
    _check(found, expected, 2e-6)


def test_twice_the_same_bits_whatever_the_order_of_threads(kernels: Kernels) -> None:
    problem = Problem(kernels.config, 70, 37, causal=False)
    first, second = (problem.run(kernels, late, late) for late in (False, True))
    assert all(np.array_equal(first[name], second[name]) for name in NAMES)


def test_launches_have_their_shared_memory() -> None:
    config = CONFIGS["odd sizes"]
    target = Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    lower, *_ = tvm.tirx.get_default_tir_pipeline(target)
    for function in (query_gradients, key_gradients):
        module = lower(tvm.tirx.transform.BindTarget(target)(tvm.IRModule({"function": function(config)})))
        sizes = [
            calculate_allocated_bytes(each)["main"] for name, each in module.functions_items() if "_kernel" in str(name)
        ]
        assert [int(each["shared.dyn"]) for each in sizes] == [config.shared_bytes]
