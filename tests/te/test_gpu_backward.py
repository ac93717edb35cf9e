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
from calls_on_cpu import compile_calls  # noqa: E402
from cuda_on_cpu import compile_kernel  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan import gpu_buffers
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig, choose
from rpe_tvm.reference import gradients
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.runtime.gpu_operator import function_names
from rpe_tvm.schedules import gpu_backward as schedules
from rpe_tvm.schedules.gpu_gradients import THREADS
from rpe_tvm.te import gpu_backward_calls
from rpe_tvm.te.features import FEATURE_MAPS as MAPS
from rpe_tvm.te.gpu_attention import TILE
from rpe_tvm.te.gpu_gradients import column_groups
from rpe_tvm.torch import core, operators

pytestmark = pytest.mark.compile

M, D, B, H = 3, 3, 2, 2
SHORT = choose(60, M, D)
STAGES = GpuBackwardConfig(M, 4, 128, (8, 4, 4), 16)
COLUMNS = GpuBackwardConfig(M, 4, 256, (8, 8), 8, columns=4)
# two features at once
FOLDS = GpuBackwardConfig(2, 3, 256, (8, 4, 4), 16, folds=2)
# both sides of a transform at once
TOGETHER = GpuBackwardConfig(2, 3, 64, (8, 8), 8, blocks_per_sm=1)


class Emulated:
    """The compiled functions of a config: those of the host compiled for the CPU, kernels run block by block."""

    def __init__(self, config: GpuBackwardConfig) -> None:
        self.config, self.kernels = config, {}
        self.directory = tempfile.TemporaryDirectory()
        self.calls: list[str] = []
        self.source, self.parameters = generated(config)
        whole = []
        if config.columns == 1:
            whole = [gpu_backward_calls.gradients(config), *(gpu_backward_calls.backward(config, x) for x in MAPS)]
        functions: dict[str, Callable[..., None]] = {
            name: functools.partial(self.call, name) for name in self.parameters
        }
        path = Path(self.directory.name)
        for host in whole:
            functions[str(host.attrs["global_symbol"])] = compile_calls(host, functions, path)
        self.instance = GpuInstance(config, functions)

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        arrays = [x.numpy() if isinstance(x, torch.Tensor) else x for x in arguments]
        if name.startswith("features"):
            self.features(name, *arrays)
        elif name == "largest":
            # its kernel reduces across threads with shuffles, which cannot run here
            bias, n_q, _, causal, largest = arrays
            largest[:] = bias[:, : n_q if causal else None].max(1)
        else:
            given = dict(zip(self.parameters[name], arrays, strict=True))
            # pairs of channels that are there at once, and head or batch elsewhere
            first = next((x for key, x in given.items() if key in ("transformed", "product", "grads", "channels")), ())
            given["count"] = len(first)
            for kernel, grid, threads in self.launches(name, given):
                self.launch(kernel, grid, threads, given)

    def launches(self, name: str, given: dict[str, Any]) -> list[tuple[str, tuple[int, int, int], int]]:
        """Kernel, grid and threads of a block."""
        config, per_stage = self.config, self.config.threads
        groups, _ = column_groups(config)
        batch, heads, m, n1 = B, H, config.num_features, config.columns
        tiles = config.length // TILE
        count = given["count"]
        per_column = min(128, config.row)
        of_columns = config.row // per_column
        by_columns = {
            "spectrum_columns": ((of_columns, 2, heads), per_column),
            "spectrum_rows": ((n1, 2, heads), per_stage),
            "columns": ((of_columns, 2, count), per_column),
            "rows": ((m * n1, 2, count), per_stage),
            "back_columns": ((of_columns, 2, count), per_column),
            "columns_backward": ((of_columns, 2, count), per_column),
            "rows_backward": ((n1, 2, m), per_stage),
            "dots_backward": ((of_columns, m, 1), per_column),
        }
        if name in by_columns:
            grid, threads = by_columns[name]
            return [(f"{name}_kernel", grid, threads)]
        grids: dict[str, tuple[int, int, int]] = {
            "spectrum": (config.residues, per_stage, 1),
            "denominators": (config.residues * config.num_features, per_stage, batch),
            "backward": (config.residues * config.num_features, per_stage, batch),
            "value_sums": (config.residues * config.value_pairs, per_stage, batch),
            "weight_sums": (config.residues, per_stage, 1),
            "channels": (tiles, THREADS, batch),
            "grad_value": (tiles, THREADS, batch),
            "correlation_sums": (-(-4 * config.length // THREADS), THREADS, 1),
            "grad_bias": (-(-2 * config.length // THREADS), THREADS, 1),
        }
        if name in grids:
            blocks, threads, outer = grids[name]
            return [(f"{name}_kernel", (blocks, heads, outer), threads)]
        return [
            (f"{name}_kernel{suffix}", (-(-given[x].shape[2] // TILE), heads, batch), groups * TILE)
            for suffix, x in (("", "query"), ("_1", "key"))
        ]

    def launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: dict[str, Any]) -> None:
        if kernel not in self.kernels:
            self.kernels[kernel] = compile_kernel(self.source, Path(self.directory.name), kernel)
        sizes: dict[str, Any] = {"batch": B, "heads": H}
        for name, x in arguments.items():
            if isinstance(x, np.ndarray):
                sizes |= {f"{name}_stride{axis}": x.strides[axis] // 4 for axis in range(x.ndim - 1)}
            for size, names in (("n_query", ("query", "grad_out")), ("n_key", ("key", "value"))):
                if name in names:
                    sizes[size] = x.shape[-2]
        if kernel == "grad_value_kernel":
            sizes["n_key"] = arguments["out"].shape[2]
        self.kernels[kernel](grid, threads, sizes | arguments)

    def features(self, name: str, query: Any, key: Any, projection: Any, phi_q: Any, phi_k: Any) -> None:
        # those of the forward pass, and tested with it
        feature_map = {"features_prf": reference.prf, "features_nprf": reference.nprf}[name]
        for x, phi in ((query, phi_q), (key, phi_k)):
            phi[:] = 0.0
            phi[..., : x.shape[2]] = feature_map(x, projection).swapaxes(2, 3)


def generated(config: GpuBackwardConfig) -> tuple[str, dict[str, list[str]]]:
    """The CUDA source of the kernels of a config, and the names of each function's parameters."""
    import tvm
    from tvm.target import Target

    from rpe_tvm.build.device_code import CALLS_ATTRIBUTE, generate
    from rpe_tvm.build.lower_gpu_backward import lower

    target = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024}, host={"kind": "llvm"})
    functions = [(at.name_hint, f) for at, f in lower(config).mod.functions_items()]
    kept = {name: f for name, f in functions if not name.startswith("features") and CALLS_ATTRIBUTE not in f.attrs}
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        source = generate(tvm.IRModule(kept), target, config.name).source
    return source, {name: [x.name for x in f.params] for name, f in functions if CALLS_ATTRIBUTE not in f.attrs}


@functools.cache
def emulated(config: GpuBackwardConfig) -> Emulated:
    with pytest.MonkeyPatch.context() as patched:
        # spectra of values as long rows keep them, and for SHORT as short ones do
        patched.setattr(schedules, "KEPT_IN_SHARED", 65 if config == SHORT else 0)
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


def _inputs(n_q: int, n_k: int, d: int, m: int = M) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n_q)
    query, grad_out = torch.randn(2, B, n_q, H, d, generator=g).transpose(2, 3).unbind()
    key, value = torch.randn(2, B, H, n_k, d + 1, generator=g)[..., 1:].unbind()
    bias, projection = torch.randn(H, n_q + n_k - 1, generator=g), torch.randn(m, d, generator=g)
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
    (250, 200, COLUMNS, "nprf", False),
    (255, 201, FOLDS, "nprf", False),
    (64, 61, TOGETHER, "nprf", False),
]


@pytest.mark.parametrize(("n_q", "n_k", "config", "feature_map", "is_causal"), CASES)
@pytest.mark.usefixtures("fresh_memory_holds_nan")
def test_numbers(
    monkeypatch: pytest.MonkeyPatch, n_q: int, n_k: int, config: GpuBackwardConfig, feature_map: str, is_causal: bool
) -> None:
    made = _serve(monkeypatch, config)
    monkeypatch.setattr(gpu_buffers, "pairs_at_once", lambda config: 2)  # of 3
    inputs = _inputs(n_q, n_k, config.head_dim, config.num_features)
    grad_out, *tensors = inputs.values()
    arrays = [x.double().numpy() for x in inputs.values()]
    out = reference.attention(*arrays[1:], feature_map=feature_map, is_causal=is_causal)[2]
    found = operators.attention_backward_on_gpu(
        grad_out, *tensors, torch.tensor(out).float(), feature_map, is_causal, True
    )
    want = reference.attention_gradients(*arrays, feature_map, is_causal)
    # causal: rows of few terms carry the rounding errors of the longest sums, see docs/operators.md
    _check(found, want, 1e-3 if is_causal else 2e-6)
    other = {"prf": "_nprf", "nprf": "_prf"}[feature_map]
    kernels = {name for name in function_names(config) if not name.startswith("backward_") and name != "gradients"}
    assert set(made.calls) == {name for name in kernels if not name.endswith(other)}


@pytest.mark.usefixtures("fresh_memory_holds_nan")
def test_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is the value itself: no other gradient."""
    _serve(monkeypatch, SHORT)
    grad_out, query, key, value, bias, projection = _inputs(1, 1, D).values()
    found = operators.attention_backward_on_gpu(
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
    found = operators.attention_backward_on_gpu(*half, bias, projection, out.bfloat16(), "nprf", False, True)
    assert [x.dtype for x in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    _check(found, reference.attention_gradients(*arrays, "nprf"), 4 * torch.finfo(torch.bfloat16).eps)
