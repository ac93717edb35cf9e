"""Compiled gradients of attention, called through torch, against the float64 reference and autograd by torch.fft."""

from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import build, reference, runtime, targets
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.peers import torch_fft_attention
from rpe_tvm.plan import backward
from rpe_tvm.plan.twiddles import feature_shape
from rpe_tvm.runtime import operator as runtime_operator
from rpe_tvm.torch import NPRF, PRF, core, gaussian_projection, kernelized_attention, operators, toeplitz_attention
from rpe_tvm.torch.dispatch import get_backward

pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore:No tuned record")]

MAPS = {"nprf": NPRF, "prf": PRF}
NAMES = reference.Gradients._fields
# Where both results are right to the last place (short sequences), twice the peer's error means nothing.
FLOOR = np.finfo(np.float32).eps
M, D = 16, 40  # of all tests that need no sizes of their own: they share compiled operators
LONG = 1000  # gradients by FFT


@functools.cache
def gradients_by_fft(m, d):
    """Gradients of up to 64 positions; of M and D the ones that longer sequences have: a bucket serves shorter ones."""
    if (m, d) == (M, D):
        found = get_backward(LONG, m, d)
    else:
        target = targets.detect()
        config = backward.fft_config(target.id, 64, m, d, target.lanes)
        found = runtime.load_backward(build.compile_operator(config, target))
    assert found.config.algorithm == "fft"
    return found


@pytest.fixture(params=["by length", "fft"])
def algorithm(request, monkeypatch):
    """Short sequences by tiles, as they are computed, and by FFT, as longer ones are."""
    if request.param == "fft":
        for module in (core, operators):
            monkeypatch.setattr(module, "get_backward", lambda n, m, d: gradients_by_fft(m, d))


@contextlib.contextmanager
def poisoned_memory():
    """Fill what torch.empty returns, and what is kept from call to call, with NaN: what no kernel writes shows."""
    for block in runtime_operator._scratch._blocks.values():
        block.fill(np.nan)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(n_q, n_k=None, *, m=M, d=D, batch=1, heads=4, seed=0):
    n_k = n_q if n_k is None else n_k
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n_q, d, generator=g)
    key, value = torch.randn(2, batch, heads, n_k, d, generator=g).unbind()
    slopes = 2.0 ** -torch.arange(4, 4 + heads)
    distance = torch.arange(-(n_q - 1), n_k).abs()
    rpe_bias = -slopes[:, None] * distance + 0.3 * torch.randn(heads, n_q + n_k - 1, generator=g)
    args = [query, key.clone(), value.clone(), rpe_bias, gaussian_projection(m, d, seed=seed + 1)]
    return args, torch.randn(query.shape, generator=g)


def gradients(args, grad_out, feature_map="nprf", is_causal=False, **options):
    leaves = [x.detach().requires_grad_() for x in args]
    with poisoned_memory():
        out = kernelized_attention(
            *leaves[:4], feature_map=MAPS[feature_map](leaves[4]), is_causal=is_causal, **options
        )
        return torch.autograd.grad(out, leaves, grad_out)


def exact(args, grad_out, feature_map="nprf", is_causal=False):
    found = reference.attention_gradients(grad_out.numpy(), *(x.detach().numpy() for x in args), feature_map, is_causal)
    return [torch.from_numpy(each) for each in found]


def by_torch_fft(args, grad_out, feature_map, is_causal):
    leaves = [x.detach().requires_grad_() for x in args]
    return torch.autograd.grad(torch_fft_attention(*leaves, feature_map, is_causal), leaves, grad_out)


def relative_errors(name, got, want):
    """Root mean square of the error over that of the gradient, of each head; of the shared projection, one."""
    assert got.shape == want.shape and got.dtype == torch.float32
    axes = {"projection": (0, 1), "rpe_bias": (1,)}.get(name, (0, 2, 3))
    error = (got.double() - want).square().mean(axes)
    return (error / want.square().mean(axes)).sqrt().flatten()


def check(draws, feature_map, is_causal, names=NAMES):
    """Medians of errors over draws and heads, ours against torch.fft's.

    Medians, because under PRF single draws scatter: of a row with tiny weights both lose digits by FFT, and such a draw
    is all that a mean over draws sees. So this bounds typical errors, not those of the worst draw, where ours can be
    several times the peer's (n = 2, PRF, rpe_bias).
    """
    ours, peers = ({name: [] for name in names} for _ in range(2))
    for args, grad_out in draws:
        want = exact(args, grad_out, feature_map, is_causal)
        for errors, got in (
            (ours, gradients(args, grad_out, feature_map, is_causal)),
            (peers, by_torch_fft(args, grad_out, feature_map, is_causal)),
        ):
            for name, x, y in zip(NAMES, got, want, strict=True):
                assert x.isfinite().all(), name
                if name in names:
                    errors[name].append(relative_errors(name, x, y))
    for name in names:
        error, peer = (torch.cat(each[name]).median().item() for each in (ours, peers))
        assert error <= 2 * peer + FLOOR, f"{name}: error {error:.2e}, the torch.fft formula's {peer:.2e}"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize(("n_q", "n_k"), [(2, 2), (63, 63), (64, 64), (20, 50), (50, 20), (1, 30), (30, 2)])
def test_against_the_reference(algorithm, n_q, n_k, feature_map, is_causal):
    names = NAMES
    if n_q == 1 and is_causal:  # it sees one key: the subject of a test of its own
        names = ("value",)
    check([inputs(n_q, n_k, seed=seed) for seed in range(8)], feature_map, is_causal, names)


@pytest.mark.parametrize(("feature_map", "is_causal"), [("nprf", False), ("prf", True)])
@pytest.mark.parametrize(("n_q", "n_k"), [(LONG, LONG), (700, LONG), (900, 850)])
def test_a_longer_sequence(n_q, n_k, feature_map, is_causal):
    check([inputs(n_q, n_k, seed=seed, heads=2) for seed in range(6)], feature_map, is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize(("m", "d"), [(24, 80), (1, 5)])
def test_other_sizes(algorithm, m, d, feature_map, is_causal):
    names = NAMES if m > 1 else NAMES[1:]  # of a single feature the query cancels: the subject of the next test
    check([inputs(63, m=m, d=d, seed=seed) for seed in range(8)], feature_map, is_causal, names)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
def test_gradients_that_are_zero_by_cancellation(algorithm, feature_map, is_causal):
    args, grad_out = inputs(1)
    of = dict(zip(NAMES, gradients(args, grad_out, feature_map, is_causal), strict=True))
    torch.testing.assert_close(of.pop("value"), grad_out)  # one key has the weight 1
    for name, got in of.items():
        assert got.abs().max() < 1e-5, name
    args, grad_out = inputs(63, m=1, d=5)
    query, key, *_ = gradients(args, grad_out, feature_map, is_causal)
    assert query.norm() < 1e-4 * key.norm()


def test_a_zero_vector_has_no_direction(algorithm):
    args, grad_out = inputs(63)
    args[0][0, 1, 5] = 0.0
    args[1][0, 2, 7] = 0.0
    query, key, *_ = gradients(args, grad_out)
    assert not query[0, 1, 5].any() and not key[0, 2, 7].any()
    for got, want in zip((query, key), exact(args, grad_out)[:2], strict=True):
        assert (got - want).norm() < 1e-4 * want.norm()


def test_two_backward_passes_give_the_same_bits(algorithm):
    for n in (63, LONG):
        args, grad_out = inputs(n, batch=2)
        first, second = (gradients(args, grad_out, "prf", True) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_views(algorithm):
    batch, heads, n = 2, 2, 63
    (_, _, _, rpe_bias, projection), _ = inputs(n, heads=heads)
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, n, 4, heads, D + 3, generator=g)[..., 1 : D + 1]
    views = [x.transpose(1, 2) for x in fused.unbind(2)]  # query, key, value and grad_out, misaligned rows
    *tensors, grad_out = (x.contiguous() for x in views)
    want = gradients([*tensors, rpe_bias, projection], grad_out)
    for name, (*some, grad) in {
        "transposed and sliced": views,
        "every second position": [x.repeat_interleave(2, dim=2)[:, :, ::2] for x in views],
        "strided last axis": [torch.stack([x, x], -1)[..., 0] for x in views],
        "last axis not innermost": [x.mT.contiguous().mT for x in views],
        "lazily negated": [torch.complex(torch.zeros_like(x), -x).conj().imag for x in views],
    }.items():
        got = gradients([*some, rpe_bias, projection], grad)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), name
    strided_bias = torch.stack([rpe_bias, rpe_bias], -1)[..., 0]
    got = gradients([*tensors, strided_bias, projection.T.contiguous().T], grad_out)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    ones = torch.ones(1).expand(tensors[0].shape)  # what out.sum() passes on
    got, want = (gradients([*tensors, rpe_bias, projection], x) for x in (ones, ones.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def dense(phi_q, phi_k, value, rpe_bias, is_causal):
    """Attention on ready features from n x n scores; a row that sees no feature is 0."""
    n_q, n_k = phi_q.shape[2], phi_k.shape[2]
    offset = torch.arange(n_k) - torch.arange(n_q)[:, None]
    scores = (phi_q @ phi_k.mT) * rpe_bias[:, offset + n_q - 1].exp()
    scores = scores * (offset <= 0) if is_causal else scores
    den = scores.sum(-1, keepdim=True)
    return (scores @ value / den.where(den != 0, 1.0)).where(den != 0, 0.0)


def features(x, projection, feature_map):
    """Luo 2021, Eq. 5 and Algorithm 1, up to factors that cancel."""
    x = x / x.norm(dim=-1, keepdim=True) if feature_map == "nprf" else x * D**-0.25
    return torch.exp(x @ projection.T - x.square().sum(-1, keepdim=True) / 2)


def on_features(kind, n_q, n_k, seed=0):
    (query, key, value, rpe_bias, projection), grad_out = inputs(n_q, n_k, seed=seed)
    phi_q, phi_k = NPRF(projection)(query, key)
    if kind == "some keys without features":
        phi_k[:, :, ::3] = 0.0
    elif kind == "rows that see none":
        phi_q[:, :, 1::4] = 0.0
        phi_k[:, :, : n_k // 2] = 0.0  # causal: no key for the first rows
        phi_k[:, 0] = 0.0
    elif kind == "signed":
        phi_q, phi_k = phi_q - 0.02, phi_k - 0.02  # denominators stay far from 0
    return [x.detach() for x in (phi_q, phi_k, value, rpe_bias)], grad_out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["some keys without features", "rows that see none", "signed"])
@pytest.mark.parametrize(("n_q", "n_k"), [(63, 63), (20, 50)])
def test_ready_features(algorithm, n_q, n_k, kind, is_causal):
    if kind == "rows that see none" and is_causal and n_q < n_k // 2:
        n_q, n_k = n_k, n_q  # so that some rows see a key
    args, grad_out = on_features(kind, n_q, n_k)
    args, doubles = ([x.to(dtype).requires_grad_() for x in args] for dtype in (torch.float32, torch.float64))
    with poisoned_memory():
        out = toeplitz_attention(*args, is_causal=is_causal)
        got = torch.autograd.grad(out, args, grad_out)
    want = dense(*doubles, is_causal)
    blind = want.detach().abs().sum(-1) == 0
    assert blind.any() == (kind != "signed" and (kind == "rows that see none" or is_causal))
    assert not out[blind].any() and not got[0][blind].any()
    for x, y in zip(got, torch.autograd.grad(want, doubles, grad_out.double()), strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm()


@settings(deadline=None, max_examples=60)
@given(
    n_q=st.integers(1, 64),
    n_k=st.integers(1, 64),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    feature_map=st.sampled_from(["nprf", "prf"]),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_any_shape_and_lengths(n_q, n_k, batch, heads, feature_map, is_causal, data):
    seed = data.draw(st.integers(0, 99), label="seed")
    lengths = data.draw(st.none() | st.lists(st.integers(0, n_k), min_size=batch, max_size=batch), label="lengths")
    args, grad_out = inputs(n_q, n_k, batch=batch, heads=heads, seed=seed)
    args[:2] = (0.5 * x for x in args[:2])  # PRF of shorter vectors keeps the weights of rows within few digits
    key_lengths = None if lengths is None else torch.tensor(lengths)
    got = gradients(args, grad_out, feature_map, is_causal, key_lengths=key_lengths)
    doubles = [x.double().requires_grad_() for x in args]
    phi_q, phi_k = (features(x, doubles[4], feature_map) for x in doubles[:2])
    if lengths is not None:
        phi_k = phi_k.where((torch.arange(n_k) < key_lengths[:, None])[:, None, :, None], 0.0)
    out = dense(phi_q, phi_k, doubles[2], doubles[3], is_causal)
    # of what cancels, only the error relative to what cancelled is bounded: grad_out and value, summed over rows
    size = grad_out.norm().item() * math.sqrt(D)
    for name, x, y in zip(NAMES, got, torch.autograd.grad(out, doubles, grad_out.double()), strict=True):
        assert (x - y).norm() <= 1e-3 * (y.norm() + 0.01 * size), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "grad_out"])
def test_non_finite_values_reach_what_depends_on_them(algorithm, where, bad):
    args, grad_out = inputs(63, batch=2)
    tensors = {"query": args[0], "key": args[1], "value": args[2], "grad_out": grad_out}
    tensors[where][0, 1, 20, 3] = bad
    got = dict(zip(NAMES, gradients(args, grad_out), strict=True))
    with np.errstate(all="ignore"):
        want = dict(zip(NAMES, exact(args, grad_out), strict=True))
    for name, grad in got.items():
        dependent = ~want[name].isfinite()
        assert not grad[dependent].isfinite().any(), name
        if name in ("query", "key", "value"):  # other batch entries and heads are computed apart
            assert grad[1].isfinite().all() and grad[:, 0].isfinite().all(), name
    assert any((~each.isfinite()).any() for each in want.values())
    assert got["rpe_bias"][0].isfinite().all()


def test_lengths_and_dtypes_are_checked():
    args, _ = inputs(5)
    leaves = [x.requires_grad_() for x in args]
    feature_map = NPRF(leaves[4])

    def attend(*tensors, **options):
        return kernelized_attention(*tensors, feature_map=feature_map, **options)

    for wrong in (-1, 6):
        with pytest.raises(ShapeError, match=rf"from 0 to n_k = 5, got {wrong}"):
            attend(*leaves[:4], key_lengths=torch.tensor([wrong]))
    with pytest.raises(ShapeError, match=r"rpe_bias: expected .* = \[4, 9\], got \[4, 8\]"):
        attend(*leaves[:3], leaves[3][:, :-1])
    for index in range(4):
        for dtype in (torch.float64, torch.bfloat16):
            mixed = [x.to(dtype) if i == index else x for i, x in enumerate(leaves[:4])]
            with pytest.raises(DTypeError):
                attend(*mixed)


@pytest.mark.parametrize(("n_q", "n_k"), [(63, 130), (LONG, 20)])
def test_features_that_the_forward_pass_kept(n_q, n_k):
    """Short sequences keep them, the operator does not: the same bits, also where other calls come between."""
    args, grad_out = inputs(n_q, n_k)
    leaves = [x.requires_grad_() for x in args]
    out = kernelized_attention(*leaves[:4], feature_map=NPRF(leaves[4]))
    kernelized_attention(*inputs(n_q, n_k, seed=1)[0][:4], feature_map=NPRF(args[4])).sum().backward()
    got = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    again = torch.autograd.grad(out, leaves, grad_out)
    want = torch.autograd.grad(torch.ops.rpe_tvm.kernelized_attention(*leaves, "nprf", False), leaves, grad_out)
    for x, y, z in zip(got, again, want, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_opcheck():
    ops = torch.ops.rpe_tvm
    args, grad_out = inputs(5, 7, heads=2, batch=2)
    leaves = [x.requires_grad_() for x in args]
    rest = ("nprf", True)
    out = kernelized_attention(*args[:4], feature_map=NPRF(args[4]), is_causal=True).detach()
    (phi_q, phi_k, value, rpe_bias), grad = on_features("signed", 5, 7)
    features = [x.requires_grad_() for x in (phi_q, phi_k, value, rpe_bias)]
    on_phi, sees_none = (x.detach() for x in ops.toeplitz_attention(*features, False))
    plain = [x.detach() for x in leaves]
    calls = [
        (ops.kernelized_attention, (*leaves, *rest)),
        (ops.kernelized_attention_backward, (grad_out, *plain, out, *rest, True)),
        (ops.toeplitz_attention, (*features, False)),
        (
            ops.toeplitz_attention_backward,
            (grad, *(x.detach() for x in features), on_phi, sees_none, False),
        ),
    ]
    for operator, arguments in calls:
        result = torch.library.opcheck(operator.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, operator


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compile_forward_and_backward(backend, dynamic):
    torch._dynamo.reset()

    def loss(*args):
        out = kernelized_attention(*args[:4], feature_map=NPRF(args[4]), is_causal=True)
        return out.transpose(1, 2).flatten(2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (20, 30) if dynamic else (20,):
        args = [x.requires_grad_() for x in inputs(n)[0]]
        got, want = (torch.autograd.grad(call(*args), args) for call in (compiled, loss))
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def test_an_exported_program_has_gradients():
    class Attend(torch.nn.Module):
        def forward(self, *args):
            return kernelized_attention(*args[:4], feature_map=NPRF(args[4]))

    args = tuple(x.requires_grad_() for x in inputs(20)[0])
    program = torch.export.export(Attend(), args).module()
    got, want = (torch.autograd.grad(call(*args).square().sum(), args) for call in (program, Attend()))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_kept_features_of_more_positions(blocks):
    """The forward pass may keep features of whole tiles of its own, past those of the gradients' tiles."""
    args, grad_out = inputs(100, 70)
    query, key, *_, projection = args
    instance = get_backward(100, M, D)
    assert instance.config.algorithm == "direct"
    *shape, needed, columns = feature_shape(instance.config, 1, 4, 100, 70)
    kept = torch.empty(2, *shape, needed + blocks, columns)
    for x, phi in zip((query, key), kept, strict=True):
        instance.functions["features_nprf"](x, projection, phi)
    out = operators.attention_on_cpu(*args, "nprf", True)
    with poisoned_memory():
        plain = operators.attention_backward_on_cpu(grad_out, *args, out, "nprf", True, True)
        found = operators.attention_backward_on_cpu(grad_out, *args, out, "nprf", True, True, kept)
    for name, a, b in zip(NAMES, found, plain, strict=False):
        assert torch.equal(a, b), name
