"""Attention on tensor cores, run on the CPU, against the float64 formula."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rpe_tvm.plan.gpu_direct import TensorCoreConfig, features_shape, table_shape
from rpe_tvm.te.direct_attention_cuda import direct_attention

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


TILES = (
    dict(),
    dict(row_blocks=1, warps_q=2, warps_k=2, tile_k=32, stages=2),
)


@pytest.fixture(scope="module", params=range(len(TILES)))
def tiled(request, tmp_path_factory):
    config = TensorCoreConfig(32, 64, 1024, "bfloat16", **TILES[request.param])
    return config, Kernel(direct_attention(config), tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize(("late", "backwards"), ORDERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (200, 133)])
def test_tiles(tiled, n_query, n_key, causal, late, backwards):
    config, kernel = tiled
    out, expected = run(kernel, config, 1, 2, n_query, n_key, causal, late, backwards)
    print(np.abs(out - expected).max())
    np.testing.assert_allclose(out, expected, atol=2e-2)
