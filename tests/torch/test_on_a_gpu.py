"""Attention on a GPU, against the float64 reference: values, devices, streams. Skipped where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpe_tvm import build, reference, targets
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.plan import gpu
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.runtime import load_gpu
from rpe_tvm.runtime.gpu import gpus
from rpe_tvm.torch import NPRF, PRF, cuda, elu_features, gaussian_projection, kernelized_attention
from rpe_tvm.tune.gpu_candidates import Size, candidates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.compile,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
M, D = 8, 16


def _inputs(n_q, n_k, device="cuda", batch=2, heads=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(n_q + n_k)
    query = torch.randn(batch, heads, n_q, D, generator=g)
    key, value = torch.randn(2, batch, heads, n_k, D, generator=g).unbind()
    bias = torch.randn(heads, n_q + n_k - 1, generator=g)
    return [x.to(device, dtype) for x in (query, key, value, bias)]


def _feature_map(kind=NPRF, device="cuda"):
    return kind(gaussian_projection(M, D, seed=0).to(device))


def _expected(inputs, feature_map, is_causal=False, method="fft"):
    arrays = [x.double().cpu().numpy() for x in (*inputs, feature_map.projection)]
    return reference.attention(*arrays, feature_map=feature_map.name, is_causal=is_causal, method=method)[2]


def _error(out, want, skip=0):
    out = out.double().cpu().numpy()
    assert np.isfinite(out).all()
    return np.linalg.norm(out[:, :, skip:] - want[:, :, skip:]) / np.linalg.norm(want[:, :, skip:])


@pytest.mark.parametrize("kind", [PRF, NPRF])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (63, 64), (100, 37), (37, 100), (1000, 1000), (4097, 3000)])
def test_values(n_q, n_k, is_causal, kind):
    inputs, feature_map = _inputs(n_q, n_k), _feature_map(kind)
    out = kernelized_attention(*inputs, feature_map=feature_map, is_causal=is_causal)
    # the first causal rows have few terms and carry the rounding errors of the longest sums, see docs/operators.md
    skip = n_q // 4 if is_causal else 0
    assert _error(out, _expected(inputs, feature_map, is_causal), skip) < (1e-5 if is_causal else 2e-6)


@pytest.mark.parametrize(("n_q", "n_k"), [(63, 64), (1000, 700)])
def test_the_fft_where_tiles_serve(n_q, n_k):
    inputs, feature_map = _inputs(n_q, n_k), _feature_map()
    target = targets.preset(gpus()[0].arch)
    instance = load_gpu(build.compile_operator(gpu.choose(max(n_q, n_k), M, D), target))
    out = torch.empty_like(inputs[0])
    cuda.attention(instance, *inputs, feature_map.projection, out, feature_map="nprf", is_causal=False)
    assert _error(out, _expected(inputs, feature_map)) < 2e-6


@pytest.mark.parametrize(
    "config", [each for each in candidates(Size("float32", 256, M, D)) if isinstance(each, TileConfig)]
)
def test_tiles(config):
    """Every row for itself, also causal: no error is relative to other rows."""
    (query, key, value, bias), feature_map = _inputs(250, 200), _feature_map(PRF)
    key *= torch.linspace(4, 0.1, 200, device="cuda")[:, None]  # features of the first keys are far smaller
    inputs = query, key, value, bias
    instance = load_gpu(build.compile_operator(config, targets.preset(gpus()[0].arch)))
    for is_causal in (False, True):
        out = torch.empty_like(query)
        cuda.attention(instance, *inputs, feature_map.projection, out, feature_map="prf", is_causal=is_causal)
        want = _expected(inputs, feature_map, is_causal, "dense")
        np.testing.assert_allclose(out.double().cpu().numpy(), want, rtol=0, atol=2e-5)


def test_columns_and_rows():
    """A length whose transform does not fit into shared memory."""
    inputs, feature_map = _inputs(10_000, 10_000, batch=1, heads=2), _feature_map()
    out = kernelized_attention(*inputs, feature_map=feature_map)
    assert _error(out, _expected(inputs, feature_map)) < 4e-6


@pytest.mark.parametrize("kind", [PRF, NPRF])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (63, 64), (100, 37), (1000, 1500), (3001, 3000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores(dtype, n_q, n_k, is_causal, kind):
    inputs, feature_map = _inputs(n_q, n_k, dtype=dtype), _feature_map(kind)
    out = kernelized_attention(*inputs, feature_map=feature_map, is_causal=is_causal)
    assert out.dtype == dtype
    assert _error(out, _expected(inputs, feature_map, is_causal)) < 2 * torch.finfo(dtype).eps


def test_tensor_cores_on_views():
    inputs, feature_map = _inputs(100, 100, dtype=torch.bfloat16), _feature_map()
    want = kernelized_attention(*inputs, feature_map=feature_map)
    odd = [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in inputs[:3]]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    for variant in (odd, turned):
        assert torch.equal(kernelized_attention(*variant, inputs[3], feature_map=feature_map), want)


def test_views_are_read_in_place_and_give_the_same():
    query, key, value, bias = _inputs(100, 100)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    odd = [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in (query, key, value)]
    strided = [torch.stack([x, x], -1)[..., 0] for x in (query, key, value)]
    want = kernelized_attention(query, key, value, bias, feature_map=_feature_map())
    for variant in (views, odd, strided):
        assert torch.equal(kernelized_attention(*variant, bias, feature_map=_feature_map()), want)


@pytest.mark.parametrize("own", [False, True])
def test_grouped_heads_and_key_lengths(own):
    query, key, value, bias = _inputs(50, 70, heads=4)
    lengths = torch.tensor([70, 3])
    feature_map = elu_features if own else _feature_map()
    out = kernelized_attention(
        query, key[:, :2], value[:, :2], bias, feature_map=feature_map, key_lengths=lengths.cuda()
    )
    key, value = (x[:, :2].repeat_interleave(2, dim=1) for x in (key, value))
    offset = torch.arange(70) - torch.arange(50)[:, None] + 49
    for b, length in enumerate(lengths.tolist()):
        phi_q, phi_k = (phi.double().cpu() for phi in feature_map(query[b], key[b, :, :length]))
        scores = phi_q @ phi_k.mT * torch.exp(bias.double().cpu())[:, offset][..., :length]
        want = scores @ value[b, :, :length].double().cpu() / scores.sum(-1, keepdim=True)
        torch.testing.assert_close(out[b].double().cpu(), want, rtol=1e-4, atol=1e-5)


def test_empty_inputs():
    query, key, value, bias = _inputs(5, 5)
    empty = kernelized_attention(query, key[:, :, :0], value[:, :, :0], bias[:, :4], feature_map=_feature_map())
    assert torch.equal(empty, torch.zeros_like(query))
    assert kernelized_attention(query[:0], key[:0], value[:0], bias, feature_map=_feature_map()).shape == (0, 3, 5, D)


def test_nan_stays_nan():
    query, key, value, bias = _inputs(100, 100)
    value[0, 0, 50, 3] = torch.nan
    out = kernelized_attention(query, key, value, bias, feature_map=_feature_map())
    assert out[0, 0, :, 3].isnan().all() and out[0, 1:].isfinite().all() and out[1].isfinite().all()


def test_a_future_key_touches_no_row_before():
    query, key, value, bias = _inputs(300, 300)
    value[0, 0, 200, 3], key[1, 1, 70] = torch.nan, torch.inf
    out = kernelized_attention(query, key, value, bias, feature_map=_feature_map(), is_causal=True)
    wrong = torch.zeros_like(out, dtype=torch.bool)
    wrong[0, 0, 200:, 3] = wrong[1, 1, 70:] = True
    assert torch.equal(~out.isfinite(), wrong)


def test_another_stream():
    """The input is written late on a stream of its own, and the call there sees it."""
    query, key, value, bias = _inputs(1000, 1000)
    feature_map = _feature_map()
    want = kernelized_attention(query, key, value, bias, feature_map=feature_map)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(query)
        torch.cuda._sleep(50_000_000)
        late.copy_(query)
        out = kernelized_attention(late, key, value, bias, feature_map=feature_map)
    assert not stream.query()  # nothing has waited
    stream.synchronize()
    assert torch.equal(out, want)


def test_a_cuda_graph():
    inputs, feature_map = _inputs(300, 300), _feature_map()
    want = kernelized_attention(*inputs, feature_map=feature_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernelized_attention(*inputs, feature_map=feature_map)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU")
def test_another_gpu():
    inputs = _inputs(100, 100, device="cuda:1")
    want = _expected(inputs, _feature_map())
    inputs[0].requires_grad_()
    for _ in range(2):  # the second call is known
        out = kernelized_attention(*inputs, feature_map=_feature_map(device="cuda:1"))
        assert out.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        assert _error(out.detach(), want) < 2e-6
        (grad,) = torch.autograd.grad(out.sum(), inputs[0])
        assert grad.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"device of key: expected cuda:1.*got cuda:0"):
        kernelized_attention(inputs[0], inputs[1].to("cuda:0"), *inputs[2:], feature_map=_feature_map(device="cuda:1"))


def test_fullgraph_compile():
    inputs, feature_map = _inputs(100, 100), _feature_map()
    compiled = torch.compile(lambda *args: kernelized_attention(*args, feature_map=feature_map), fullgraph=True)
    assert torch.equal(compiled(*inputs), kernelized_attention(*inputs, feature_map=feature_map))


def test_errors():
    query, key, value, bias = _inputs(10, 10)
    with pytest.raises(ValueError, match=r"device of key: expected cuda:0"):
        kernelized_attention(query, key.cpu(), value, bias, feature_map=_feature_map())
    with pytest.raises(ValueError, match=r"device of the projection: expected cuda:0"):
        kernelized_attention(query, key, value, bias, feature_map=_feature_map(device="cpu"))
    with pytest.raises(DTypeError):
        kernelized_attention(query.double(), key.double(), value.double(), bias, feature_map=_feature_map())
    with pytest.raises(ShapeError):
        kernelized_attention(query, key[:, :, :5], value, bias, feature_map=_feature_map())
