"""Features, weights and attention on tensor cores: the generated CUDA source, run on the CPU, against float64."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.s_tir.analysis import calculate_allocated_bytes
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_warp_on_cpu import ORDERS, Kernel, from_bits, to_bits  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan.gpu_direct import TensorCoreConfig, features_shape, round_up, table_shape
from rpe_tvm.te.cuda_direct import direct_attention
from rpe_tvm.te.cuda_features import features, rows_of_warp
from rpe_tvm.te.cuda_weights import PART, direct_weights

pytestmark = pytest.mark.compile

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
CONFIGS = {
    "default": TensorCoreConfig(32, 64, 1024, "bfloat16"),
    "warps along keys": TensorCoreConfig(24, 40, 1024, "float16", 1, 2, 2, 32, 2, matrix_sums=True),
}
SENTINEL = 0x1234


def strides(**arrays: np.ndarray) -> dict[str, int]:
    """The strides that a kernel is told, in elements."""
    return {
        f"{name}_{axis}_stride": array.strides[i] // 2
        for name, array in arrays.items()
        for i, axis in enumerate(("batch", "head", "row"))
    }


@pytest.fixture(scope="module", params=[("default", False), ("default", True), ("warps along keys", True)])
def attention(request, tmp_path_factory):
    name, is_recorded = request.param
    config = CONFIGS[name]
    return config, Kernel(direct_attention(config, is_recorded), tmp_path_factory.mktemp("attention")), is_recorded


@pytest.mark.parametrize(("late", "backwards"), ORDERS)
@pytest.mark.parametrize(("n_query", "n_key", "causal"), [(1, 1, False), (200, 133, False), (70, 150, True)])
def test_attention(attention, n_query, n_key, causal, late, backwards):
    config, kernel, is_recorded = attention
    rng = np.random.default_rng(0)
    batch, heads, dtype, m, d = 2, 2, config.dtype, config.num_features, config.head_dim
    shape_q = features_shape(config, batch, heads, n_query, config.tile_q)
    shape_k = features_shape(config, batch, heads, n_key, config.tile_k)
    phi_q, phi_k = np.zeros(shape_q, np.uint16), np.zeros(shape_k, np.uint16)
    phi_q[:, :, :n_query, :m] = to_bits(rng.uniform(0.1, 1, (batch, heads, n_query, m)), dtype)
    phi_k[:, :, :n_key, :m] = to_bits(rng.uniform(0.1, 1, (batch, heads, n_key, m)), dtype)
    # positions come before heads, rows are parts of longer ones, and what follows them is NaN
    memory = to_bits(np.full((batch, n_key + 3, heads, d + 8), np.nan), dtype)
    value = memory[:, :n_key, :, 8:].transpose(0, 2, 1, 3)
    value[...] = to_bits(rng.normal(size=value.shape), dtype)
    weights = np.exp(rng.normal(size=(heads, n_query + n_key - 1))).astype(np.float32)
    if causal:
        weights[:, n_query:] = 0
    table = np.zeros(table_shape(config, heads, n_query, n_key), np.float32)
    table[:, shape_q[2] - n_query + 1 : shape_q[2] + n_key] = weights
    written = np.full((batch, n_query + 3, heads, d), SENTINEL, np.uint16)
    out = written[:, :n_query].transpose(0, 2, 1, 3)
    sizes = dict(batch=batch, heads=heads, n_query=n_query, n_key=n_key, rows_q=shape_q[2], rows_k=shape_k[2])
    denominators = np.full((batch, heads, n_query), np.nan, np.float32)
    buffers = dict(phi_q=phi_q, phi_k=phi_k, value=value, table=table, denominators=denominators, out=out)
    buffers["causal"] = int(causal)
    grid = (shape_q[2] // config.tile_q, heads, batch)
    kernel(grid, {**strides(value=value, out=out), **sizes, **buffers}, late, backwards)

    exact_q, exact_k, exact_value = (
        from_bits(x, dtype) for x in (phi_q[:, :, :n_query], phi_k[:, :, :n_key], np.ascontiguousarray(value))
    )
    offset = np.arange(n_key) - np.arange(n_query)[:, None] + n_query - 1
    scores = np.einsum("bhim,bhjm->bhij", exact_q, exact_k) * weights[:, offset]
    expected = scores @ exact_value / scores.sum(-1, keepdims=True)
    # the weighted scores, their sum and the result are rounded, each to a relative error of one unit
    tolerance = 3 * UNIT[dtype] * np.abs(exact_value).max()
    np.testing.assert_allclose(from_bits(np.ascontiguousarray(out), dtype), expected, rtol=0, atol=tolerance)
    if is_recorded:
        np.testing.assert_allclose(denominators, scores.sum(-1), rtol=UNIT[dtype])
    assert (written[:, n_query:] == SENTINEL).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_launch_has_its_shared_memory(config):
    target = Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    lower, *_ = tvm.tirx.get_default_tir_pipeline(target)
    module = lower(tvm.tirx.transform.BindTarget(target)(tvm.IRModule({"attention": direct_attention(config)})))
    sizes = [
        calculate_allocated_bytes(each)["main"] for name, each in module.functions_items() if "_kernel" in str(name)
    ]
    assert [int(size["shared.dyn"]) for size in sizes] == [config.shared_bytes]


def test_a_row_without_weight_is_nan(attention):
    config, kernel, is_recorded = attention
    ones = to_bits(np.ones(features_shape(config, 1, 1, 1, max(config.tile_q, config.tile_k))), config.dtype)
    value = to_bits(np.ones((1, 1, 1, config.head_dim)), config.dtype)
    out = np.zeros_like(value)
    sizes = dict(batch=1, heads=1, n_query=1, n_key=1, rows_q=config.tile_q, rows_k=config.tile_k, causal=0)
    table = np.zeros(table_shape(config, 1, 1, 1), np.float32)
    denominators = np.ones((1, 1, 1), np.float32)
    buffers = dict(phi_q=ones, phi_k=ones, value=value, table=table, denominators=denominators, out=out)
    kernel((1, 1, 1), {**strides(value=value, out=out), **sizes, **buffers}, True, False)
    assert np.isnan(from_bits(out, config.dtype)).all()
    assert denominators == (0 if is_recorded else 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return Kernel(direct_weights(), tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_query", "n_key"), [(1, 1), (70, 45), (3000, 5400)])
def test_weights(weights, n_query, n_key, causal):
    config, heads, count = CONFIGS["default"], 2, n_query + n_key - 1
    bias = np.random.default_rng(0).normal(size=(heads, count), scale=9).astype(np.float32)
    allowed = n_query if causal else count
    if allowed > 2:
        bias[0, 0], bias[1, 1] = -np.inf, np.nan
    table = np.full(table_shape(config, heads, n_query, n_key), -1.0, np.float32)
    origin = round_up(n_query, config.tile_q)
    sizes = dict(heads=heads, offsets=count, width=table.shape[1], n_query=n_query, n_key=n_key, origin=origin)
    buffers = dict(rpe_bias=bias, table=table)
    weights((-(-table.shape[1] // PART), heads, 1), {**sizes, **buffers, "causal": int(causal)}, False, False)
    expected = np.zeros(table.shape)
    used = bias[:, :allowed].astype(np.float64)
    expected[:, origin - n_query + 1 :][:, :allowed] = np.exp(used - np.nanmax(used, 1, keepdims=True))
    np.testing.assert_allclose(table, expected, rtol=1e-5)


@pytest.mark.parametrize(("feature_map", "m", "d", "dtype"), [("prf", 32, 64, "bfloat16"), ("nprf", 72, 40, "float16")])
def test_features(tmp_path, feature_map, m, d, dtype):
    config = TensorCoreConfig(m, d, 1024, dtype, tile_k=16, matrix_sums=True)
    kernel = Kernel(features(config, feature_map), tmp_path)
    rng = np.random.default_rng(0)
    batch, heads = 2, 3
    inputs: Mapping[str, np.ndarray] = {
        name: to_bits(rng.normal(size=(batch, n, heads, d)), dtype).transpose(0, 2, 1, 3)
        for name, n in (("query", 37), ("key", 70))
    }
    query, key = inputs.values()
    query[0, 0, 1], key[0, 1, 2] = 0, to_bits(np.array(np.nan), dtype)
    projection = rng.normal(size=(m, d)).astype(np.float32)
    phi_q = np.full(features_shape(config, batch, heads, 37, config.tile_q), SENTINEL, np.uint16)
    phi_k = np.full(features_shape(config, batch, heads, 70, config.tile_k), SENTINEL, np.uint16)
    rows_q, rows_k = phi_q.shape[2], phi_k.shape[2]
    sizes = dict(batch=batch, heads=heads, n_query=37, n_key=70, rows_q=rows_q, rows_k=rows_k)
    buffers = dict(inputs, projection=projection, phi_q=phi_q, phi_k=phi_k)
    units = sum(-(-rows // rows_of_warp(config)) for rows in (rows_q, rows_k))
    kernel((-(-units // 4), heads, batch), {**strides(**inputs), **sizes, **buffers}, False, False)
    for x, phi in ((query, phi_q), (key, phi_k)):
        expected = np.zeros(phi.shape)
        exact = from_bits(np.ascontiguousarray(x), dtype)
        expected[:, :, : x.shape[2], :m] = getattr(reference, feature_map)(exact, projection)
        # one rounding, and that of a projection in two parts
        np.testing.assert_allclose(from_bits(phi, dtype), expected, rtol=1.1 * UNIT[dtype])
