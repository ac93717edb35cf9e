"""kernelized_attention with features computed in torch, against the dense formula in float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import (
    NPRF,
    PRF,
    RFA,
    T2R,
    TRF,
    attention,
    elu_features,
    gaussian_projection,
    kernelized_attention,
    relu_features,
    sikf_features,
)

B, H, D, M = 2, 4, 6, 8


def t2r():
    torch.manual_seed(0)
    made = T2R(H, D, M)
    torch.nn.init.ones_(made.bias)  # so that hardly any pair of query and key has no common feature
    return made


def weights_of(feature_map):
    if isinstance(feature_map, PRF | NPRF | TRF):
        return [feature_map.projection]
    return list(feature_map.parameters()) if isinstance(feature_map, torch.nn.Module) else []


# Each map, and its kernel phi(x) . phi(y) for one head from the definition, up to factors that cancel in the output.
MAPS = {
    "prf": lambda: PRF(gaussian_projection(M, D, seed=1).requires_grad_()),
    "nprf": lambda: NPRF(gaussian_projection(M, D, seed=1).requires_grad_()),
    "trf": lambda: TRF(gaussian_projection(M, D, seed=1).requires_grad_()),
    "elu": lambda: elu_features,
    "relu": lambda: relu_features,
    "sikf": lambda: sikf_features,
    "t2r": t2r,
    "rfa": lambda: RFA(H, gaussian_projection(M, D, seed=1)),
}


def similarity(name, q, k, head, weights):
    """``[n_q, n_k]``: phi(q_i) . phi(k_j), in the dtype of q; and |phi(q_i)| |phi(k_j)| where features have signs."""

    def unit(x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    def waves(x, y):  # sum of sin sin + cos cos
        return torch.cos(x[:, None] - y[None]).sum(-1)

    if name == "prf":
        q, k = q * D**-0.25, k * D**-0.25
        exponent = (q @ weights[0].T)[:, None] + (k @ weights[0].T)[None]
        lengths = q.square().sum(-1)[:, None] + k.square().sum(-1)[None]
        return torch.exp(exponent - lengths[..., None] / 2).sum(-1), None
    if name == "nprf":
        return torch.exp((unit(q) @ weights[0].T)[:, None] + (unit(k) @ weights[0].T)[None]).sum(-1), None
    if name == "trf":
        q, k = q * D**-0.25, k * D**-0.25
        factor = torch.exp(k.square().sum(-1) / 2)
        return factor * waves(q @ weights[0].T, k @ weights[0].T), factor * M
    if name == "rfa":
        w = gaussian_projection(M, D, seed=1).double()
        return waves(unit(q) * weights[0][head] @ w.T, unit(k) * weights[0][head] @ w.T), float(M)
    if name == "elu":
        q, k = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
    elif name == "relu":
        q, k = q.clamp(min=0) + 1e-3, k.clamp(min=0) + 1e-3
    elif name == "sikf":
        q, k = q.exp(), k.exp()
    else:
        q, k = ((x @ weights[0][head].T + weights[1][head]).clamp(min=0) for x in (q, k))
    return q @ k.T, None


def dense(name, query, key, value, rpe_bias, weights, *, is_causal=False, key_lengths=None):
    """The output, and of each row the denominator over what it would be without cancellation."""
    n_q, n_k, group = query.shape[2], key.shape[2], H // key.shape[1]
    offset = torch.arange(n_k) - torch.arange(n_q)[:, None]
    out, condition = [], []
    for b in range(len(query)):
        for h in range(H):
            k, v = key[b, h // group], value[b, h // group]
            c = rpe_bias[h].exp()[offset + n_q - 1]
            product, size = similarity(name, query[b, h], k, h, weights)
            seen = offset <= 0 if is_causal else torch.ones_like(offset, dtype=torch.bool)
            if key_lengths is not None:
                seen = seen & (torch.arange(n_k) < key_lengths[b])
            scores = c * product * seen
            total = scores.sum(-1, keepdim=True)
            empty = ~seen.any(-1, keepdim=True)
            out.append(scores @ v / total.where(~empty, 1.0))
            size = (c * (product if size is None else size) * seen).detach().sum(-1, keepdim=True)
            condition.append((total.detach() / size.where(~empty, 1.0)).where(~empty, 1.0))
    return torch.stack(out).view(query.shape), torch.cat(condition)


def inputs(n_q, n_k, seed=0, heads=H):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(B, n_q, H, D, generator=g).transpose(1, 2)
    key, value = torch.randn(2, B, heads, n_k, D, generator=g).unbind()
    return query, key.clone(), value.clone(), 0.5 * torch.randn(H, max(n_q + n_k - 1, 0), generator=g)


def close(got, want, tolerance):
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * (1 + want.abs().max().item()))


def dense_core(phi_q, phi_k, value, rpe_bias, *, is_causal=False):
    """The contract of `toeplitz_attention` without an FFT, which costs the first causal rows their digits."""
    n_q, n_k = phi_q.shape[2], phi_k.shape[2]
    offset = torch.arange(n_k) - torch.arange(n_q)[:, None]
    scores = (phi_q @ phi_k.mT) * rpe_bias[:, offset + n_q - 1].exp()
    scores = scores * (offset <= 0) if is_causal else scores
    den = scores.sum(-1, keepdim=True)
    return (scores @ value / den.where(den != 0, 1.0)).where(den != 0, 0.0)


def check(name, args, *, tolerance=2e-4, is_causal=False, key_lengths=None):
    """Output and all gradients, unless a denominator cancels or is 0."""
    feature_map = MAPS[name]()
    weights = weights_of(feature_map)
    args = [x.detach().clone().requires_grad_() for x in args]
    exact = [x.detach().double().requires_grad_() for x in (*args, *weights)]
    options = {"is_causal": is_causal, "key_lengths": key_lengths}
    want, condition = dense(name, *exact[:4], exact[4:], **options)
    if name in ("trf", "rfa", "t2r"):
        assume(condition.min() > 0.1)
    out = kernelized_attention(*args, feature_map=feature_map, **options)
    close(out, want, tolerance)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, [*args, *weights], grad_out.to(out.dtype))
    grads = torch.autograd.grad(want, exact, grad_out.double())
    for x, grad, expected in zip([*args, *weights], got, grads, strict=True):
        assert grad.dtype == x.dtype
        close(grad, expected, 5 * tolerance)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(list(MAPS)),
    n_q=st.integers(1, 9),
    n_k=st.integers(1, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_any_map_and_shape(reference_operator, name, n_q, n_k, kv_heads, is_causal, data):
    lengths = data.draw(st.none() | st.lists(st.integers(0, n_k), min_size=B, max_size=B), label="lengths")
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    args = inputs(n_q, n_k, data.draw(st.integers(0, 99), label="seed"), kv_heads)
    with mock.patch.object(attention, "toeplitz_attention", dense_core):
        check(name, args, is_causal=is_causal, key_lengths=key_lengths)


@pytest.mark.parametrize("name", ["nprf", "elu", "sikf"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_longer_sequence(name, is_causal):
    check(name, inputs(63, 63), is_causal=is_causal, key_lengths=torch.tensor([40, 63]))


def test_a_fully_masked_sequence_gives_zeros_and_no_gradient():
    args = [x.requires_grad_() for x in inputs(5, 7)]
    out = kernelized_attention(*args, feature_map=elu_features, key_lengths=torch.tensor([0, 7]))
    assert not out[0].any() and out[1].all()
    grads = torch.autograd.grad(out.sum(), args)
    assert all(not grad[0].any() for grad in grads[:3])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integer_dtype(dtype):
    args, feature_map = inputs(2, 300), MAPS["t2r"]()
    want = kernelized_attention(*args, feature_map=feature_map, key_lengths=torch.tensor([100, 50]))
    out = kernelized_attention(*args, feature_map=feature_map, key_lengths=torch.tensor([100, 50], dtype=dtype))
    assert torch.equal(out, want)
    assert torch.library.opcheck(torch.ops.rpe_tvm.kept_keys.default, (torch.tensor([100, 50], dtype=dtype), 300))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_stands_in_padding_changes_nothing(name, garbage):
    feature_map = MAPS[name]()
    args, lengths = inputs(5, 7), torch.tensor([0, 3])

    def outcome(fill):
        query, key, value, rpe_bias = (x.clone() for x in args)
        for x in (key, value):
            x[0], x[1, :, 3:] = fill, fill
        leaves = [x.requires_grad_() for x in (query, key, value, rpe_bias)]
        out = kernelized_attention(*leaves, feature_map=feature_map, key_lengths=lengths)
        return out, *torch.autograd.grad(out.sum(), [*leaves, *weights_of(feature_map)])

    for got, want in zip(outcome(garbage), outcome(1.0), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()


def test_padding_does_not_hide_small_keys_from_sikf():
    query, key, value, rpe_bias = inputs(5, 7)
    lengths = torch.tensor([3, 4])
    out = kernelized_attention(query, key - 200, value, rpe_bias, feature_map=sikf_features, key_lengths=lengths)
    want, _ = dense("sikf", *(x.double() for x in (query, key, value, rpe_bias)), [], key_lengths=lengths)
    close(out, want, 1e-3)


@pytest.mark.parametrize("name", ["nprf", "elu", "t2r"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rpe_in_float", [False, True])
def test_half_precision_is_float32_inside(name, dtype, rpe_in_float):
    feature_map = MAPS[name]()
    half = [x.to(dtype).requires_grad_() for x in inputs(6, 6)]
    if rpe_in_float:
        half[3] = half[3].detach().float().requires_grad_()
    full = [x.detach().float().requires_grad_() for x in half]
    lengths = torch.tensor([6, 4])
    out, want = (kernelized_attention(*x, feature_map=feature_map, key_lengths=lengths) for x in (half, full))
    assert out.dtype == dtype and torch.equal(out, want.to(dtype))
    grad_out = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(want, full, grad_out.float())
    for x, got, grad in zip(half, torch.autograd.grad(out, half, grad_out), grads, strict=True):
        assert got.dtype == x.dtype and torch.equal(got, grad.to(x.dtype))


@pytest.mark.parametrize("name", ["nprf", "t2r"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name, dtype):
    feature_map = MAPS[name]()
    args = [x.to(dtype).requires_grad_() for x in inputs(6, 6)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = kernelized_attention(*args, feature_map=feature_map, is_causal=True)
        results.append([out, *torch.autograd.grad(out.float().sum(), args)])
    assert results[1][0].dtype == dtype
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@torch.no_grad()
def test_the_compiled_operator_serves_prf_and_nprf(reference_operator):
    query, key, value, rpe_bias = inputs(6, 6, heads=2)
    w = gaussian_projection(M, D, seed=1)
    for kind in (PRF, NPRF):
        out = kernelized_attention(query, key, value, rpe_bias, feature_map=kind(w))
        assert reference_operator.calls.pop()["feature_map"] == kind.name
        want, _ = dense(kind.name, *(x.double() for x in (query, key, value, rpe_bias)), [w.double()])
        close(out, want, 1e-5)
        # The same on features, because of the lengths.
        lengths = torch.tensor([6, 6])
        close(kernelized_attention(query, key, value, rpe_bias, feature_map=kind(w), key_lengths=lengths), want, 2e-4)
    bf16 = [x.bfloat16() for x in (query, key, value, rpe_bias)]
    out = kernelized_attention(*bf16, feature_map=NPRF(w.bfloat16()))
    assert out.dtype == torch.bfloat16 and len(reference_operator.calls) == 1
    want, _ = dense("nprf", *(x.double() for x in bf16), [w.bfloat16().double()])
    close(out, want, 2.0**-8)
    kernelized_attention(query, key, value, rpe_bias, feature_map=TRF(w))
    assert len(reference_operator.calls) == 1


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 3), (3, 0), (0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("name", MAPS)
def test_empty_sequences(name, n_q, n_k):
    args = [x.requires_grad_() for x in inputs(n_q, n_k)]
    for key_lengths in (None, torch.tensor([0, n_k])):
        out = kernelized_attention(*args, feature_map=MAPS[name](), key_lengths=key_lengths)
        assert out.shape == (B, H, n_q, D) and not out.any()
        assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), args))
    nobody = [x[:0] for x in args[:3]]
    assert kernelized_attention(*nobody, args[3], feature_map=MAPS[name]()).shape == (0, H, n_q, D)


def replaced(index, x):
    args = list(inputs(5, 7))
    args[index] = x
    return args


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (H, 5, D), r"query: expected \[B, H, n, d\], got \[4, 5, 6\]"),
        (0, (B, H, 5, 0), r"query: expected a head_dim of at least 1"),
        (1, (B, H, 7, D + 1), r"key: expected \[2, 4, n_k, 6\] as query has.* got \[2, 4, 7, 7\]"),
        (1, (B, 3, 7, D), r"key: .*a number of heads that divides 4, got \[2, 3, 7, 6\]"),
        (1, (B, 0, 7, D), r"key: .*a number of heads that divides 4, got \[2, 0, 7, 6\]"),
        (1, (B, 8, 7, D), r"key: .*a number of heads that divides 4, got \[2, 8, 7, 6\]"),
        (2, (B, 2, 7, D), r"value: expected \[2, 4, 7, 6\] as key has, got \[2, 2, 7, 6\]"),
        (3, (H, 12), r"rpe_bias: expected \[H, n_q \+ n_k - 1\] = \[4, 11\], got \[4, 12\]"),
        (3, (11,), r"rpe_bias: expected .* got \[11\]"),
    ],
)
def test_shapes_are_checked(index, shape, message):
    with pytest.raises(ShapeError, match=message):
        kernelized_attention(*replaced(index, torch.zeros(shape)), feature_map=elu_features)


@pytest.mark.parametrize("index", range(4))
def test_dtypes_and_devices_are_checked(index):
    x = inputs(5, 7)[index]
    name = ("query", "key", "value", "rpe_bias")[index]
    for dtype in (torch.float64, torch.int64, torch.complex64):
        with pytest.raises(DTypeError, match=rf"Invalid dtype of {name}: expected torch.float32.*got {dtype}"):
            kernelized_attention(*replaced(index, x.to(dtype)), feature_map=elu_features)
    with pytest.raises(DTypeError, match="Invalid dtype of (key|value|rpe_bias): expected torch"):  # mixed
        kernelized_attention(*replaced(index, x.bfloat16()), feature_map=elu_features)
    with pytest.raises(ValueError, match=rf"device of {name}: expected a CPU tensor or .*, got one on meta.*\.cpu\(\)"):
        kernelized_attention(*replaced(index, x.to("meta")), feature_map=elu_features)


def test_the_projection_is_checked():
    w = gaussian_projection(M, D, seed=0)
    with pytest.raises(DTypeError, match=r"projection: expected torch.float32, got torch.float16"):
        kernelized_attention(*inputs(5, 7), feature_map=NPRF(w.half()))
    bf16 = [x.bfloat16() for x in inputs(5, 7)]
    with pytest.raises(DTypeError, match=r"projection: expected torch.float32 or torch.bfloat16 as query has, got"):
        kernelized_attention(*bf16, feature_map=NPRF(w.half()))
    for args in (inputs(5, 7), [x.requires_grad_() for x in inputs(5, 7)]):
        with pytest.raises(ShapeError, match="projection"):
            kernelized_attention(*args, feature_map=NPRF(w[:, :-1]))


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1, 8]), ShapeError, "lengths from 0 to n_k = 7, got 8"),
        (torch.tensor([-1, 2]), ShapeError, "lengths from 0 to n_k = 7, got -1"),
        (torch.tensor([1]), ShapeError, r"expected \[B\] = \[2\].*got \[1\]"),
        (torch.tensor(3), ShapeError, r"expected \[B\] = \[2\].*got \[\]"),
        (torch.ones(2, 7, dtype=torch.int64), ShapeError, r"got \[2, 7\]"),
        (torch.tensor([1.0, 2.0]), DTypeError, "another integer, got torch.float32"),
        (torch.tensor([True, False]), DTypeError, "another integer, got torch.bool"),
        (torch.tensor([1, 2], device="meta"), ValueError, "device of key_lengths"),
    ],
)
def test_key_lengths_are_checked(lengths, error, message):
    with pytest.raises(error, match=message):
        kernelized_attention(*inputs(5, 7), feature_map=elu_features, key_lengths=lengths)


@pytest.mark.parametrize(
    ("feature_map", "error", "message"),
    [
        ("nprf", TypeError, "expected PRF.projection. or NPRF.projection.*got 'nprf'"),
        (NPRF, TypeError, "another callable .*got <class"),
        (lambda q, k: q, TypeError, "expected a pair of tensors"),
        (lambda q, k: (q, None), TypeError, "expected a pair of tensors"),
        (lambda q, k: (q, k[..., :2]), ShapeError, "phi_k from feature_map: .*got .2, 4, 7, 2."),
        (lambda q, k: (k, q), ShapeError, "phi_q from feature_map: .*got .2, 4, 7, 6."),
        (lambda q, k: (q[..., :0], k[..., :0]), ShapeError, "m >= 1"),
        (lambda q, k: (q[0], k), ShapeError, "phi_q"),
        (lambda q, k: (q, k.to(torch.complex64)), DTypeError, "phi_k.*complex64"),
    ],
)
def test_feature_maps_are_checked(feature_map, error, message):
    with pytest.raises(error, match=message):
        kernelized_attention(*inputs(5, 7), feature_map=feature_map)


@pytest.mark.parametrize("name", ["nprf", "t2r"])
def test_compile_with_lengths_and_gradients(name):
    torch._dynamo.reset()
    feature_map = MAPS[name]()

    def attend(query, key, value, rpe_bias, key_lengths):
        return kernelized_attention(query, key, value, rpe_bias, feature_map=feature_map, key_lengths=key_lengths)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        args = [x.requires_grad_() for x in inputs(n, n)]
        lengths = torch.tensor([n, n - 2])
        results = []
        for call in (attend, compiled):
            out = call(*args, lengths)
            results.append([out, *torch.autograd.grad(out.sum(), args)])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(ShapeError, match="from 0 to n_k = 9, got 10"):
        compiled(*args, lengths + 1)


def test_export_with_lengths():
    class Attend(torch.nn.Module):
        def forward(self, *args):
            return kernelized_attention(*args[:4], feature_map=sikf_features, key_lengths=args[4])

    args, lengths = inputs(6, 6), torch.tensor([6, 4])
    program = torch.export.export(Attend(), (*args, lengths))
    torch.testing.assert_close(program.module()(*args, lengths - 1), Attend()(*args, lengths - 1))
    with pytest.raises(ShapeError, match="got 7"):
        program.module()(*args, lengths + 1)
