"""Attention on tensor cores, run on the CPU, against the float64 formula."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rpe_tvm.plan.gpu_direct import TensorCoreConfig, features_shape, table_shape
from rpe_tvm import reference
from rpe_tvm.te.cuda_direct import direct_attention
from rpe_tvm.te.cuda_features import features
from rpe_tvm.te.cuda_weights import direct_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_warp_on_cpu import ORDERS, Kernel, from_bits, to_bits

pytestmark = pytest.mark.compile


def run(kernel, config, batch, heads, n_query, n_key, causal, late, backwards):
    rng = np.random.default_rng(n_query + n_key)
    dtype, m, d = config.dtype, config.num_features, config.head_dim
    shape_q = features_shape(config, batch, heads, n_query, config.tile_q)
    shape_k = features_shape(config, batch, heads, n_key, config.tile_k)
    phi_q, phi_k = np.zeros(shape_q, np.uint16), np.zeros(shape_k, np.uint16)
    phi_q[:, :, :n_query, :m] = to_bits(rng.uniform(0.1, 1, (batch, heads, n_query, m)), dtype)
    phi_k[:, :, :n_key, :m] = to_bits(rng.uniform(0.1, 1, (batch, heads, n_key, m)), dtype)
    # rows are parts of longer ones, positions come before heads
    memory = np.full((batch, n_key, heads, d + 8), to_bits(np.array(np.nan), dtype), np.uint16)
    value = memory[..., 8:].transpose(0, 2, 1, 3)
    value[...] = to_bits(rng.normal(size=value.shape), dtype)
    weights = np.exp(rng.normal(size=(heads, n_query + n_key - 1))).astype(np.float32)
    if causal:
        weights[:, n_query:] = 0
    table = np.zeros(table_shape(config, heads, n_query, n_key), np.float32)
    origin = shape_q[2]
    table[:, origin - n_query + 1 : origin + n_key] = weights
    out = np.full((batch, n_query, heads, d), 0x1234, np.uint16).transpose(0, 2, 1, 3)
    stride = {
        f"{name}_{axis}_stride": array.strides[i] // 2
        for name, array in (("value", value), ("out", out))
        for i, axis in enumerate(("batch", "head", "row"))
    }
    sizes = dict(batch=batch, heads=heads, n_query=n_query, n_key=n_key, rows_q=shape_q[2], rows_k=shape_k[2])
    buffers = dict(phi_q=phi_q, phi_k=phi_k, value=value, table=table, out=out, causal=int(causal))
    kernel((shape_q[2] // config.tile_q, heads, batch), {**stride, **sizes, **buffers}, late, backwards)
    offset = np.arange(n_key) - np.arange(n_query)[:, None] + n_query - 1
    scores = np.einsum("bhim,bhjm->bhij", from_bits(phi_q, dtype)[:, :, :n_query], from_bits(phi_k, dtype)[:, :, :n_key])
    scores *= weights[:, offset]
    expected = scores @ from_bits(value, dtype) / scores.sum(-1, keepdims=True)
    return from_bits(out, dtype), expected


CONFIGS = {
    "default": TensorCoreConfig(32, 64, 1024, "bfloat16"),
    "split keys": TensorCoreConfig(16, 40, 1024, "float16", 1, 2, 2, 32, 2, matrix_sums=True),
}


@pytest.fixture(scope="module", params=CONFIGS)
def tiled(request, tmp_path_factory):
    config = CONFIGS[request.param]
    return config, Kernel(direct_attention(config), tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize(("late", "backwards"), ORDERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (200, 133)])
def test_tiles(tiled, n_query, n_key, causal, late, backwards):
    config, kernel = tiled
    out, expected = run(kernel, config, 1, 2, n_query, n_key, causal, late, backwards)
    print(np.abs(out - expected).max())
    np.testing.assert_allclose(out, expected, atol=2e-2)


@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (70, 45)])
@pytest.mark.parametrize("causal", [False, True])
def test_weights(tmp_path_factory, n_query, n_key, causal):
    kernel = Kernel(direct_weights(), tmp_path_factory.mktemp("weights"))
    heads, config = 2, TensorCoreConfig(32, 64, 1024, "bfloat16")
    bias = np.random.default_rng(0).normal(size=(heads, n_query + n_key - 1), scale=9).astype(np.float32)
    bias[0, n_query // 2] = -np.inf
    table = np.full(table_shape(config, heads, n_query, n_key), np.nan, np.float32)
    origin = config.tile_q * -(-n_query // config.tile_q)
    sizes = dict(heads=heads, offsets=bias.shape[1], width=table.shape[1], n_query=n_query, n_key=n_key, origin=origin)
    kernel((-(-table.shape[1] // 8192), heads, 1), dict(sizes, causal=int(causal), rpe_bias=bias, table=table), False, False)
    expected = np.zeros_like(table, dtype=np.float64)
    allowed = n_query if causal else n_query + n_key - 1
    first = origin - n_query + 1
    largest = bias[:, :allowed].max(1, keepdims=True)
    expected[:, first : first + allowed] = np.exp(bias[:, :allowed].astype(np.float64) - largest)
    np.testing.assert_allclose(table, expected, rtol=1e-5)


@pytest.mark.parametrize("feature_map", ["prf", "nprf"])
@pytest.mark.parametrize(("m", "d", "dtype"), [(32, 64, "bfloat16"), (24, 40, "float16")])
def test_features(tmp_path_factory, feature_map, m, d, dtype):
    config = TensorCoreConfig(m, d, 1024, dtype, row_blocks=1, warps_q=1, tile_k=16, matrix_sums=True)
    kernel = Kernel(features(config, feature_map), tmp_path_factory.mktemp("features"))
    rng = np.random.default_rng(0)
    batch, heads, n_query, n_key = 2, 3, 37, 50
    query, key = (
        to_bits(rng.normal(size=(batch, n, heads, d)), dtype).transpose(0, 2, 1, 3) for n in (n_query, n_key)
    )
    query[0, 0, 1] = 0
    projection = rng.normal(size=(m, d)).astype(np.float32)
    phi_q = np.full(features_shape(config, batch, heads, n_query, config.tile_q), 0x7FFF, np.uint16)
    phi_k = np.full(features_shape(config, batch, heads, n_key, config.tile_k), 0x7FFF, np.uint16)
    stride = {
        f"{name}_{axis}_stride": array.strides[i] // 2
        for name, array in (("query", query), ("key", key))
        for i, axis in enumerate(("batch", "head", "row"))
    }
    rows_q, rows_k = phi_q.shape[2], phi_k.shape[2]
    sizes = dict(batch=batch, heads=heads, n_query=n_query, n_key=n_key, rows_q=rows_q, rows_k=rows_k)
    buffers = dict(query=query, key=key, projection=projection, phi_q=phi_q, phi_k=phi_k)
    grid = (-(-(rows_q + rows_k) // 64), heads, batch)
    kernel(grid, {**stride, **sizes, **buffers}, False, False)
    for x, phi in ((query, phi_q), (key, phi_k)):
        expected = np.zeros(phi.shape)
        expected[:, :, : x.shape[2], :m] = getattr(reference, feature_map)(from_bits(x, dtype), projection)
        tolerance = 2.0**-8 if dtype == "bfloat16" else 2.0**-10
        np.testing.assert_allclose(from_bits(phi, dtype), expected, rtol=tolerance)
