"""Which calls may go past torch's dispatcher, and that those that may not do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch import NPRF, eager, kernelized_attention, operators
from rpe_tvm.torch.plain import is_plain_call


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable[..., object], types: object, args: tuple = (), kwargs: object = None):
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def test_memory_alone_is_plain() -> None:
    x, parameter = torch.zeros(2), torch.nn.Parameter(torch.zeros(2))
    assert is_plain_call(x, x[1:], x.expand(3, 2))
    assert not is_plain_call(x, parameter)
    with torch.no_grad():
        assert is_plain_call(x, parameter)
    with torch.inference_mode():
        assert is_plain_call(x, parameter, torch.zeros(2))


def test_other_tensors_are_not() -> None:
    x = torch.zeros(2)
    assert not is_plain_call(x, x.as_subclass(_Subclass))
    assert not is_plain_call(torch.zeros(2, dtype=torch.complex64).conj().imag, x)
    with FakeTensorMode():
        assert not is_plain_call(torch.zeros(2))


def test_watched_calls_are_not() -> None:
    x, seen = torch.zeros(2, 2), []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.append(is_plain_call(torch.zeros(2)))
        return row * 2

    with _Mode():
        look(x)
    with forward_ad.dual_level():
        look(x)
    with torch.device("cpu"):
        look(x)
    torch.vmap(look)(x)
    torch.func.functionalize(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen == [False] * 6
    assert is_plain_call(x)


def test_torch_compile_sees_the_operator() -> None:
    found = torch.compile(lambda x: x + float(is_plain_call(x)), backend="eager", fullgraph=False)(torch.zeros(1))
    assert found == 0


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors say that they are on a GPU; the kernel for GPUs writes zeros."""
    calls: list[str] = []

    def kernel(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append("direct")
        return torch.zeros_like(arguments[0])

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(operators, "attention_on_gpu", kernel)
    monkeypatch.setattr(eager, "remember", lambda *call: None)
    return calls


def test_a_plain_call_is_checked_all_the_same(direct_calls: list[str]) -> None:
    x, bias = torch.zeros(1, 2, 5, 4), torch.zeros(2, 9)
    kernelized_attention(x, x, x, bias, feature_map=NPRF(torch.ones(3, 4)))
    assert direct_calls == ["direct"]
    with pytest.raises(ShapeError, match=r"projection: expected \[m, 4\] for this query, got \[3, 5\]"):
        kernelized_attention(x, x, x, bias, feature_map=NPRF(torch.ones(3, 5)))
    with pytest.raises(ShapeError, match="rpe_bias"):
        kernelized_attention(x, x, x, bias[:, 1:], feature_map=NPRF(torch.ones(3, 4)))
    assert direct_calls == ["direct"]
