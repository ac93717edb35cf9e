"""The schedules of the gradients for AVX2 and for this CPU: other lanes, factorisations, tiles and sizes than the
default's.
"""

import numpy as np
import pytest

from rpe_tvm import build, reference, runtime, targets
from rpe_tvm.plan.backward import BackwardConfig

pytestmark = pytest.mark.compile

torch = pytest.importorskip("torch")

AVX2 = targets.preset("haswell")
HERE = targets.detect()


def check(config, target, n_q, n_k, is_causal=False):
    from rpe_tvm.torch.backward import attention_backward
    from rpe_tvm.torch.layouts import feature_memory, pack_features, unpack_features

    instance = runtime.load_backward(build.compile_operator(config, target))
    random = np.random.default_rng(0)
    m, d = config.num_features, config.head_dim
    phi_q, phi_k = (random.uniform(0.5, 1.5, (2, 3, n, m)) for n in (n_q, n_k))
    value, grad_out = random.standard_normal((2, 3, n_k, d)), random.standard_normal((2, 3, n_q, d))
    rpe_bias = random.standard_normal((3, n_q + n_k - 1))
    toeplitz = reference.toeplitz_matrix(reference.weights(rpe_bias, n_q, is_causal), n_q, n_k)
    scores = (phi_q @ phi_k.swapaxes(-1, -2)) * toeplitz
    out = scores @ value / scores.sum(-1, keepdims=True)
    q, k, v, b, g, o = (torch.from_numpy(x).float() for x in (phi_q, phi_k, value, rpe_bias, grad_out, out))
    phi = feature_memory(config, 2, 3, n_q, n_k)
    for features, buffer in ((q, phi[0]), (k, phi[1])):
        pack_features(config, features, buffer)
    found = attention_backward(instance, g, o, phi, v, b, is_causal)
    got = (unpack_features(config, found.phi[0], n_q), unpack_features(config, found.phi[1], n_k), *found[1:])
    want = reference.core_gradients(grad_out, phi_q, phi_k, value, rpe_bias, is_causal)
    for name, x, y in zip(want._fields, got, want, strict=True):
        assert np.linalg.norm(x.numpy() - y) < 2e-5 * np.linalg.norm(y), name


@pytest.mark.parametrize("target", [AVX2, HERE], ids=lambda target: target.id)
@pytest.mark.parametrize(
    ("m", "d", "outer", "inner", "lanes"),
    [
        (5, 7, (8,), (8,), 4),
        (5, 3, (3, 4), (4, 4), 8),  # fewer channels than lanes
        (16, 40, (5,), (8, 2), 8),
    ],
)
def test_values(target, m, d, outer, inner, lanes):
    length = int(np.prod(outer) * np.prod(inner))
    check(BackwardConfig(m, d, length, "fft", outer, inner, lanes=lanes), target, length - 1, length // 2)


@pytest.mark.parametrize(
    ("target", "m", "d", "tile", "lanes", "n_q", "n_k", "is_causal"),
    [
        (AVX2, 5, 7, (64, 128), 8, 63, 32, False),  # fewer features and channels than lanes
        (HERE, 16, 40, (64, 128), 8, 130, 257, True),  # more keys than queries, parts of different lengths
        (HERE, 33, 20, (32, 64), 8, 257, 130, False),
    ],
)
def test_tiles(target, m, d, tile, lanes, n_q, n_k, is_causal):
    check(BackwardConfig(m, d, 1024, "direct", tile=tile, lanes=lanes), target, n_q, n_k, is_causal)


@pytest.mark.parametrize("feature_map", ["prf", "nprf"])
@pytest.mark.parametrize(
    ("target", "m", "d", "tile"), [(AVX2, 5, 7, (64, 128)), (HERE, 16, 40, (64, 128)), (HERE, 33, 20, (32, 64))]
)
def test_feature_gradients(target, m, d, tile, feature_map):
    """Against autograd in float64; of a zero vector NPRF passes no gradient, PRF does."""
    from rpe_tvm.torch.layouts import feature_memory, pack_features

    config, n = BackwardConfig(m, d, 1024, "direct", tile=tile, lanes=8), 100
    instance = runtime.load_backward(build.compile_operator(config, target))
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

    phi = feature_memory(config, 2, 3, n, n)
    pack_features(config, features.detach().float(), phi[0])
    pack_features(config, grad, phi[1])
    phi[1].flatten(3)[..., n:] = torch.nan  # memory past the end
    got, grad_exponent = torch.full(x.shape, torch.nan), torch.empty(2, 3, phi[0, 0, 0, 0].numel(), m)
    instance.functions[f"features_{feature_map}_backward"](x, projection, phi[0], phi[1], grad_exponent, got)
    assert (got - want).norm() < 1e-5 * want.norm()
    assert (got[1, 2, 3] == 0).all() == (feature_map == "nprf")


def test_a_tile_that_does_not_fit_the_lanes():
    with pytest.raises(ValueError, match=r"expected .* that divides 64 and a multiple of 32"):
        BackwardConfig(8, 16, 1024, "direct", tile=(64, 48), lanes=16)
    with pytest.raises(ValueError, match=r"expected .* that divides 64 and a multiple of 32"):
        BackwardConfig(8, 16, 1024, "direct", tile=(128, 128), lanes=16)


def test_sixteen_lanes_and_two_parts():
    config = BackwardConfig(3, 64, 64, "fft", (8,), (8,), lanes=16)
    assert config.parts == 2
    check(config, HERE, 50, 64, is_causal=True)
