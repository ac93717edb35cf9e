"""The host's function of the gradients on tensor cores hands every kernel its own buffers; run on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calls_on_cpu

from rpe_tvm.plan import gpu_workspace
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig, diagonals_shape
from rpe_tvm.te.cuda_backward import backward

pytestmark = pytest.mark.compile

B, H, N_Q, N_K, M, D = 2, 3, 70, 37, 6, 8


def _named(argument: Any) -> Any:
    """A number as it is, of a tensor where it lies and its shape."""
    if argument.kind != calls_on_cpu._TENSOR:
        return argument.value
    tensor = calls_on_cpu._Tensor.from_address(argument.value)
    return tensor.data, tuple(tensor.shape[: tensor.rank])


def test_every_kernel_gets_its_buffers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calls_on_cpu, "_value", _named)
    config = TensorCoreBackwardConfig(M, D, 64, "bfloat16", 1, 1, 2, 64)
    places, size = gpu_workspace.places(config, B, H, 128, 64)
    workspace = torch.zeros(size, dtype=torch.uint8)
    rows = {"query": N_Q, "key": N_K, "value": N_K, "out": N_Q, "grad_out": N_Q}
    rows |= {"grad_query": N_Q, "grad_key": N_K, "grad_value": N_K}
    tensors = {name: torch.zeros(B, H, n, D, dtype=torch.bfloat16) for name, n in rows.items()}
    tensors |= {name: torch.zeros(H, N_Q + N_K - 1) for name in ("bias", "grad_bias")}
    tensors |= {
        "projection": torch.zeros(M, D),
        "denominators": torch.zeros(B, H, N_Q),
        "diagonals": torch.zeros(diagonals_shape(config, B, H, N_Q, N_K)),
    }
    names = {(tensor.data_ptr(), tuple(tensor.shape)): name for name, tensor in tensors.items()}
    names |= {(workspace.data_ptr() + place.offset, place.shape): name for name, place in places.items()}
    calls: dict[str, list[Any]] = {}

    def log(name: str) -> Any:
        return lambda *arguments: calls.update({name: [x if isinstance(x, int) else names[x] for x in arguments]})

    callees = {name: log(name) for name in ("features_nprf", "weights", "grad_queries", "grad_keys", "grad_bias")}
    compiled = calls_on_cpu.compile_calls(backward(config, "nprf"), callees, tmp_path)
    inputs = [tensors[name] for name in ("query", "key", "value", "bias", "projection", "out", "grad_out")]
    inputs.append(tensors["denominators"])
    outputs = [tensors[name] for name in ("diagonals", "grad_query", "grad_key", "grad_value", "grad_bias")]
    compiled(*inputs, 1, 0, 1, 2, 1, workspace, *outputs)
    features, flags = ["phi_q", "phi_k", "table"], [0, 1, 1]  # not causal, NPRF, of the projection
    queries = ["query", "value", "grad_out", "out", "denominators", *features, "projection", 1, *flags]
    queries += ["exponent_q", "terms"]
    keys = ["key", "value", "grad_out", *features, "terms", "projection", *flags, "exponent_k", "diagonals"]
    assert calls == {
        "features_nprf": ["query", "key", "projection", "phi_q", "phi_k"],
        "weights": ["bias", N_Q, N_K, 0, 128, "table"],
        "grad_queries": [*queries, "grad_query"],
        "grad_keys": [*keys, "grad_key", "grad_value"],
        "grad_bias": ["diagonals", N_Q, N_K, 0, 128, "grad_bias"],
    }
