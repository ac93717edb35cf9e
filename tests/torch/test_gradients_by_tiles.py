"""Gradients in float32 by tiles on GPUs: the sequence of functions and their buffers.

The functions of the host are compiled for the CPU; in the place of kernels are the formulas that they stand for. The
kernels themselves: tests/te/test_gpu_tiles_backward.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calls_on_cpu

from rpe_tvm import reference
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.reference.gradients import core_gradients, feature_gradients
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.runtime.gpu_operator import function_names
from rpe_tvm.torch import core, operators

pytestmark = pytest.mark.compile

B, H, D, M, P = 2, 3, 7, 5, 128
CONFIG = TileBackwardConfig(M, D, P, 32, 32, 1)
FEATURES = {"features_prf": reference.prf, "features_nprf": reference.nprf}


class StandIn:
    """Functions that compute what the kernels do, on the buffers that they are handed."""

    def __init__(self, folder: Path) -> None:
        from rpe_tvm.te import gpu_backward_calls

        self.calls: list[str] = []
        calls = [gpu_backward_calls.gradients(CONFIG)]
        calls += [gpu_backward_calls.backward(CONFIG, feature_map) for feature_map in ("prf", "nprf")]
        whole = {str(call.attrs["global_symbol"]): call for call in calls}
        functions: dict[str, Any] = {name: self._logged(name) for name in function_names(CONFIG) if name not in whole}
        for name, call in whole.items():
            functions[name] = calls_on_cpu.compile_calls(call, functions, folder)
        self.instance = GpuInstance(CONFIG, functions)

    def _logged(self, name: str) -> Any:
        kind = next(kind for kind in ("grad_features", "features", name) if name.startswith(kind))

        def call(*arguments: Any) -> None:
            self.calls.append(name)
            getattr(self, kind)(*arguments, *([name] if kind != name else []))

        return call

    def features(self, query: Any, key: Any, projection: Any, phi_q: Any, phi_k: Any, name: str) -> None:
        for x, phi in ((query, phi_q), (key, phi_k)):
            assert phi.shape == (*x.shape[:2], M, P) and phi.is_contiguous()
            phi.zero_()
            found = FEATURES[name](x.double().numpy(), projection.double().numpy())
            phi[..., : x.shape[2]] = torch.from_numpy(found).mT

    def weights(self, bias: Any, n_q: int, n_k: int, causal: int, origin: int, table: Any) -> None:
        assert bias.shape == (H, n_q + n_k - 1) and origin == P and table.shape == (H, 2 * P)
        table.zero_()
        allowed = bias[:, : n_q if causal else None]
        table[:, P - n_q + 1 :][:, : allowed.shape[1]] = torch.exp(allowed - allowed.amax(1, keepdim=True))

    def _scores(self, phi_q: Any, phi_k: Any, table: Any, n_q: int, n_k: int) -> tuple[Any, Any]:
        assert phi_q.is_contiguous() and phi_q.shape == phi_k.shape == (B, H, M, P)
        weights = table[:, torch.arange(n_k) - torch.arange(n_q)[:, None] + P].double()
        return phi_q.mT[:, :, :n_q].double() @ phi_k[..., :n_k].double() * weights, weights

    def grad_queries(
        self,
        value: Any,
        grad_out: Any,
        out: Any,
        phi_q: Any,
        phi_k: Any,
        table: Any,
        causal: int,
        denominators: Any,
        known: int,
        terms: Any,
        grad_phi: Any,
    ) -> None:
        n_q, n_k = out.shape[2], value.shape[2]
        scores, weights = self._scores(phi_q, phi_k, table, n_q, n_k)
        assert value.stride(3) == grad_out.stride(3) == out.stride(3) == 1 and terms.shape == (2, B, H, P)
        assert denominators.shape == (B, H, n_q) and denominators.is_contiguous()
        denominator = denominators.double() if known else scores.sum(-1)
        passes = denominator != 0
        terms[0, :, :, :n_q] = torch.where(passes, -(grad_out.double() * out).sum(-1), 0)
        terms[1, :, :, :n_q] = torch.where(passes, 1 / denominator, 0)
        pulls = grad_out.double() @ value.double().mT + terms[0, :, :, :n_q, None]
        grads = (pulls * weights * terms[1, :, :, :n_q, None]) @ phi_k[..., :n_k].double().mT
        grad_phi[:, :, :, 0, :n_q] = torch.where(passes[..., None], grads, 0).mT

    def grad_keys(
        self,
        value: Any,
        grad_out: Any,
        phi_q: Any,
        phi_k: Any,
        table: Any,
        causal: int,
        terms: Any,
        diagonals: Any,
        grad_phi: Any,
        grad_value: Any,
    ) -> None:
        n_q, n_k = grad_out.shape[2], value.shape[2]
        scores, weights = self._scores(phi_q, phi_k, table, n_q, n_k)
        assert diagonals.shape == (B, H, P // 32, P + 32) and not causal or (scores.triu(1) == 0).all()
        row_terms, inverses = (x[..., :n_q, None].double() for x in terms)
        pulls = grad_out.double() @ value.double().mT + row_terms
        grad_phi[:, :, :, 0, :n_k] = ((pulls * weights * inverses).mT @ phi_q.mT[:, :, :n_q].double()).mT
        grad_value.copy_((scores * inverses).mT @ grad_out.double())
        products = (scores * inverses * pulls).flatten(0, 1).numpy()
        sums = [np.trace(products, t, axis1=1, axis2=2) for t in range(1 - n_q, n_k)]
        diagonals.flatten(2)[..., : n_q + n_k - 1] = torch.from_numpy(np.stack(sums, axis=-1)).unflatten(0, (B, H))

    def grad_bias(self, diagonals: Any, n_q: int, n_k: int, causal: int, grad_bias: Any) -> None:
        grad_bias.copy_(diagonals.flatten(2)[..., : n_q + n_k - 1].sum(0))

    def grad_features(
        self,
        query: Any,
        key: Any,
        projection: Any,
        phi_q: Any,
        phi_k: Any,
        grad_phi_q: Any,
        grad_phi_k: Any,
        grad_query: Any,
        grad_key: Any,
        name: str,
    ) -> None:
        for x, grad_phi, grad in ((query, grad_phi_q, grad_query), (key, grad_phi_k, grad_key)):
            assert grad_phi.shape == (B, H, M, 1, P)
            arrays = (y.double().numpy() for y in (grad_phi[:, :, :, 0, : x.shape[2]].mT, x, projection))
            grad.copy_(torch.from_numpy(feature_gradients(*arrays, name.removeprefix("grad_features_"))[0]))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn(tmp_path_factory.mktemp("calls"))


@pytest.fixture(autouse=True)
def _serve(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> Iterator[None]:
    stand_in.calls.clear()
    for module in (operators, core):
        monkeypatch.setattr(module, "get_gpu_backward", lambda index, n, m, d, dtype="float32": stand_in.instance)
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    yield
    torch.use_deterministic_algorithms(False)


def _check(found: tuple[torch.Tensor, ...], want: Any) -> None:
    for x, y, name in zip(found, want, want._fields, strict=True):
        assert x.shape == y.shape and x.is_contiguous() and x.isfinite().all()
        error = np.linalg.norm(x.double().numpy() - y) / np.linalg.norm(y)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize(
    ("n_q", "n_k", "feature_map", "is_causal"), [(100, 128, "prf", False), (70, 37, "nprf", True), (1, 9, "prf", False)]
)
@pytest.mark.parametrize("kept", [False, True])
def test_numbers(stand_in: StandIn, n_q: int, n_k: int, feature_map: str, is_causal: bool, kept: bool) -> None:
    g = torch.Generator().manual_seed(n_q)
    query, grad_out = torch.randn(2, B, n_q, H, D, generator=g).transpose(2, 3).unbind()
    key, value = torch.randn(2, B, H, n_k, D + 1, generator=g)[..., 1:].unbind()
    bias, projection = torch.randn(H, n_q + n_k - 1, generator=g), torch.randn(M, D, generator=g)
    tensors = query, key, value, bias, projection
    arrays = [x.double().numpy() for x in (grad_out, *tensors)]
    _, sums, out = (
        torch.tensor(x).float() for x in reference.attention(*arrays[1:], feature_map=feature_map, is_causal=is_causal)
    )
    # the reference's weights are relative to the largest of all, the kernels' to the largest that a mask leaves
    largest = bias[:, : n_q if is_causal else None].amax(1)
    denominators = sums * (bias.amax(1) - largest).exp()[:, None] if kept else None
    found = operators.attention_backward_on_gpu(grad_out, *tensors, out, feature_map, is_causal, True, denominators)
    _check(found, reference.attention_gradients(*arrays, feature_map, is_causal))
    of_core = ["weights", "grad_queries", "grad_keys", "grad_bias"]
    assert stand_in.calls == [f"features_{feature_map}", *of_core, f"grad_features_{feature_map}"]


def test_ready_features(stand_in: StandIn) -> None:
    """Queries that see no key with features pass no gradient."""
    g = torch.Generator().manual_seed(0)
    phi_q, phi_k = torch.rand(B, H, 50, M, generator=g), torch.rand(B, H, 60, M, generator=g)
    value, grad_out = torch.randn(B, H, 60, D, generator=g), torch.randn(B, H, 50, D, generator=g)
    bias = torch.randn(H, 109, generator=g)
    phi_k[:, :, :12] = 0.0
    arrays = [x.double().numpy() for x in (grad_out, phi_q, phi_k, value, bias)]
    offset = torch.arange(60) - torch.arange(50)[:, None] + 49
    scores = (phi_q @ phi_k.mT * bias.exp()[:, offset]).tril()
    out = torch.nan_to_num(scores @ value / scores.sum(-1, keepdim=True))
    sees_none = core._sees_none(phi_q, phi_k, True)
    found = core._backward_cuda(grad_out, phi_q, phi_k, value, bias, out, sees_none, True)
    assert (found[0][:, :, :12] == 0).all()
    _check(found, core_gradients(*arrays, is_causal=True))
    assert stand_in.calls == ["weights", "grad_queries", "grad_keys", "grad_bias"]
