"""Attention in float32 by tiles: the generated CUDA source, run on the CPU, against float64."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.s_tir.analysis import calculate_allocated_bytes
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_warp_on_cpu import ORDERS, Kernel  # noqa: E402

from rpe_tvm.plan.gpu_direct import round_up
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.te.gpu_tile_attention import tile_attention

pytestmark = pytest.mark.compile

CONFIGS = {
    "default": TileConfig(32, 64, 256),
    "odd sizes": TileConfig(11, 37, 256, 1, 2, 2, 1, 3),
}
SENTINEL = 12345.0


@pytest.fixture(scope="module", params=CONFIGS)
def attention(request, tmp_path_factory):
    config = CONFIGS[request.param]
    return config, Kernel(tile_attention(config), tmp_path_factory.mktemp("attention"))


def _strides(**arrays: np.ndarray) -> dict[str, int]:
    return {
        f"{name}_{axis}_stride": array.strides[i] // 4
        for name, array in arrays.items()
        for i, axis in enumerate(("batch", "head", "row"))
    }


def _rows(n: int, d: int, shift: int, fill: float) -> np.ndarray:
    """A part `[2, n + 3, 2, d]` of an array, `shift` floats after a multiple of 16 bytes."""
    memory = np.full(2 * (n + 3) * 2 * (d + 4) + 8, fill, np.float32)
    start = -memory.ctypes.data // 4 % 4
    return memory[start : start + memory.size - 8].reshape(2, n + 3, 2, d + 4)[..., shift : shift + d]


class Problem:
    """Arguments of one call: value and out are parts of larger arrays, which hold NaN and a sentinel.

    Rows begin `shift` floats after a multiple of 16 bytes.
    """

    def __init__(self, config: TileConfig, n_query: int, n_key: int, causal: bool, shift: int = 1) -> None:
        rng = np.random.default_rng(0)
        self.config, self.n_query, self.n_key, self.causal = config, n_query, n_key, causal
        batch, heads, m, d = 2, 2, config.num_features, config.head_dim
        self.phi_q, self.phi_k = (np.zeros((batch, heads, m, config.length), np.float32) for _ in range(2))
        self.phi_q[..., :n_query] = rng.uniform(0.1, 1, (batch, heads, m, n_query))
        self.phi_k[..., :n_key] = rng.uniform(0.1, 1, (batch, heads, m, n_key))
        # positions come before heads, and what follows rows is NaN
        self.value = _rows(n_key, d, shift, np.nan)[:, :n_key].transpose(0, 2, 1, 3)
        self.value[...] = rng.normal(size=self.value.shape)
        self.weights = np.exp(rng.normal(size=(heads, n_query + n_key - 1))).astype(np.float32)
        if causal:
            self.weights[:, n_query:] = 0
        self.written = _rows(n_query, d, shift, SENTINEL)
        self.out = self.written[:, :n_query].transpose(0, 2, 1, 3)
        self.denominators = np.full((batch, heads, n_query), np.nan, np.float32)

    def run(self, kernel: Kernel, late: bool = True, backwards: bool = False) -> np.ndarray:
        config, (batch, heads, *_) = self.config, self.out.shape
        origin = round_up(self.n_query, config.tile_q)
        table = np.zeros((heads, origin + round_up(self.n_key, config.tile_k)), np.float32)
        table[:, origin - self.n_query + 1 :][:, : self.weights.shape[1]] = self.weights
        sizes = dict(batch=batch, heads=heads, n_query=self.n_query, n_key=self.n_key, width=table.shape[1])
        buffers = dict(phi_q=self.phi_q, phi_k=self.phi_k, value=self.value, table=table, out=self.out)
        buffers["denominators"] = self.denominators
        arguments = {**_strides(value=self.value, out=self.out), **sizes, **buffers, "causal": int(self.causal)}
        kernel((origin // config.tile_q, heads, batch), arguments, late, backwards)
        assert (self.written[:, self.n_query :] == SENTINEL).all()
        return self.out

    def scores(self) -> np.ndarray:
        """Weighted scores in float64, 0 where a causal mask hides the key."""
        phi_q, phi_k, weights = (x.astype(np.float64) for x in (self.phi_q, self.phi_k, self.weights))
        with np.errstate(invalid="ignore"):
            scores = np.einsum("bhmi,bhmj->bhij", phi_q[..., : self.n_query], phi_k[..., : self.n_key])
            scores = scores * weights[:, self.offset() + self.n_query - 1]
            return np.where(self.offset() > 0, 0, scores) if self.causal else scores

    def offset(self) -> np.ndarray:
        return np.arange(self.n_key) - np.arange(self.n_query)[:, None]

    def expected(self) -> np.ndarray:
        """The result in float64; of keys that a causal mask hides nothing is added."""
        scores = self.scores()
        with np.errstate(invalid="ignore"):
            terms = scores[..., None] * self.value[:, :, None].astype(np.float64)
            if self.causal:
                terms = np.where(self.offset()[..., None] > 0, 0, terms)
            return terms.sum(3) / scores.sum(3)[..., None]


SIZES = [(1, 1, False), (200, 133, False), (70, 250, True), (150, 90, True)]


@pytest.mark.parametrize(("late", "backwards"), ORDERS)
@pytest.mark.parametrize(("n_query", "n_key", "causal"), SIZES)
def test_attention(attention: Any, n_query: int, n_key: int, causal: bool, late: bool, backwards: bool) -> None:
    config, kernel = attention
    problem = Problem(config, n_query, n_key, causal, shift=int(backwards))
    out = problem.run(kernel, late, backwards)
    # every row for itself: each is a quotient of sums of positive weights
    np.testing.assert_allclose(out, problem.expected(), rtol=0, atol=3e-6)
    np.testing.assert_allclose(problem.denominators, problem.scores().sum(3), rtol=3e-6)


def test_a_launch_has_its_shared_memory() -> None:
    config = CONFIGS["odd sizes"]
    target = Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    lower, *_ = tvm.tirx.get_default_tir_pipeline(target)
    module = lower(tvm.tirx.transform.BindTarget(target)(tvm.IRModule({"attention": tile_attention(config)})))
    sizes = [
        calculate_allocated_bytes(each)["main"] for name, each in module.functions_items() if "_kernel" in str(name)
    ]
    assert [int(size["shared.dyn"]) for size in sizes] == [config.shared_bytes]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["phi_q", "phi_k", "value", "weights"])
def test_what_is_not_finite_stays_in_its_rows(attention: Any, where: str, bad: float) -> None:
    config, kernel = attention
    problem = Problem(config, 150, 170, causal=True)
    array = getattr(problem, where)
    if where == "weights":
        array[1, 149 - 40] = bad  # 40 keys before a query
    else:
        array[(1, 1, 3, 45) if where.startswith("phi") else (1, 1, 45, 3)] = bad
    out, expected = problem.run(kernel), problem.expected()
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)


def test_a_row_without_weight_is_nan(attention: Any) -> None:
    config, kernel = attention
    problem = Problem(config, 5, 9, causal=False)
    problem.weights[:] = 0
    assert np.isnan(problem.run(kernel)).all()
