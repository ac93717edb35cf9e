"""Calls that are like one before: what is skipped, and what makes a call another one. No GPU is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpe_tvm.errors import SecondGradientError, ShapeError
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.torch import NPRF, PRF, attention, cuda, eager, kernelized_attention, operators, use_artefacts

N, D, M = 10, 40, 16  # m and d of other tests, which share compiled operators


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _dense(query: Any, key: Any, value: Any, bias: Any, projection: Any, is_causal: bool) -> torch.Tensor:
    n_q, n_k = query.shape[2], key.shape[2]
    offsets = torch.arange(n_k) - torch.arange(n_q)[:, None]
    weights = bias.exp()[:, offsets + n_q - 1] * ((offsets <= 0) | (not is_causal))
    query, key, value = query.float(), key.float(), value.float()
    scores = (query @ projection.T).exp() @ (key @ projection.T).exp().mT * weights
    result: torch.Tensor = scores @ value / scores.sum(-1, keepdim=True)
    return result


@pytest.fixture(
    params=[
        GpuAttentionConfig(M, D, 64, (8, 8), 32),
        TensorCoreConfig(M, D, 64, "bfloat16"),
        TileConfig(M, D, 128, 1, 1),
    ]
)
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors say that they are on a GPU, whose kernels are plain torch. Which calls were checked."""
    calls: list[str] = []

    def forward(q: Any, k: Any, v: Any, b: Any, w: Any, *rest: Any) -> None:
        rest[-1].copy_(_dense(q, k, v, b, w, bool(rest[-3])))

    def recorded(q: Any, k: Any, v: Any, b: Any, w: Any, causal: int, workspace: Any, kept: Any, out: Any) -> None:
        forward(q, k, v, b, w, causal, workspace, out)
        kept.copy_(out.sum(-1))

    def backward(grad_out: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        *tensors, out, _, is_causal, _, kept = arguments
        assert (kept is not None) == isinstance(request.param, TileConfig | TensorCoreConfig)
        assert kept is None or torch.equal(kept, out.sum(-1))
        tensors = [x.detach().requires_grad_() for x in tensors]
        with torch.enable_grad():
            return torch.autograd.grad(_dense(*tensors, is_causal), tensors, grad_out)

    def check(*arguments: Any) -> None:
        calls.append("checked")
        inner(*arguments)

    inner = attention._check_inputs
    functions = {
        f"{kind}_{name}": f for name in ("prf", "nprf") for kind, f in (("forward", forward), ("recorded", recorded))
    }
    instance = GpuInstance(request.param, functions)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(attention, "_check_inputs", check)
    monkeypatch.setattr(operators, "attention_backward_on_gpu", backward)
    for module in (eager, operators):
        monkeypatch.setattr(module, "get_gpu_operator", lambda *call: instance)
    for user in (eager, cuda):
        monkeypatch.setattr(user, "current_gpu", lambda x: contextlib.nullcontext())
    eager._known.clear()
    return calls


def _inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [*torch.randn(3, 2, 3, N, D, generator=g).unbind(), torch.randn(3, 2 * N - 1, generator=g)]


def _map() -> NPRF:
    return NPRF(torch.randn(M, D, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_an_equal_call_is_not_checked_again(checked: list[str], is_causal: bool) -> None:
    first = kernelized_attention(*_inputs(), feature_map=_map(), is_causal=is_causal)
    others = [torch.randn_like(x) for x in _inputs()]
    out = kernelized_attention(*others, feature_map=_map(), is_causal=is_causal)
    assert checked == ["checked"]
    torch.testing.assert_close(first, _dense(*_inputs(), _map().projection, is_causal))
    torch.testing.assert_close(out, _dense(*others, _map().projection, is_causal))


_CHANGES = pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, b: (q[:, :, 1:], k, v, b[:, 1:]),
        lambda q, k, v, b: (q, k[:, :, 1:], v[:, :, 1:], b[:, 1:]),
        lambda q, k, v, b: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, b),
        lambda q, k, v, b: (q.bfloat16(), k.bfloat16(), v.bfloat16(), b),
        lambda q, k, v, b: (q, k, torch.zeros(v.numel() + 1)[1:].view(v.shape), b),
        lambda q, k, v, b: (q[:1], k[:1], v[:1], b),
    ],
    ids=["queries", "keys", "strides", "dtype", "address", "batch"],
)


@_CHANGES
def test_another_call_is_checked(checked: list[str], change: Callable[..., Any]) -> None:
    kernelized_attention(*_inputs(), feature_map=_map())
    kernelized_attention(*change(*_inputs()), feature_map=_map())
    assert checked == ["checked", "checked"]


def test_other_arguments_are_checked(checked: list[str]) -> None:
    kernelized_attention(*_inputs(), feature_map=_map())
    kernelized_attention(*_inputs(), feature_map=_map(), is_causal=True)
    kernelized_attention(*_inputs(), feature_map=PRF(_map().projection))
    assert checked == ["checked"] * 3
    with pytest.raises(ShapeError, match="rpe_bias"):
        query, key, value, bias = _inputs()
        kernelized_attention(query, key, value, bias[:, 1:], feature_map=_map())
    with pytest.raises(ShapeError, match="projection"):
        kernelized_attention(*_inputs(), feature_map=NPRF(torch.ones(M, D + 1)))
    with _Mode():
        kernelized_attention(*_inputs(), feature_map=_map())
    assert checked == ["checked"] * 6
    use_artefacts(None)
    kernelized_attention(*_inputs(), feature_map=_map())
    assert checked == ["checked"] * 7


def test_what_kernels_do_not_read_in_place_is_not_remembered(checked: list[str]) -> None:
    query, key, value, bias = _inputs()
    apart = torch.stack((bias, bias), -1)[..., 0]
    turned = key.mT.contiguous().mT
    for inputs in ((query, key, value, apart), (query, turned, value, bias), (query[:, :0], key[:, :0], value[:, :0])):
        more = () if len(inputs) == 4 else (bias[:0],)
        kernelized_attention(*inputs, *more, feature_map=_map())
    assert not eager._known


def test_only_so_many_are_kept(checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "MOST_CALLS", 2)
    query, key, value, bias = _inputs()
    for n in range(2, N):
        x = query[:, :, :n], key[:, :, :n], value[:, :, :n], bias[:, : 2 * n - 1].contiguous()
        torch.testing.assert_close(kernelized_attention(*x, feature_map=_map()), _dense(*x, _map().projection, False))
        assert len(eager._known) <= 2


def test_gradients(checked: list[str]) -> None:
    with torch.no_grad():
        kernelized_attention(*_inputs(), feature_map=_map())
    inputs, grad_out = [x.requires_grad_() for x in _inputs()], torch.randn(2, 3, N, D)
    feature_map = NPRF(_map().projection.requires_grad_())
    wanted = [*inputs, feature_map.projection]
    out = kernelized_attention(*inputs, feature_map=feature_map)
    expected = torch.autograd.grad(_dense(*inputs, feature_map.projection, False), wanted, grad_out)
    found = torch.autograd.grad(out, wanted, grad_out)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert checked == ["checked"]


def test_gradients_of_gradients_are_refused(checked: list[str]) -> None:
    with torch.no_grad():
        kernelized_attention(*_inputs(), feature_map=_map())
    query, *others = _inputs()
    out = kernelized_attention(query.requires_grad_(), *others, feature_map=_map())
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(SecondGradientError):
        grad.sum().backward()
    assert checked == ["checked"]


@pytest.fixture
def checked_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which calls on the CPU were checked."""
    calls: list[str] = []

    def check(*arguments: Any) -> None:
        calls.append("checked")
        inner(*arguments)

    inner = attention._check_inputs
    monkeypatch.setattr(attention, "_check_inputs", check)
    eager._known.clear()
    return calls


@pytest.mark.parametrize("is_causal", [False, True])
def test_an_equal_call_on_the_cpu_is_not_checked_again(checked_on_cpu: list[str], is_causal: bool) -> None:
    for _ in range(2):
        inputs = [torch.randn_like(x) for x in _inputs()]
        out = kernelized_attention(*inputs, feature_map=_map(), is_causal=is_causal)
        query, key, value, bias = inputs
        # NPRF's features are those of directions, and factors of them cancel
        directions = [x / x.norm(dim=-1, keepdim=True) for x in (query, key)]
        torch.testing.assert_close(out, _dense(*directions, value, bias, _map().projection, is_causal))
    assert checked_on_cpu == ["checked"]


@_CHANGES
def test_another_call_on_the_cpu_is_right(checked_on_cpu: list[str], change: Callable[..., Any]) -> None:
    kernelized_attention(*_inputs(), feature_map=_map())
    changed = change(*_inputs())
    out = kernelized_attention(*changed, feature_map=_map())
    fresh = [x.clone(memory_format=torch.contiguous_format) for x in changed]
    eager._known.clear()
    torch.testing.assert_close(out, kernelized_attention(*fresh, feature_map=_map()), rtol=0, atol=0)
    assert checked_on_cpu == ["checked"] * 3


def test_gradients_of_an_equal_call_on_the_cpu(checked_on_cpu: list[str]) -> None:
    with torch.no_grad():
        kernelized_attention(*_inputs(), feature_map=_map())
    found = []
    for _ in range(2):
        inputs = [x.requires_grad_() for x in _inputs()]
        out = kernelized_attention(*inputs, feature_map=_map())
        found.append(torch.autograd.grad(out.square().sum(), inputs))
        assert checked_on_cpu == ["checked"] * len(found)
        eager._known.clear()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("turn", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
@pytest.mark.parametrize("index", range(4))
def test_other_layouts_are_refused_after_an_equal_call(
    checked_on_cpu: list[str], turn: Callable[[torch.Tensor], torch.Tensor], index: int
) -> None:
    inputs = _inputs()
    kernelized_attention(*inputs, feature_map=_map())
    inputs[index] = turn(inputs[index])
    name = ("query", "key", "value", "rpe_bias")[index]
    with pytest.raises(ValueError, match=rf"Invalid layout of {name}: expected torch.strided, got .*to_dense"):
        kernelized_attention(*inputs, feature_map=_map())
