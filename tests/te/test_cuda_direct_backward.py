"""Gradients on tensor cores: the generated CUDA source, run on the CPU, against float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.s_tir.analysis import calculate_allocated_bytes
from tvm.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_warp_on_cpu import Kernel, from_bits, to_bits  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan.gpu_direct import round_up
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.te.cuda_backward_keys import key_gradients
from rpe_tvm.te.cuda_backward_queries import query_gradients
from rpe_tvm.te.cuda_bias_gradient import THREADS, bias_gradient

pytestmark = pytest.mark.compile

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
CONFIGS = {
    "default": TensorCoreBackwardConfig(32, 64, 4096, "bfloat16", row_blocks=2, warps=2, tile=32),
    "warps share rows": TensorCoreBackwardConfig(24, 40, 1024, "float16", row_blocks=1, warps=2, shares=2, tile=64),
}
SENTINEL = 0x1234
B, H = 2, 2


@dataclass(frozen=True)
class Kernels:
    config: TensorCoreBackwardConfig
    queries: Kernel
    keys: Kernel
    bias: Kernel


@pytest.fixture(scope="module")
def bias_kernel(tmp_path_factory):
    return Kernel(bias_gradient(), tmp_path_factory.mktemp("bias"))


@pytest.fixture(scope="module", params=CONFIGS)
def kernels(request, tmp_path_factory, bias_kernel):
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("kernels")
    return Kernels(config, Kernel(query_gradients(config), folder), Kernel(key_gradients(config), folder), bias_kernel)


def strides(**arrays: np.ndarray) -> dict[str, int]:
    """The strides that a kernel is told, in elements."""
    return {
        f"{name}_{axis}_stride": array.strides[i] // 2
        for name, array in arrays.items()
        for i, axis in enumerate(("batch", "head", "row"))
    }


def rows(rng: np.random.Generator, n: int, d: int, dtype: str, scale: float = 0.5) -> np.ndarray:
    """Positions before heads, rows that are parts of longer ones; all that is not theirs is NaN."""
    memory = to_bits(np.full((B, n + 3, H, d + 8), np.nan), dtype)
    x = memory[:, :n, :, 8:].transpose(0, 2, 1, 3)
    x[...] = to_bits(rng.normal(size=x.shape, scale=scale), dtype)
    return x


def gradients(
    kernels: Kernels, inputs, slots: int, late: bool, backwards: bool, of_projection: bool = True, known: bool = False
):
    """Run the three kernels on what features and weights would be; returns the gradients and all that was written."""
    config, dtype = kernels.config, kernels.config.dtype
    query, key, value, bias, projection, grad_out, out, feature_map, causal = inputs
    n_q, n_k, m, d = query.shape[2], key.shape[2], config.num_features, config.head_dim
    rows_q, rows_k = round_up(n_q, config.positions), round_up(n_k, config.positions)
    phi_q, phi_k = (np.zeros((B, H, r, config.padded_features), np.uint16) for r in (rows_q, rows_k))
    for x, phi in ((query, phi_q), (key, phi_k)):
        exact = getattr(reference, feature_map)(from_bits(np.ascontiguousarray(x), dtype), projection)
        phi[:, :, : x.shape[2], :m] = to_bits(exact, dtype)
    table = np.zeros((H, rows_q + rows_k), np.float32)
    allowed = bias[:, : n_q if causal else None]
    table[:, rows_q - n_q + 1 :][:, : allowed.shape[1]] = np.exp(allowed - allowed.max(1, keepdims=True))
    terms = np.full((2, B, H, rows_q), np.nan, np.float32)
    denominators = np.full((B, H, n_q), np.nan, np.float32)
    if known:
        weights = table[:, np.arange(n_k) - np.arange(n_q)[:, None] + rows_q]
        exact_q, exact_k = (from_bits(phi[:, :, :n], dtype) for phi, n in ((phi_q, n_q), (phi_k, n_k)))
        denominators[...] = (np.einsum("bhim,bhjm->bhij", exact_q, exact_k) * weights).sum(-1)
    exponents = [np.full((B, H, r, config.padded_features), np.nan, np.float32) for r in (rows_q, rows_k)]
    diagonals = np.full((B, H, slots, rows_q + rows_k), np.nan, np.float32)
    written = [np.full((B, n + 3, H, d), SENTINEL, np.uint16) for n in (n_q, n_k, n_k)]
    grads = [x[:, :n].transpose(0, 2, 1, 3) for x, n in zip(written, (n_q, n_k, n_k), strict=True)]
    grad_bias = np.full((H, n_q + n_k - 1), np.nan, np.float32)
    strided = dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
    strided |= dict(query=query, key=key, value=value, grad_out=grad_out, out=out)
    arguments = dict(phi_q=phi_q, phi_k=phi_k, table=table, terms=terms, diagonals=diagonals, projection=projection)
    arguments |= dict(batch=B, heads=H, n_query=n_q, n_key=n_k, rows_q=rows_q, rows_k=rows_k, slots=slots)
    arguments |= dict(causal=int(causal), normalised=int(feature_map == "nprf"), of_projection=int(of_projection))
    arguments |= dict(denominators=denominators, known=int(known))
    arguments |= strides(**strided) | strided
    grid = rows_q // config.rows, H, B
    kernels.queries(grid, arguments | dict(exponent=exponents[0]), late, backwards)
    kernels.keys((slots, H, B), arguments | dict(exponent=exponents[1]), late, backwards)
    sizes = dict(batch=B, heads=H, slots=slots, width=rows_q + rows_k, offsets=n_q + n_k - 1, origin=rows_q)
    sizes |= dict(n_query=n_q, n_key=n_k, causal=int(causal), diagonals=diagonals, grad_rpe_bias=grad_bias)
    kernels.bias((-(-(n_q + n_k - 1) // THREADS), H, 1), sizes, False, False)
    assert all((x[:, n:] == SENTINEL).all() for x, n in zip(written, (n_q, n_k, n_k), strict=True))
    found = [from_bits(np.ascontiguousarray(grad), dtype) for grad in grads]
    return [*found, grad_bias, *(x[:, :, :n] for x, n in zip(exponents, (n_q, n_k), strict=True))]


def make_inputs(config, n_query, n_key, feature_map, causal, scale=0.5):
    rng = np.random.default_rng(n_query + n_key)
    dtype, d = config.dtype, config.head_dim
    query, key, value, grad_out = (rows(rng, n, d, dtype, scale) for n in (n_query, n_key, n_key, n_query))
    bias = rng.normal(size=(H, n_query + n_key - 1)).astype(np.float32)
    projection = rng.normal(size=(config.num_features, d)).astype(np.float32)
    exact = [from_bits(np.ascontiguousarray(x), dtype) for x in (query, key, value, grad_out)]
    out = reference.attention(*exact[:3], bias, projection, feature_map=feature_map, is_causal=causal)[2]
    rounded = rows(rng, n_query, d, dtype)
    rounded[...] = to_bits(out, dtype)
    inputs = query, key, value, bias, projection, grad_out, rounded, feature_map, causal
    want = reference.attention_gradients(exact[3], *exact[:3], bias, projection, feature_map, causal)
    return inputs, want, exact


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("n_query", "n_key", "feature_map", "causal", "slots", "late", "backwards"),
    [
        (70, 133, "nprf", False, 2, True, False),
        (133, 70, "prf", True, 1, True, True),
        (37, 135, "prf", True, 3, False, True),
    ],
)
def test_gradients(kernels, n_query, n_key, feature_map, causal, slots, late, backwards):
    config = kernels.config
    inputs, want, exact = make_inputs(config, n_query, n_key, feature_map, causal)
    found = gradients(kernels, inputs, slots, late, backwards, known=late != backwards)
    m, unit = config.num_features, UNIT[config.dtype]
    grad_projection = np.zeros_like(inputs[4], dtype=np.float64)
    for x, exponent in zip(exact[:2], found[4:], strict=True):
        assert (exponent[..., m:] == 0).all()
        scaled = x / np.linalg.norm(x, axis=-1, keepdims=True) if feature_map == "nprf" else x * x.shape[-1] ** -0.25
        grad_projection += np.einsum("bhnm,bhnd->md", exponent[..., :m], scaled)
    errors = [error(*each) for each in zip((*found[:4], grad_projection), want, strict=True)]
    assert max(errors) < 1.5 * unit, errors
    if causal:
        assert (found[3][:, n_query:] == 0).all()


@pytest.mark.parametrize("known", [False, True])
def test_zero_vectors_rows_without_weight_and_large_gradients(kernels, known):
    """A zero query has features but no direction; where no key has a weight nothing passes; float16 holds large P."""
    config = kernels.config
    inputs, _, exact = make_inputs(config, 70, 70, "nprf", True)
    query, key, value, bias, projection, grad_out, out, *_ = inputs
    bias[:, 70 - 20 :] = -np.inf  # keys that lie at least 20 back have a weight
    bias[:, 5] -= 6  # and one of them next to none
    query[:, :, 30] = 0
    out[:, :, :20] = to_bits(np.array(np.nan), config.dtype)  # 0 / 0
    exact[0][:, :, 30], exact[3][:, :, :20] = 0, 0
    rounded = reference.attention(*exact[:3], bias, projection, feature_map="nprf", is_causal=True)[2][:, :, 20:]
    out[:, :, 20:] = to_bits(rounded, config.dtype)
    found = gradients(kernels, inputs, 1, True, False, of_projection=False, known=known)
    want = reference.attention_gradients(exact[3], *exact[:3], bias, projection, "nprf", True)
    assert (found[0][:, :, :20] == 0).all() and (found[0][:, :, 30] == 0).all()
    assert max(error(*each) for each in zip(found[:4], want[:4], strict=True)) < 1.5 * UNIT[config.dtype]
    assert all(np.isnan(exponent).all() for exponent in found[4:])  # not written


def test_small_scores_leave_float16_its_range(kernels):
    """With PRF a first causal row has few keys and a small denominator, by which what is rounded is divided."""
    inputs, want, _ = make_inputs(kernels.config, 130, 130, "prf", True, scale=1.2)
    found = gradients(kernels, inputs, 1, True, False)
    assert all(np.isfinite(x).all() for x in found)
    assert max(error(*each) for each in zip(found[:4], want[:4], strict=True)) < 4 * UNIT[kernels.config.dtype]


def test_one_pair(kernels):
    """Of one key all gradients but the value's are 0, up to rounding errors of the sum of probabilities."""
    inputs, want, exact = make_inputs(kernels.config, 1, 1, "nprf", False)
    found = gradients(kernels, inputs, 1, False, False)
    assert error(found[2], want.value) < UNIT[kernels.config.dtype]
    scale = np.abs(exact[3]).max() * np.abs(exact[2]).max() * kernels.config.head_dim
    assert max(np.abs(x).max() for x in (found[0], found[1], found[3])) < scale * UNIT[kernels.config.dtype]


def test_twice_the_same_bits_whatever_the_order_of_threads(kernels):
    inputs, _, _ = make_inputs(kernels.config, 37, 70, "nprf", False)
    first, second = (gradients(kernels, inputs, 2, late, late) for late in (False, True))
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_launches_have_their_shared_memory():
    config = CONFIGS["warps share rows"]
    target = Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    lower, *_ = tvm.tirx.get_default_tir_pipeline(target)
    for function, size in ((query_gradients, config.query_shared_bytes), (key_gradients, config.shared_bytes)):
        module = lower(tvm.tirx.transform.BindTarget(target)(tvm.IRModule({"function": function(config)})))
        sizes = [
            calculate_allocated_bytes(each)["main"] for name, each in module.functions_items() if "_kernel" in str(name)
        ]
        assert [int(each["shared.dyn"]) for each in sizes] == [size]
