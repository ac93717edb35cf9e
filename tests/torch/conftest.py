"""A stand-in for the compiled operators, so that the torch layer is tested apart from the compiler."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rpe_tvm import reference  # noqa: E402
from rpe_tvm.plan import backward, wisdom  # noqa: E402
from rpe_tvm.plan.buckets import bucket_length  # noqa: E402
from rpe_tvm.reference.gradients import feature_gradients  # noqa: E402
from rpe_tvm.torch import core, operators  # noqa: E402
from rpe_tvm.torch.backward import Gradients  # noqa: E402
from rpe_tvm.torch.layouts import Sides, pack_features, unpack_features  # noqa: E402


@dataclass
class ReferenceOperator:
    """Computes with the float64 reference, and keeps what it was called with."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    lookups: list[tuple[int, int, int]] = field(default_factory=list)
    backward_lookups: list[tuple[int, int, int]] = field(default_factory=list)

    def lookup(self, n: int, num_features: int, head_dim: int) -> Any:
        self.lookups.append((n, num_features, head_dim))
        config = wisdom.direct_config(num_features, head_dim, bucket_length(n), 8)
        return SimpleNamespace(functions={"weights": _weights, "attention": _attention}, config=config, tables=None)

    def lookup_backward(self, n: int, num_features: int, head_dim: int) -> Any:
        self.backward_lookups.append((n, num_features, head_dim))
        config = backward.fft_config("none", n, num_features, head_dim, 8)

        def features(feature_map: Any) -> Any:
            def run(x: Any, projection: Any, out: Any) -> None:
                pack_features(config, _tensor(feature_map(_array(x), _array(projection))), out)

            return run

        def features_backward(name: str) -> Any:
            def run(x: Any, projection: Any, phi: Any, grad_phi: Any, grad_exponent: Any, grad_x: Any) -> None:
                n_x = x.shape[2]
                natural = unpack_features(config, grad_phi, n_x)
                grad_exponent[:, :, :n_x] = natural * unpack_features(config, phi, n_x)
                grad_x.copy_(_tensor(feature_gradients(_array(natural), _array(x), _array(projection), name)[0]))

            return run

        functions = {f"features_{name}": features(each) for name, each in _FEATURE_MAPS.items()}
        functions |= {f"features_{name}_backward": features_backward(name) for name in _FEATURE_MAPS}
        return SimpleNamespace(functions=functions, config=config, tables=None)

    def run(
        self,
        functions: Any,
        config: Any,
        tables: Any,
        query: Any,
        key: Any,
        value: Any,
        rpe_bias: Any,
        projection: Any,
        out: Any,
        *,
        feature_map: str,
        is_causal: bool,
        phi: Any = None,
    ) -> None:
        arrays = {"query": query, "key": key, "value": value, "rpe_bias": rpe_bias, "projection": projection}
        self.calls.append({**arrays, "feature_map": feature_map, "is_causal": is_causal, "out": out})
        result = reference.attention(
            *(_array(x) for x in arrays.values()), feature_map=feature_map, is_causal=is_causal
        )[2]
        out.copy_(torch.from_numpy(result))


_FEATURE_MAPS = {"prf": reference.prf, "nprf": reference.nprf}


def _array(x: Any) -> Any:
    return x.detach().double().numpy()


def _tensor(x: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(x)).float()


def _weights(rpe_bias: Any, n_q: int, n_k: int, is_causal: int, tables: Any, table: Any) -> None:
    table[:, : n_q + n_k - 1] = _tensor(reference.weights(_array(rpe_bias), n_q, bool(is_causal)))


def _attention(phi_q: Any, phi_k: Any, value: Any, table: Any, tables: Any, out: Any) -> None:
    n_q, n_k = out.shape[2], value.shape[2]
    q, k = (_array(phi.flatten(3)[..., :n].mT) for phi, n in ((phi_q, n_q), (phi_k, n_k)))
    scores = (q @ k.swapaxes(-1, -2)) * reference.toeplitz_matrix(_array(table[:, : n_q + n_k - 1]), n_q, n_k)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, as in the kernel
        out.copy_(_tensor(scores @ _array(value) / scores.sum(-1, keepdims=True)))


def _attention_backward(
    instance: Any, grad_out: Any, out: Any, phi: Any, value: Any, rpe_bias: Any, is_causal: bool
) -> Gradients:
    n_q, n_k = out.shape[2], value.shape[2]
    features = [unpack_features(instance.config, part, n) for part, n in zip(phi[1:], (n_q, n_k), strict=True)]
    found = reference.core_gradients(*map(_array, (grad_out, *features, value, rpe_bias)), is_causal)
    packed = torch.empty_like(phi.both)
    for part, grad in zip(packed, found[:2], strict=True):
        pack_features(instance.config, _tensor(grad), part)
    return Gradients(Sides(packed, packed[0], packed[1]), _tensor(found.value), _tensor(found.rpe_bias))


@pytest.fixture
def reference_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReferenceOperator]:
    operator = ReferenceOperator()
    monkeypatch.setattr(operators, "run", operator.run)
    for module in (operators, core):
        monkeypatch.setattr(module, "get_operator", operator.lookup)
        monkeypatch.setattr(module, "get_backward", operator.lookup_backward)
        monkeypatch.setattr(module, "attention_backward", _attention_backward)
    yield operator


@pytest.fixture
def openmp() -> ctypes.CDLL:
    """The OpenMP runtime that our libraries are bound to: they need ``libgomp.so.1``, which is loaded by then.

    Other packages may bring one of their own under another name (xgboost does).
    """
    return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
