"""The compiled operator, called through torch, against the float64 reference."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from rpe_tvm import reference
from rpe_tvm.errors import ShapeError
from rpe_tvm.peers import torch_fft_attention
from rpe_tvm.runtime import run
from rpe_tvm.torch import (
    NPRF,
    PRF,
    KernelizedAttention,
    describe,
    gaussian_projection,
    get_operator,
    kernelized_attention,
)

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore:No tuned record")]

MAPS = {"nprf": NPRF, "prf": PRF}
# Where both results are right to the last place (short sequences), twice the peer's error means nothing.
FLOOR = np.finfo(np.float32).eps


@contextlib.contextmanager
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(n_q, n_k=None, *, m=32, d=64, batch=1, heads=2, seed=0):
    n_k = n_q if n_k is None else n_k
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n_q, d, generator=g)
    key, value = torch.randn(2, batch, heads, n_k, d, generator=g).unbind()
    distance = torch.arange(-(n_q - 1), n_k).abs()
    slopes = 2.0 ** -torch.arange(4, 4 + heads)
    rpe_bias = -slopes[:, None] * distance + 0.3 * torch.randn(heads, n_q + n_k - 1, generator=g)
    return query, key, value, rpe_bias, gaussian_projection(m, d, seed=seed + 1)


def attend(query, key, value, rpe_bias, projection, feature_map="nprf", is_causal=False):
    with poisoned_memory():
        return kernelized_attention(
            query, key, value, rpe_bias, feature_map=MAPS[feature_map](projection), is_causal=is_causal
        )


def errors(out, want):
    """Root mean square and maximum of the error, each over that of the result."""
    assert out.shape == want.shape
    error = out.double().numpy() - want
    return np.sqrt(np.mean(error**2) / np.mean(want**2)), np.abs(error).max() / np.abs(want).max()


def check(args, feature_map="nprf", is_causal=False):
    out = attend(*args, feature_map, is_causal)
    want = reference.attention(*(x.numpy() for x in args), feature_map=feature_map, is_causal=is_causal, method="fft")[
        2
    ]
    rms, largest = errors(out, want)
    peer_rms, peer_largest = errors(torch_fft_attention(*args, feature_map, is_causal), want)
    assert rms <= 2 * peer_rms + FLOOR, f"error {rms:.2e}, the torch.fft formula's {peer_rms:.2e}"
    # The largest of many errors is a matter of luck; this bound is for single elements that are wrong.
    assert largest <= 5 * (peer_largest + FLOOR), f"error {largest:.2e}, torch.fft {peer_largest:.2e}"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 1000])
def test_self_attention(n, feature_map, is_causal):
    check(inputs(n, batch=2), feature_map, is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [2049, 4097])
def test_one_head_of_a_long_sequence(n, is_causal):
    check(inputs(n, heads=1), "nprf", is_causal)


@pytest.mark.parametrize(("m", "d"), [(16, 40), (24, 80), (24, 64), (32, 40), (16, 80)])
@pytest.mark.parametrize("n", [2, 63, 1000])
def test_other_sizes(n, m, d):
    check(inputs(n, m=m, d=d), "nprf")
    check(inputs(n, m=m, d=d), "prf", is_causal=True)


def test_an_odd_head_size_of_a_long_sequence():
    check(inputs(2049, m=16, d=40, heads=1))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1000), (1000, 1), (700, 1000), (1000, 63), (3, 2049)])
def test_cross_attention(n_q, n_k, is_causal):
    check(inputs(n_q, n_k), "nprf", is_causal)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 5), (3, 1), (3, 4)])
def test_any_batch_and_number_of_heads(batch, heads):
    check(inputs(1000, batch=batch, heads=heads))


@pytest.mark.parametrize("n", [63, 1000, 2049])
def test_views(n):
    batch, heads, d = 2, 2, 64
    g = torch.Generator().manual_seed(0)
    _, _, _, rpe_bias, projection = inputs(n)
    fused = torch.randn(batch, n, 3, heads, d + 3, generator=g)[..., 1 : d + 1]
    views = [x.transpose(1, 2) for x in fused.unbind(2)]  # [B, H, n, d], misaligned rows
    want = attend(*(x.contiguous() for x in views), rpe_bias, projection)
    for name, some in {
        "transposed and sliced": views,
        "every second position": [x.repeat_interleave(2, dim=2)[:, :, ::2] for x in views],
        "strided last axis": [torch.stack([x, x], -1)[..., 0] for x in views],
        "last axis not innermost": [x.mT.contiguous().mT for x in views],
        "misaligned": [torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape) for x in views],
    }.items():
        assert torch.equal(attend(*some, rpe_bias, projection), want), name
    lazy = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in views]
    assert torch.equal(attend(*lazy, rpe_bias, projection), want)
    strided_bias = torch.stack([rpe_bias, rpe_bias], -1)[..., 0]
    assert torch.equal(attend(*views, strided_bias, projection.T.contiguous().T), want)
    expanded = [x[:, :1].expand(-1, heads, -1, -1) for x in views]
    got = attend(*expanded, rpe_bias, projection)
    assert torch.equal(got, attend(*(x.contiguous() for x in expanded), rpe_bias, projection))


def test_a_transposed_query_gives_an_output_in_the_same_layout():
    query, key, value, rpe_bias, projection = inputs(100)
    want = attend(query, key, value, rpe_bias, projection)
    out = attend(query.transpose(1, 2).contiguous().transpose(1, 2), key, value, rpe_bias, projection)
    assert out.stride() == (100 * 2 * 64, 64, 2 * 64, 1)
    assert torch.equal(out, want)


def test_a_poisoned_output_is_overwritten():
    for n_q, n_k in ((63, 63), (1000, 700), (2049, 2049)):
        args = inputs(n_q, n_k)
        out = torch.full(args[0].shape, float("nan"))
        found = get_operator(max(n_q, n_k), 32, 64)
        run(
            found.functions,
            found.config,
            found.tables,
            *args,
            out,
            feature_map="nprf",
            is_causal=False,
        )
        assert torch.equal(out, attend(*args))


def test_nothing_and_no_keys():
    query, key, value, rpe_bias, projection = inputs(5)
    assert attend(query[:0], key[:0], value[:0], rpe_bias, projection).shape == (0, 2, 5, 64)
    assert attend(query[:, :, :0], key, value, rpe_bias[:, :4], projection).shape == (1, 2, 0, 64)
    empty = (key[:, :, :0], value[:, :, :0])
    assert attend(query[:, :, :0], *empty, rpe_bias[:, :0], projection).shape == (1, 2, 0, 64)
    assert not attend(query, *empty, rpe_bias[:, :4], projection).any()


@pytest.mark.parametrize("n", [63, 1000, 2049])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_non_finite_input_stays_non_finite(n, bad, where):
    args = list(inputs(n))
    args[["query", "key", "value"].index(where)][0, 0, n // 3, 5] = bad
    out = attend(*args).numpy()
    with np.errstate(all="ignore"):
        exact = reference.attention(*(x.numpy() for x in args))[2]
    # Elements of the exact result that are not finite are not finite here; one head never touches another.
    assert not np.isfinite(exact).all()
    assert not np.isfinite(out[~np.isfinite(exact)]).any()
    assert np.isfinite(out[:, 1]).all()


@pytest.mark.parametrize("n", [63, 1000, 2049])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_a_non_finite_bias_reaches_are_not_finite(n, bad):
    args = inputs(n)
    offset = -(n // 3)  # key j = i + offset exists for queries from -offset on
    args[3][0, offset + n - 1] = bad
    out = attend(*args)
    assert not out[0, 0, -offset:].isfinite().any()
    assert out[:, 1].isfinite().all()


def test_minus_infinity_in_the_bias_masks_an_offset():
    query, key, value, rpe_bias, projection = inputs(1000)
    rpe_bias[:, 1000:] = -np.inf
    args = (query, key, value, rpe_bias, projection)
    check(args)
    causal = attend(*args, is_causal=True)
    torch.testing.assert_close(attend(*args), causal)


def test_extreme_biases_cancel():
    query, key, value, rpe_bias, projection = inputs(1000)
    out = attend(query, key, value, rpe_bias + 500, projection)
    want = reference.attention(*(x.numpy() for x in (query, key, value, rpe_bias, projection)), method="fft")[2]
    assert max(errors(out, want)) < 1e-4


def test_zero_vectors_under_nprf():
    query, key, value, rpe_bias, projection = inputs(63)
    query[:, :, 5] = 0
    key[:, :, 7] = 0
    check((query, key, value, rpe_bias, projection))


def test_wrong_inputs_are_refused():
    query, key, value, rpe_bias, projection = inputs(63)
    with pytest.raises(ShapeError, match="rpe_bias"):
        attend(query, key, value, rpe_bias[:, :-1], projection)
    with pytest.raises(ShapeError, match="projection"):
        attend(query, key, value, rpe_bias, projection[:, :-1])


def test_compile_export_and_layer():
    torch._dynamo.reset()
    layer = KernelizedAttention(2, 64, 1000, is_causal=True).eval()
    query, key, value, _, _ = inputs(1000)
    with torch.no_grad():
        layer.rpe_bias.normal_()
        want = layer(query, key, value)
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.equal(compiled(query, key, value), want)
        program = torch.export.export(layer, (query, key, value))
        assert torch.equal(program.module()(query, key, value), want)
    args = (query, key, value, layer.rpe_bias.detach(), layer.projection)
    assert torch.equal(attend(*args, is_causal=True), want)


def test_opcheck():
    args = (*inputs(63), "nprf", True)
    torch.library.opcheck(torch.ops.rpe_tvm.kernelized_attention.default, args)


def test_threads_follow_torch(openmp):
    attend(*inputs(63))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert openmp.omp_get_max_threads() == threads
            check(inputs(1000, heads=1))
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    sets = [inputs(n, seed=n) for n in (63, 500, 1000, 63, 900, 1000)]
    want = [attend(*args) for args in sets]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda a: kernelized_attention(*a[:4], feature_map=NPRF(a[4])), [*sets, *sets, *sets]))
    assert all(torch.equal(x, y) for x, y in zip(got, want * 3, strict=True))


def test_describe_names_the_algorithm():
    assert describe(63, 32, 64).split()[0] in ("direct", "fft")
