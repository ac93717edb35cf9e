"""Attention on tensor cores in one launch: the generated CUDA source, run on the CPU, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_warp_on_cpu import ORDERS, Kernel, from_bits, to_bits  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan.gpu_direct import TensorCoreConfig, round_up
from rpe_tvm.te.cuda_clustered import clustered_attention
from rpe_tvm.te.cuda_fused import fused_attention

pytestmark = pytest.mark.compile

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
CASES = {
    "default": ("nprf", TensorCoreConfig(32, 64, 256, "bfloat16", 2, 2, 2, 64, 3, fused=True)),
    "padded features": ("prf", TensorCoreConfig(24, 48, 256, "float16", 1, 2, 1, 64, 4, matrix_sums=True, fused=True)),
    "cluster": ("nprf", TensorCoreConfig(32, 64, 250, "bfloat16", 1, 1, 2, 64, 3, fused=True, cluster=4)),
    "cluster of two, padded features": (
        "prf",
        TensorCoreConfig(10, 16, 250, "float16", 1, 2, 1, 32, 5, matrix_sums=True, fused=True, cluster=2),
    ),
}
SENTINEL = 0x1234


def strides(**arrays: np.ndarray) -> dict[str, int]:
    """The strides that a kernel is told, in elements."""
    return {
        f"{name}_{axis}_stride": array.strides[i] // 2
        for name, array in arrays.items()
        for i, axis in enumerate(("batch", "head", "row"))
    }


@pytest.fixture(scope="module", params=CASES)
def attention(request, tmp_path_factory):
    feature_map, config = CASES[request.param]
    build = fused_attention if config.cluster == 1 else clustered_attention
    return feature_map, config, Kernel(build(config, feature_map), tmp_path_factory.mktemp("attention"))


def run(config: TensorCoreConfig, kernel: Kernel, arrays, others, late: bool = True, backwards: bool = False) -> None:
    """Run it on query, key, value and out, and on rpe_bias, projection and causal."""
    batch, heads, n_query, _ = arrays["query"].shape
    sizes = dict(batch=batch, heads=heads, n_query=n_query, n_key=arrays["key"].shape[2])
    grid = (round_up(-(-n_query // config.tile_q), config.cluster), heads, batch)
    kernel(grid, {**strides(**arrays), **sizes, **arrays, **others}, late, backwards, config.cluster)


def rows(rng: np.random.Generator, n: int, heads: int, d: int, dtype: str) -> np.ndarray:
    """Positions before heads, rows that are parts of longer ones; all that is not theirs is NaN."""
    memory = to_bits(np.full((2, n + 3, heads, d + 8), np.nan), dtype)
    x = memory[:, :n, :, 8:].transpose(0, 2, 1, 3)
    x[...] = to_bits(rng.normal(size=x.shape, scale=0.5), dtype)  # of larger ones float16 does not hold the scores
    return x


@pytest.mark.parametrize(("late", "backwards"), ORDERS)
@pytest.mark.parametrize(("n_query", "n_key", "causal"), [(40, 200, False), (70, 90, True)])
def test_attention(attention, n_query, n_key, causal, late, backwards):
    feature_map, config, kernel = attention
    rng = np.random.default_rng(0)
    heads, dtype, m, d = 2, config.dtype, config.num_features, config.head_dim
    query, key, value = (rows(rng, n, heads, d, dtype) for n in (n_query, n_key, n_key))
    projection = rng.normal(size=(m, d)).astype(np.float32)
    bias = rng.normal(size=(heads, n_query + n_key - 1)).astype(np.float32) + 300  # cancels
    written = np.full((2, n_query + 3, heads, d), SENTINEL, np.uint16)
    out = written[:, :n_query].transpose(0, 2, 1, 3)
    arrays = dict(query=query, key=key, value=value, out=out)
    run(config, kernel, arrays, dict(rpe_bias=bias, projection=projection, causal=int(causal)), late, backwards)
    exact_q, exact_k, exact_v = (from_bits(np.ascontiguousarray(x), dtype) for x in (query, key, value))
    phi_q, phi_k = (getattr(reference, feature_map)(x, projection) for x in (exact_q, exact_k))
    offset = np.arange(n_key) - np.arange(n_query)[:, None]
    weights = np.exp(bias[:, offset + n_query - 1].astype(np.float64) - 300) * ((offset <= 0) | (not causal))
    scores = np.einsum("bhim,bhjm->bhij", phi_q, phi_k) * weights
    expected = scores @ exact_v / scores.sum(-1, keepdims=True)
    # features of query and key, weighted scores, their sum and the result are rounded, each to one unit
    tolerance = 5 * UNIT[dtype] * np.abs(exact_v).max()
    np.testing.assert_allclose(from_bits(np.ascontiguousarray(out), dtype), expected, rtol=0, atol=tolerance)
    assert (written[:, n_query:] == SENTINEL).all()


def test_one_position(attention):
    _, config, kernel = attention
    rng = np.random.default_rng(0)
    query, key, value = (to_bits(rng.normal(size=(1, 1, 1, config.head_dim)), config.dtype) for _ in range(3))
    arrays = dict(query=query, key=key, value=value, out=np.zeros_like(value))
    projection = rng.normal(size=(config.num_features, config.head_dim)).astype(np.float32)
    run(config, kernel, arrays, dict(rpe_bias=np.ones((1, 1), np.float32), projection=projection, causal=0))
    expected = from_bits(value, config.dtype)
    np.testing.assert_allclose(from_bits(arrays["out"], config.dtype), expected, rtol=2 * UNIT[config.dtype])


def test_a_row_without_weight_is_nan(attention):
    """Zero vectors, and a bias of -inf for some keys, are numbers."""
    _, config, kernel = attention
    n, dtype = 70, config.dtype
    rng = np.random.default_rng(0)
    query, key, value = (to_bits(rng.normal(size=(1, 1, n, config.head_dim)), dtype) for _ in range(3))
    query[0, 0, 30], key[0, 0, 5] = 0, 0
    bias = rng.normal(size=(1, 2 * n - 1)).astype(np.float32)
    bias[0, n - 20 :] = -np.inf  # keys that lie at least 20 back have a weight
    arrays = dict(query=query, key=key, value=value, out=np.zeros_like(value))
    projection = rng.normal(size=(config.num_features, config.head_dim)).astype(np.float32)
    run(config, kernel, arrays, dict(rpe_bias=bias, projection=projection, causal=1))
    is_nan = np.isnan(from_bits(arrays["out"], dtype))[0, 0]
    assert (is_nan == (np.arange(n) < 20)[:, None]).all()
