"""Gradients of attention by FFT on GPUs: the generated CUDA source, run on the CPU, against the float64 reference."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_on_cpu import compile_kernel  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig, choose
from rpe_tvm.reference import gradients
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.runtime.gpu_operator import function_names
from rpe_tvm.torch import core, operators

pytestmark = pytest.mark.compile

M, D, B, H = 3, 3, 2, 2
SHORT = choose(60, M, D)
STAGES = GpuBackwardConfig(M, 4, 128, (8, 4, 4), 16)


class Emulated:
    """The compiled functions of a config, run on the CPU block by block."""

    def __init__(self, config: GpuBackwardConfig) -> None:
        self.config, self.source, self.kernels = config, generated(config), {}
        self.directory = tempfile.TemporaryDirectory()
        self.calls: list[str] = []
        self.instance = GpuInstance(
            config, {name: functools.partial(self.call, name) for name in function_names(config)}
        )

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        arrays = [x.numpy() if isinstance(x, torch.Tensor) else x for x in arguments]
        method: Callable[..., None] = self.features if name.startswith("features") else getattr(self, name)
        method(*arrays, **({"name": name} if name.startswith("features") else {}))

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, **arguments: Any) -> None:
        if kernel not in self.kernels:
            self.kernels[kernel] = compile_kernel(self.source, Path(self.directory.name), kernel)
        sizes = {}
        for name, x in arguments.items():
            if name in ("query", "key", "value"):
                sizes |= {f"{name}_stride{axis}": x.strides[axis] // 4 for axis in range(x.ndim - 1)}
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    self.kernels[kernel]((x, y, z), threads, {"batch": grid[2], "heads": grid[1], **sizes, **arguments})

    def features(self, query: Any, key: Any, projection: Any, phi_q: Any, phi_k: Any, name: str) -> None:
        # those of the forward pass, and tested with it
        feature_map = {"features_prf": reference.prf, "features_nprf": reference.nprf}[name]
        for x, phi in ((query, phi_q), (key, phi_k)):
            phi[:] = 0.0
            phi[..., : x.shape[2]] = feature_map(x, projection).swapaxes(2, 3)

    def largest(self, bias: Any, n_q: int, n_k: int, causal: int, largest: Any) -> None:
        # its kernel reduces across threads with shuffles, which cannot run here
        largest[:] = bias[:, : n_q if causal else None].max(1)

    def spectrum(self, bias: Any, largest: Any, n_q: int, n_k: int, causal: int, tables: Any, spectrum: Any) -> None:
        arguments = {"rpe_bias": bias, "largest": largest, "n_query": n_q, "n_key": n_k, "causal": causal}
        grid = (2, len(bias), 1)
        self.launch("spectrum_kernel", grid, self.config.threads, **arguments, tables=tables, spectrum=spectrum)

    def denominators(self, phi_q: Any, phi_k: Any, spectrum: Any, tables: Any, terms: Any) -> None:
        arguments = {"phi_q": phi_q, "phi_k": phi_k, "spectrum": spectrum, "tables": tables, "terms": terms}
        self.launch("denominators_kernel", (2 * M, *phi_q.shape[1::-1]), self.config.threads, **arguments)

    def backward(self, phi_q: Any, phi_k: Any, channels: Any, spectrum: Any, tables: Any, sums: Any) -> None:
        arguments = {"phi_q": phi_q, "phi_k": phi_k, "channels": channels, "spectrum": spectrum, "tables": tables}
        self.launch("backward_kernel", (2 * M, *phi_q.shape[1::-1]), self.config.threads, **arguments, sums=sums)

    def attention(self, phi_q: Any, phi_k: Any, value: Any, spectrum: Any, tables: Any, partial: Any) -> None:
        arguments = {"phi_q": phi_q, "phi_k": phi_k, "value": value, "spectrum": spectrum, "tables": tables}
        grid = (2 * partial.shape[2], *phi_q.shape[1::-1])
        n_key = value.shape[2]
        self.launch("attention_kernel", grid, self.config.threads, **arguments, partial=partial, n_key=n_key)


def generated(config: GpuBackwardConfig) -> str:
    """The CUDA source of all functions of a config."""
    import tvm
    from tvm.target import Target

    from rpe_tvm.build.device_code import generate
    from rpe_tvm.build.lower_gpu_backward import lower

    target = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024}, host={"kind": "llvm"})
    functions = lower(config).mod.functions_items()
    kept = tvm.IRModule({at.name_hint: f for at, f in functions if not at.name_hint.startswith("features")})
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        return generate(kept, target, config.name).source


@functools.cache
def emulated(config: GpuBackwardConfig) -> Emulated:
    return Emulated(config)


@pytest.fixture
def fresh_memory_holds_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _serve(monkeypatch: pytest.MonkeyPatch, config: GpuBackwardConfig) -> Emulated:
    made = emulated(config)
    made.calls.clear()
    for module in (operators, core):
        monkeypatch.setattr(module, "get_gpu_backward", lambda index, n, m, d, dtype="float32": made.instance)
    return made


def _inputs(n_q: int, n_k: int, d: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n_q)
    query, grad_out = torch.randn(2, B, n_q, H, d, generator=g).transpose(2, 3).unbind()
    key, value = torch.randn(2, B, H, n_k, d + 1, generator=g)[..., 1:].unbind()
    bias, projection = torch.randn(H, n_q + n_k - 1, generator=g), torch.randn(M, d, generator=g)
    return {
        "grad_out": grad_out,
        "query": query,
        "key": key,
        "value": value,
        "rpe_bias": bias,
        "projection": projection,
    }


def _check(found: tuple[torch.Tensor, ...], want: Any, tolerance: float) -> None:
    for x, y, name in zip(found, want, want._fields, strict=True):
        assert x.shape == y.shape and x.is_contiguous() and x.isfinite().all()
        error = np.linalg.norm(x.double().numpy() - y) / np.linalg.norm(y)
        assert error < tolerance, (name, error)


CASES = [
    # n_q, n_k, config, feature map, causal
    (64, 64, SHORT, "nprf", False),
    (37, 60, SHORT, "prf", False),
    (60, 37, SHORT, "nprf", True),
    (101, 127, STAGES, "prf", True),
]


@pytest.mark.parametrize(("n_q", "n_k", "config", "feature_map", "is_causal"), CASES)
@pytest.mark.usefixtures("fresh_memory_holds_nan")
def test_numbers(
    monkeypatch: pytest.MonkeyPatch, n_q: int, n_k: int, config: GpuBackwardConfig, feature_map: str, is_causal: bool
) -> None:
    made = _serve(monkeypatch, config)
    inputs = _inputs(n_q, n_k, config.head_dim)
    grad_out, *tensors = inputs.values()
    arrays = [x.double().numpy() for x in inputs.values()]
    out = reference.attention(*arrays[1:], feature_map=feature_map, is_causal=is_causal)[2]
    found = operators._kernelized_attention_backward_cuda(
        grad_out, *tensors, torch.tensor(out).float(), feature_map, is_causal, True
    )
    want = reference.attention_gradients(*arrays, feature_map, is_causal)
    # causal: rows of few terms carry the rounding errors of the longest sums, see docs/operators.md
    _check(found, want, 1e-3 if is_causal else 2e-6)
    unused = {f"features_{name}" for name in ("prf", "nprf") if name != feature_map}
    assert set(made.calls) == set(function_names(config)) - unused


@pytest.mark.usefixtures("fresh_memory_holds_nan")
def test_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is the value itself: no other gradient."""
    _serve(monkeypatch, SHORT)
    grad_out, query, key, value, bias, projection = _inputs(1, 1, D).values()
    found = operators._kernelized_attention_backward_cuda(
        grad_out, query, key, value, bias, projection, value, "prf", True, False
    )
    torch.testing.assert_close(found[2], grad_out.contiguous(), rtol=1e-5, atol=1e-5)
    for x in (found[0], found[1], found[3], found[4]):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("fresh_memory_holds_nan")
def test_ready_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that see no key with features pass no gradient."""
    _serve(monkeypatch, SHORT)
    grad_out, query, key, value, bias, _ = _inputs(50, 60, D).values()
    phi_q, phi_k = query.exp(), key.exp()
    phi_k[:, :, :12] = 0.0
    arrays = [x.double().numpy() for x in (grad_out, phi_q, phi_k, value, bias)]
    offset = torch.arange(60) - torch.arange(50)[:, None] + 49
    scores = (phi_q @ phi_k.mT * bias.exp()[:, offset]).tril()
    out = torch.nan_to_num(scores @ value / scores.sum(-1, keepdim=True))
    sees_none = core._sees_none(phi_q, phi_k, True)
    found = core._backward_cuda(grad_out, phi_q, phi_k, value, bias, out, sees_none, True)
    assert (found[0][:, :, :12] == 0).all()
    _check(found, gradients.core_gradients(*arrays, is_causal=True), 1e-3)


@pytest.mark.usefixtures("fresh_memory_holds_nan")
def test_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, SHORT)
    grad_out, query, key, value, bias, projection = _inputs(60, 60, D).values()
    half = [x.bfloat16() for x in (grad_out, query, key, value)]
    exact = [*(x.float() for x in half), bias, projection]
    arrays = [x.double().numpy() for x in exact]
    out = torch.tensor(reference.attention(*arrays[1:], feature_map="nprf")[2])
    found = operators._kernelized_attention_backward_cuda(*half, bias, projection, out.bfloat16(), "nprf", False, True)
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    _check(found, reference.attention_gradients(*arrays, "nprf"), 4 * torch.finfo(torch.bfloat16).eps)
