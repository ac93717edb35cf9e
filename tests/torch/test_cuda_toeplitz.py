"""Toeplitz products on GPUs apart from a GPU: torch calls the generated CUDA source, run on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rpe_tvm import build, reference, targets
from rpe_tvm.errors import BuildError, ShapeError
from rpe_tvm.plan import gpu_toeplitz
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.runtime.gpu_operator import function_names
from rpe_tvm.torch import hip, toeplitz, toeplitz_matmul

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_functions_on_cpu import functions_on_cpu  # noqa: E402

pytestmark = pytest.mark.compile

B, H = 2, 3
CONFIGS = {
    # two groups of pairs whose correlations are added up, of which the last one is not full
    "even": GpuToeplitzConfig(1, 10, 32, (8, 4), 4),
    "odd": GpuToeplitzConfig(1, 3, 16, (4, 4), 4),
    # two groups of pairs in tiles of columns
    "columns": GpuToeplitzConfig(1, 19, 128, (4, 4), 4, columns=8),
}


@pytest.fixture(scope="module", params=CONFIGS)
def instance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GpuInstance:
    from rpe_tvm.build.lower_gpu_toeplitz import lower

    config = CONFIGS[request.param]
    functions = functions_on_cpu(lower(config).mod, tmp_path_factory.mktemp("functions"))
    assert sorted(functions) == sorted(function_names(config))
    return GpuInstance(config, functions)


@pytest.fixture
def config(instance: GpuInstance, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuToeplitzConfig]:
    config = instance.config
    assert isinstance(config, GpuToeplitzConfig)
    asked: list[Any] = []
    monkeypatch.setattr(toeplitz, "get_gpu_toeplitz", lambda *call: asked.append(call) or instance)
    # two heads at once
    monkeypatch.setattr(gpu_toeplitz, "_ARRAY_FLOATS", 2 * int(np.prod(gpu_toeplitz.between(config, 1))))
    # Fresh memory holds NaN.
    torch.use_deterministic_algorithms(True)
    yield config
    torch.use_deterministic_algorithms(False)
    assert all(call[0] == -1 and call[1] <= config.length and call[2] == config.head_dim for call in asked)


def _rows(config: GpuToeplitzConfig, n: int, before: int = 2) -> torch.Tensor:
    """Channels with any strides but the last."""
    g = torch.Generator().manual_seed(n)
    return torch.randn(B, n, H, config.head_dim + before, generator=g)[..., before:].transpose(1, 2)


def _error(found: torch.Tensor, expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("which", ["full", "less", "more"])
def test_numbers(config: GpuToeplitzConfig, which: str) -> None:
    length = config.length
    n, n_out = {"full": (length, length), "less": (length - 3, 5), "more": (7, length - 1)}[which]
    weights, x = torch.randn(H, n_out + n - 1, generator=torch.Generator().manual_seed(0)), _rows(config, n)
    out = toeplitz._matmul_cuda(weights, x, n_out)
    assert _error(out, reference.toeplitz_dense(weights.numpy(), x.numpy(), n_out)) < 1e-6
    assert n != n_out or out.transpose(1, 2).is_contiguous()  # as x

    grad = _rows(config, n_out)
    matrix = np.einsum("bhid,bhjd->hij", grad.double(), x.double())
    expected = [[np.trace(of_head, t) for t in range(1 - n_out, n)] for of_head in matrix]
    assert _error(toeplitz._weight_grad_cuda(grad, x), np.array(expected)) < 2e-6


def test_pairs_that_are_not_aligned(config: GpuToeplitzConfig) -> None:
    weights, x = torch.randn(H, 2 * 9 - 1, generator=torch.Generator().manual_seed(0)), _rows(config, 9, before=1)
    assert torch.equal(toeplitz._matmul_cuda(weights, x, 9), toeplitz._matmul_cuda(weights, x.contiguous(), 9))
    assert torch.equal(toeplitz._weight_grad_cuda(x, x), toeplitz._weight_grad_cuda(x.contiguous(), x.contiguous()))


def test_one_position(config: GpuToeplitzConfig) -> None:
    x, weights = _rows(config, 1), torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(toeplitz._matmul_cuda(weights, x, 1), weights[:, :, None] * x)
    torch.testing.assert_close(toeplitz._weight_grad_cuda(x, x), x.square().sum((0, 2, 3))[:, None])


def test_nan_stays_in_its_head(config: GpuToeplitzConfig) -> None:
    weights, x = torch.randn(H, 2 * 9 - 1, generator=torch.Generator().manual_seed(0)), _rows(config, 9).clone()
    x[1, 2, 5, 2] = torch.nan
    out = toeplitz._matmul_cuda(weights, x, 9)
    assert out[1, 2, :, 2].isnan().all() and out[0].isfinite().all() and out[1, :2].isfinite().all()


def test_nothing_calls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toeplitz, "get_gpu_toeplitz", None)
    x = torch.zeros(B, H, 0, 4)
    assert torch.equal(toeplitz._matmul_cuda(torch.zeros(H, 4), x, 5), torch.zeros(B, H, 5, 4))
    assert torch.equal(toeplitz._weight_grad_cuda(torch.zeros(B, H, 5, 4), x), torch.zeros(H, 4))


def test_kernels_for_gpus_are_registered() -> None:
    for name in ("toeplitz_matmul", "toeplitz_weight_grad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rpe_tvm::{name}", "CUDA")


def test_tensors_on_gpus_pass_the_checks() -> None:
    with FakeTensorMode():
        x = torch.empty(B, H, 10, 4, dtype=torch.bfloat16, device="cuda")
        out = toeplitz_matmul(torch.empty(H, 19, device="cuda"), x)
        assert (out.shape, out.device, out.dtype) == (x.shape, x.device, torch.bfloat16)
        grad = torch.ops.rpe_tvm.toeplitz_weight_grad(out.float(), x.float())
        assert (grad.shape, grad.device) == ((H, 19), x.device)
        with pytest.raises(ValueError, match=r"device of weights: expected cuda:0.*got cpu"):
            toeplitz_matmul(torch.empty(H, 19, device="cpu"), x)


def test_too_long_for_a_gpu() -> None:
    n = gpu_toeplitz.LONGEST + 1
    with pytest.raises(ShapeError, match=rf"at most {n - 1} inputs and outputs on a GPU, got {n}.*\.cpu\(\)"):
        toeplitz._matmul_cuda(torch.empty(1, n), torch.empty(1, 1, 1, 2), n)


def test_amd_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"toeplitz-d4-n64-float32 is for NVIDIA GPUs, and the target rocm-gfx942"):
        build.compile_operator(gpu_toeplitz.choose(64, 4), targets.preset("gfx942"))
    monkeypatch.setattr(hip, "is_hip", lambda: True)
    with FakeTensorMode(), pytest.raises(ValueError, match=r"device of x: .* on cuda:0, an AMD GPU.*\.cpu\(\)"):
        toeplitz_matmul(torch.empty(H, 19, device="cuda"), torch.empty(B, H, 10, 4, device="cuda"))
