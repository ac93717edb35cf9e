"""The operator's registration: layouts, errors, autograd, compile and export. The kernel is the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpe_tvm import reference
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import NPRF, PRF, gaussian_projection, kernelized_attention

B, H, N, D, M = 2, 3, 10, 8, 4


def inputs(n_q=N, n_k=N, batch=B, heads=H, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n_q, D, generator=g)
    key = torch.randn(batch, heads, n_k, D, generator=g)
    value = torch.randn(batch, heads, n_k, D, generator=g)
    rpe_bias = torch.randn(heads, max(n_q + n_k - 1, 0), generator=g)
    return query, key, value, rpe_bias, gaussian_projection(M, D, seed=1)


def operator(*args, feature_map="nprf", is_causal=False):
    return torch.ops.rpe_tvm.kernelized_attention(*args, feature_map, is_causal)


def expected(*args, feature_map="nprf", is_causal=False):
    return torch.from_numpy(
        reference.attention(*(x.numpy() for x in args), feature_map=feature_map, is_causal=is_causal)[2]
    ).float()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("kind", "name"), [(PRF, "prf"), (NPRF, "nprf")])
@pytest.mark.parametrize(("n_q", "n_k"), [(10, 10), (4, 9), (9, 4), (1, 1)])
def test_values(reference_operator, kind, name, n_q, n_k, is_causal):
    query, key, value, rpe_bias, projection = inputs(n_q, n_k)
    out = kernelized_attention(query, key, value, rpe_bias, feature_map=kind(projection), is_causal=is_causal)
    want = expected(query, key, value, rpe_bias, projection, feature_map=name, is_causal=is_causal)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert reference_operator.lookups == [(max(n_q, n_k), M, D)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_opcheck(reference_operator, layout, is_causal):
    query, key, value, rpe_bias, projection = inputs()
    if layout == "transposed":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    elif layout == "fused":
        query, key, value = torch.randn(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind()
    args = (query, key, value, rpe_bias, projection, "nprf", is_causal)
    result = torch.library.opcheck(torch.ops.rpe_tvm.kernelized_attention.default, args)
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


def test_the_output_lies_in_memory_as_query_does(reference_operator):
    query, *rest = inputs()
    assert operator(query, *rest).is_contiguous()
    seen = operator(query.transpose(1, 2).contiguous().transpose(1, 2), *rest)
    assert seen.stride() == (N * H * D, D, H * D, 1)
    flat = seen.transpose(1, 2).reshape(B, N, H * D)
    assert flat.data_ptr() == seen.data_ptr()
    assert operator(query.mT.contiguous().mT, *rest).is_contiguous()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_the_fake_kernel_gives_the_strides_of_the_kernel(reference_operator, data):
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = data.draw(st.tuples(*[st.integers(0, 3)] * 3, st.integers(1, 3)), label="shape")
    order = data.draw(st.permutations(range(4)), label="order")
    steps = data.draw(st.tuples(*[st.integers(1, 2)] * 4), label="steps")
    base = torch.randn([shape[axis] * steps[axis] for axis in order])
    query = base.permute([order.index(axis) for axis in range(4)])
    query = query[tuple(slice(None, None, step) for step in steps)]
    if data.draw(st.booleans(), label="expand") and shape[1] > 0:
        query = query[:, :1].expand(shape)
    batch, heads, n, d = query.shape
    key, rpe_bias, projection = torch.randn(batch, heads, 3, d), torch.randn(heads, n + 2), torch.randn(M, d)
    out = operator(query, key, key, rpe_bias, projection)
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(x) for x in (query, key, key, rpe_bias, projection)]
        fake = operator(*args)
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)
    assert out.numel() == 0 or d == 1 or out.stride(-1) == 1
    torch.testing.assert_close(out, expected(query, key, key, rpe_bias, projection))


def test_views_with_a_contiguous_last_axis_are_read_in_place(reference_operator):
    fused = torch.randn(B, N, 3, H, D + 4)
    query, key, value = (x[..., :D].transpose(1, 2) for x in fused.unbind(2))
    rpe_bias, projection = inputs()[3:]
    out = operator(query, key, value, rpe_bias, projection)
    (call,) = reference_operator.calls
    for name, x in (("query", query), ("key", key), ("value", value), ("rpe_bias", rpe_bias), ("out", out)):
        assert call[name].data_ptr() == x.data_ptr() and call[name].stride() == x.stride(), name
    torch.testing.assert_close(out, expected(query, key, value, rpe_bias, projection))


def test_other_views_are_made_contiguous(reference_operator):
    query, key, value, rpe_bias, projection = inputs()
    strided = [torch.stack([x, x], -1)[..., 0] for x in (query, key, value)]
    bias = torch.stack([rpe_bias, rpe_bias], -1)[..., 0]
    w = projection.T.contiguous().T
    out = operator(*strided, bias, w)
    (call,) = reference_operator.calls
    assert all(call[name].stride(-1) == 1 for name in ("query", "key", "value", "out"))
    assert call["rpe_bias"].is_contiguous() and call["projection"].is_contiguous()
    torch.testing.assert_close(out, expected(query, key, value, rpe_bias, projection))


def test_lazy_negation_is_resolved(reference_operator):
    query, key, value, rpe_bias, projection = inputs()

    def lazy(x):
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert view.is_neg()
        return view

    out = operator(lazy(query), lazy(key), lazy(value), lazy(rpe_bias), lazy(projection))
    torch.testing.assert_close(out, expected(query, key, value, rpe_bias, projection))
    assert not any(
        call[name].is_neg() for call in reference_operator.calls for name in ("query", "key", "value", "rpe_bias")
    )


@pytest.mark.parametrize(("n_q", "n_k", "batch", "heads"), [(5, 5, 0, 3), (0, 5, 2, 3), (0, 0, 2, 3), (5, 5, 2, 0)])
def test_nothing_to_compute(reference_operator, n_q, n_k, batch, heads):
    args = inputs(n_q, n_k, batch, heads)
    assert operator(*args).shape == (batch, heads, n_q, D)
    assert reference_operator.lookups == []


def test_no_keys_give_zeros_as_in_sdpa(reference_operator):
    args = inputs(5, 0)
    assert torch.equal(operator(*args), torch.zeros(B, H, 5, D))
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(*args[:3]), torch.zeros(B, H, 5, D))
    assert reference_operator.lookups == []


def replaced(index, x):
    args = list(inputs())
    args[index] = x
    return args


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (H, N, D), r"query: expected \[B, H, n_q, d\], got \[3, 10, 8\]"),
        (1, (B, H, N, D + 1), r"key: expected \[2, 3, n_k, 8\] as query has, got \[2, 3, 10, 9\]"),
        (1, (B, 1, N, D), r"key: expected \[2, 3, n_k, 8\] as query has, got \[2, 1, 10, 8\]"),
        (1, (B + 1, H, N, D), r"key: expected \[2, 3, n_k, 8\]"),
        (2, (B, H, N + 1, D), r"value: expected \[2, 3, 10, 8\] as key has, got \[2, 3, 11, 8\]"),
        (2, (N, D), r"value: expected \[B, H, n_k, d\], got \[10, 8\]"),
        (3, (H, 2 * N), r"rpe_bias: expected \[H, n_q \+ n_k - 1\] = \[3, 19\], got \[3, 20\]"),
        (3, (1, 2 * N - 1), r"rpe_bias: expected .* got \[1, 19\]"),
        (3, (2 * N - 1,), r"rpe_bias: expected .* got \[19\]"),
        (4, (M, D + 1), r"projection: expected \[m, 8\] for this query, got \[4, 9\]"),
        (4, (0, D), r"at least 1"),
    ],
)
def test_shapes_are_checked(reference_operator, index, shape, message):
    with pytest.raises(ShapeError, match=message):
        operator(*replaced(index, torch.zeros(shape)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.complex64])
@pytest.mark.parametrize("index", range(5))
def test_dtypes_are_checked(reference_operator, index, dtype):
    with pytest.raises(DTypeError, match=rf"expected torch.float32, got {dtype}. Convert it with .to\(torch.float32\)"):
        operator(*replaced(index, inputs()[index].to(dtype)))


@pytest.mark.parametrize("index", range(5))
def test_devices_are_checked(reference_operator, index):
    with pytest.raises(ValueError, match=r"expected a CPU tensor or .*, got one on meta.*\.cpu\(\)"):
        operator(*replaced(index, inputs()[index].to("meta")))


def test_unknown_feature_maps(reference_operator):
    query, key, value, rpe_bias, projection = inputs()
    with pytest.raises(ValueError, match=r"Unknown feature map 'relu': expected one of 'prf', 'nprf'"):
        operator(query, key, value, rpe_bias, projection, feature_map="relu")
    with pytest.raises(TypeError, match=r"expected PRF\(projection\) or NPRF\(projection\).*got 'nprf'"):
        kernelized_attention(query, key, value, rpe_bias, feature_map="nprf")


def exact_gradients(grad_out, args, feature_map="nprf", is_causal=False):
    return reference.attention_gradients(grad_out.numpy(), *(x.detach().numpy() for x in args), feature_map, is_causal)


@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(10, 10), (4, 9), (9, 4), (1, 1)])
def test_gradients(reference_operator, n_q, n_k, is_causal, feature_map):
    args = [x.requires_grad_() for x in inputs(n_q, n_k)]
    out = operator(*args, feature_map=feature_map, is_causal=is_causal)
    grad_out = torch.randn(out.shape)
    got = torch.autograd.grad(out, args, grad_out)
    for x, grad, want in zip(args, got, exact_gradients(grad_out, args, feature_map, is_causal), strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype and grad.is_contiguous()
        torch.testing.assert_close(grad, torch.from_numpy(want).float(), rtol=1e-5, atol=1e-5)
    assert reference_operator.backward_lookups == [(max(n_q, n_k), M, D)]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_one_tensor_alone(reference_operator, index, compiled):
    torch._dynamo.reset()
    args = inputs()
    args[index].requires_grad_()
    call = torch.compile(operator, fullgraph=True, backend="aot_eager") if compiled else operator
    out = call(*args)
    torch.testing.assert_close(out.detach(), expected(*(x.detach() for x in args)))
    out.sum().backward()
    want = exact_gradients(torch.ones(out.shape), args)[index]
    torch.testing.assert_close(args[index].grad, torch.from_numpy(want).float(), rtol=1e-5, atol=1e-5)
    assert all(x.grad is None for each, x in enumerate(args) if each != index)
    with torch.no_grad():
        assert not call(*args).requires_grad


@pytest.mark.parametrize(("n_q", "n_k", "batch"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
def test_gradients_of_nothing_are_zeros(reference_operator, n_q, n_k, batch):
    args = [x.requires_grad_() for x in inputs(n_q, n_k, batch)]
    grads = torch.autograd.grad(operator(*args).sum(), args)
    assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, args, strict=True))
    assert reference_operator.backward_lookups == []


def test_gradients_of_gradients_are_refused(reference_operator):
    args = [x.requires_grad_() for x in inputs()]
    grads = torch.autograd.grad(operator(*args).square().sum(), args, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gradient of its gradients.*Drop create_graph=True"):
        grads[0].sum().backward()


def attend(query, key, value, rpe_bias, projection):
    out = kernelized_attention(query * 2, key, value, rpe_bias, feature_map=NPRF(projection), is_causal=True)
    return out.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(reference_operator, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=dynamic)
    for n_q, n_k in ((10, 10), (7, 12)):
        args = inputs(n_q, n_k)
        torch.testing.assert_close(compiled(*args), attend(*args))


class Attend(torch.nn.Module):
    def forward(self, *args):
        return attend(*args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(reference_operator, dynamic):
    batch, n = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("n", min=2, max=64)
    x = {0: batch, 2: n}
    shapes = ((x, x, x, {1: 2 * n - 1}, {}),) if dynamic else None
    program = torch.export.export(Attend(), inputs(), dynamic_shapes=shapes, strict=False)
    assert "rpe_tvm.kernelized_attention" in str(program.graph)
    for batch_size, length in itertools.product((1, 3), (5, 30)) if dynamic else ((B, N),):
        args = inputs(length, length, batch_size)
        torch.testing.assert_close(program.module()(*args), attend(*args))


def test_non_finite_input_is_passed_on(reference_operator):
    query, key, value, rpe_bias, projection = inputs()
    value[0, 0, 3, 2] = np.nan
    out = operator(query, key, value, rpe_bias, projection)
    assert out[0, 0, :, 2].isnan().all() and out[1].isfinite().all()
