"""The schedules of the gradients for AVX2 and for this CPU: other lanes, factorisations, tiles and sizes than the
default's.

Libraries of default configs are those of tests/torch/test_gradients.py, from the cache.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
from tvm.s_tir import Schedule

from rpe_tvm import build, runtime, targets
from rpe_tvm.build.shared_arrays import share_arrays
from rpe_tvm.build.workloads import function_of
from rpe_tvm.plan.backward import BackwardConfig, direct_config, fft_config
from rpe_tvm.plan.twiddles import feature_positions
from rpe_tvm.schedules.of_machine import schedules_of
from rpe_tvm.te import shapes

sys.path.append(str(Path(__file__).resolve().parents[1]))
from gradient_check import check_gradients  # noqa: E402

pytestmark = pytest.mark.compile

torch = pytest.importorskip("torch")

AVX2 = targets.preset("haswell")
HERE = targets.detect()


def by_fft(m, d, outer, inner, lanes):
    return BackwardConfig(m, d, int(np.prod(outer) * np.prod(inner)), "fft", outer, inner, lanes=lanes)


def by_tiles(m, d, tile):
    return BackwardConfig(m, d, 1024, "direct", tile=tile, lanes=8)


FFT = [
    (AVX2, by_fft(5, 7, (4,), (4,), 4)),
    (AVX2, by_fft(16, 40, (5,), (8, 2), 8)),
    (HERE, by_fft(5, 3, (3, 4), (4, 4), 8)),  # fewer channels than lanes
    (HERE, fft_config(HERE.id, 64, 24, 80, HERE.lanes)),
]
TILES = [
    (AVX2, by_tiles(5, 7, (128, 64))),  # fewer features and channels than lanes
    (HERE, direct_config(HERE.id, 24, 80, HERE.lanes)),
    (HERE, by_tiles(33, 20, (64, 32))),
]


@functools.cache
def compiled(config, target):
    return runtime.load_backward(build.compile_operator(config, target))


def check(config, target, *sizes, is_causal=False):
    check_gradients(compiled(config, target), *sizes, is_causal=is_causal)


def case_id(case):
    return f"{case.name} {case.description}" if isinstance(case, BackwardConfig) else case.id


@pytest.mark.parametrize(("target", "config"), FFT, ids=case_id)
def test_values(target, config):
    check(config, target, config.length - 1, config.length // 2)


@pytest.mark.parametrize(
    ("target", "config", "n_q", "n_k", "is_causal"),
    [
        (*TILES[0], 63, 32, False),
        (*TILES[1], 130, 257, True),  # more keys than queries, parts of different lengths
        (*TILES[2], 257, 130, False),
    ],
)
def test_tiles(target, config, n_q, n_k, is_causal):
    check(config, target, n_q, n_k, is_causal=is_causal)


@pytest.mark.parametrize("feature_map", ["prf", "nprf"])
@pytest.mark.parametrize(("target", "config"), TILES + FFT, ids=case_id)
def test_feature_gradients(target, config, feature_map):
    """Against autograd in float64; of a zero vector NPRF passes no gradient, PRF does."""
    from rpe_tvm.torch.layouts import feature_memory, pack_features

    m, d, n = config.num_features, config.head_dim, min(config.length - 3, 100)
    instance = compiled(config, target)
    x = torch.randn(2, 3, n, 2 * d)[..., :d]
    x[1, 2, 3] = 0.0
    projection, grad = torch.randn(m, d), torch.randn(2, 3, n, m)
    leaf, weights = x.double().requires_grad_(), projection.double()
    if feature_map == "prf":
        exponent = d**-0.25 * leaf @ weights.T - d**-0.5 * leaf.square().sum(-1, keepdim=True) / 2
    else:
        squares = leaf.square().sum(-1, keepdim=True)
        exponent = (leaf * squares.where(squares > 0, 1.0) ** -0.5).where(squares > 0, 0.0) @ weights.T
    features = exponent.exp()
    (want,) = torch.autograd.grad(features, leaf, grad.double())

    _, phi, grad_phi = feature_memory(config, 2, 3, n, n)
    pack_features(config, features.detach().float(), phi)
    pack_features(config, grad, grad_phi)
    grad_phi[..., torch.from_numpy(feature_positions(config, n, n) >= n)] = torch.nan  # memory past the end
    got, of_exponent = torch.full(x.shape, torch.nan), torch.full((2, 3, phi[0, 0, 0].numel(), m), torch.nan)
    instance.functions[f"features_{feature_map}_backward"](x, projection, phi, grad_phi, of_exponent, got)
    assert (got - want).norm() < 1e-5 * want.norm()
    torch.testing.assert_close(of_exponent[:, :, :n], (features * grad).detach().float())
    assert (got[1, 2, 3] == 0).all() == (feature_map == "nprf")


@pytest.mark.parametrize("tile", [(48, 64), (63, 64), (256, 64), (16, 64), (128, 40)])
def test_a_tile_that_does_not_fit_the_lanes(tile):
    with pytest.raises(ValueError, match=r"expected 2 times a multiple of 16 that divides 64, and a multiple of 16"):
        BackwardConfig(8, 16, 1024, "direct", tile=tile, lanes=16)


def test_sixteen_lanes_and_two_parts():
    config = BackwardConfig(3, 64, 16, "fft", (4,), (4,), lanes=16)
    assert config.parts == 2
    check(config, HERE, 12, 16, is_causal=True)


def test_forward_and_inverse_rows_share_an_array():
    config = by_fft(3, 16, (4,), (4, 4), 8)
    sch = Schedule(function_of(config, shapes.symbolic()))
    schedules_of(HERE.machine).default(sch, config)
    before, after = sch.mod["main"].script(), share_arrays(sch.mod["main"]).script()
    assert "pair_back_rows1[" in before and "pair_back_rows1[" not in after
    assert before.count("sblock_alloc_buffer") == after.count("sblock_alloc_buffer") + 1
