"""A stand-in for the compiled operator, so that the torch layer is tested apart from the compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from rpe_tvm import reference  # noqa: E402
from rpe_tvm.torch import operators  # noqa: E402


@dataclass
class ReferenceOperator:
    """Computes with the float64 reference, and keeps what it was called with."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    lookups: list[tuple[int, int, int]] = field(default_factory=list)

    def lookup(self, n: int, num_features: int, head_dim: int) -> Any:
        self.lookups.append((n, num_features, head_dim))
        return SimpleNamespace(functions={}, config=None, tables=None)

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
    ) -> None:
        arrays = {"query": query, "key": key, "value": value, "rpe_bias": rpe_bias, "projection": projection}
        self.calls.append({**arrays, "feature_map": feature_map, "is_causal": is_causal, "out": out})
        result = reference.attention(
            *(x.detach().numpy() for x in arrays.values()), feature_map=feature_map, is_causal=is_causal
        )[2]
        out.copy_(torch.from_numpy(result))


@pytest.fixture
def reference_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReferenceOperator]:
    operator = ReferenceOperator()
    monkeypatch.setattr(operators, "get_operator", operator.lookup)
    monkeypatch.setattr(operators, "run", operator.run)
    yield operator
