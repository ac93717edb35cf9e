"""Attention through the loader for AMD GPUs, on a HIP that runs the kernels on the CPU, against the float64 reference.

The kernels are those of the code object, lowered for AMD and written as CUDA source; a launch runs them with one fibre
for each GPU thread, in the order of arguments that the code object describes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_hip import FakeHip, write_library  # noqa: E402
from rocm_on_cpu import Kernels, cuda_source  # noqa: E402

from rpe_tvm import reference, targets  # noqa: E402
from rpe_tvm.build import compile as build  # noqa: E402
from rpe_tvm.build import lld  # noqa: E402
from rpe_tvm.errors import (  # noqa: E402
    ArtefactError,
    CompilerNotFoundError,
    DTypeError,
    GpuGradientError,
    GpuNotFoundError,
    HipError,
    ShapeError,
)
from rpe_tvm.plan import gpu_buffers, rocm  # noqa: E402
from rpe_tvm.plan.gpu import GpuAttentionConfig  # noqa: E402
from rpe_tvm.runtime import GpuInstance, load_hip  # noqa: E402
from rpe_tvm.torch import cuda, cuda_backward, dispatch, hip  # noqa: E402

pytestmark = pytest.mark.compile

try:
    lld.find()
except CompilerNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

STREAM = 0x5EED


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeHip:
    return FakeHip(write_library(tmp_path_factory.mktemp("hip")))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GpuAttentionConfig]:
    """An artefact of the rule's config for 100 positions."""
    config = rocm.choose(100, 3, 5, "rocm-gfx942")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build.compile_operator(config, targets.preset("gfx942")), config


@pytest.fixture(scope="module")
def kernels(short: tuple[Path, GpuAttentionConfig], tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Its kernels, for the CPU."""
    artefact, config = short
    image = (artefact / "kernels.hsaco").read_bytes()
    return Kernels(cuda_source(config, "gfx942"), image, tmp_path_factory.mktemp("kernels"))


def inputs(n_q: int, n_k: int, m: int, d: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "query": torch.randn(1, n_q, 2, d).transpose(1, 2),  # any strides but the last
        "key": torch.randn(1, 2, n_k, d),
        "value": torch.randn(1, n_k, 2, d).transpose(1, 2),
        "rpe_bias": torch.randn(2, n_q + n_k - 1),
        "projection": torch.randn(m, d),
    }


def check(instance: GpuInstance, given: dict[str, torch.Tensor], feature_map: str, is_causal: bool) -> None:
    out = torch.full_like(given["query"], float("nan"))
    cuda.attention(instance, *given.values(), out, feature_map=feature_map, is_causal=is_causal)
    *_, expected = reference.attention(
        *(x.numpy() for x in given.values()), feature_map=feature_map, is_causal=is_causal
    )
    error = np.linalg.norm(out.numpy() - expected) / np.linalg.norm(expected)
    # causal: the first rows have few terms, and the FFT's rounding errors are those of the longest sums
    assert error < (2e-4 if is_causal else 2e-6), error


def test_numbers(fake: FakeHip, short: tuple[Path, GpuAttentionConfig], kernels: Kernels) -> None:
    artefact, config = short
    kernels.launches.clear()
    fake.on_launch(kernels)
    instance = load_hip(artefact, "gfx942", lambda: STREAM, fake.path)
    check(instance, inputs(99, 70, 3, 5), "nprf", False)
    names = [name for name, *_ in kernels.launches]
    assert names == [
        *("features_nprf_kernel", "features_nprf_kernel_1", "largest_kernel", "spectrum_kernel"),
        *("attention_kernel", "normalise_kernel"),
    ]
    # x is the pair of channels and the parity, y the head, z the batch
    assert kernels.launches[4][1:] == ([6, 2, 1, 32, 1, 1], 0, STREAM)
    assert kernels.launches[5][1] == [4, 2, 1, 256, 1, 1]
    assert fake.get("loads") == 1

    fake.set("device", 1)  # another GPU, with a handle of its own
    check(instance, inputs(1, 1, 3, 5), "prf", True)
    check(instance, inputs(31, 100, 3, 5), "prf", True)
    fake.set("device", 0)
    assert fake.get("loads") == 2


@pytest.mark.parametrize(
    ("config", "arch", "n_q", "n_k", "is_causal"),
    [
        (GpuAttentionConfig(2, 3, 256, (4, 4, 4), 32, folds=4), "gfx1100", 250, 201, True),
        (GpuAttentionConfig(1, 2, 256, (4, 4, 4), 32, columns=4), "gfx90a", 250, 256, False),
    ],
)
def test_numbers_of_folds_and_columns(
    fake: FakeHip,
    cache_dir: Path,
    tmp_path: Path,
    config: GpuAttentionConfig,
    arch: str,
    n_q: int,
    n_k: int,
    is_causal: bool,
) -> None:
    artefact = build.compile_operator(config, targets.preset(arch))
    fake.on_launch(Kernels(cuda_source(config, arch), (artefact / "kernels.hsaco").read_bytes(), tmp_path))
    instance = load_hip(artefact, arch, lambda: STREAM, fake.path)
    check(instance, inputs(n_q, n_k, config.num_features, config.head_dim), "nprf", is_causal)


def test_the_example(
    fake: FakeHip,
    short: tuple[Path, GpuAttentionConfig],
    kernels: Kernels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artefact, config = short
    path = Path(__file__).resolve().parents[2] / "deploy" / "hip" / "attention.py"
    spec = importlib.util.spec_from_file_location("hip_example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["attention.py", str(tmp_path)])
    assert example.main() == 1 and "finds no AMD GPU" in capsys.readouterr().err

    def on_gpu(query, key, value, bias, *, feature_map):
        out = torch.empty_like(query)
        cuda.attention(
            instance, query, key, value, bias, feature_map.projection, out, feature_map="nprf", is_causal=False
        )
        return out

    build.copy_artefact(artefact, tmp_path / config.name / "rocm-gfx942")
    fake.on_launch(kernels)
    instance = load_hip(artefact, "gfx942", lambda: STREAM, fake.path)
    for name, value in (("POSITIONS", 90), ("HEADS", 2), ("FEATURES", 3), ("HEAD_DIM", 5)):
        monkeypatch.setattr(example, name, value)
    monkeypatch.setattr(example, "kernelized_attention", on_gpu)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake MI300X")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    try:
        assert example.main() == 0
    finally:
        dispatch.use_artefacts(None)
    assert "Fake MI300X: relative error" in (said := capsys.readouterr().out) and "(right)" in said


def test_wrong_arguments_never_reach_the_gpu(fake: FakeHip, short: tuple[Path, GpuAttentionConfig]) -> None:
    fake.on_launch(lambda *launched: pytest.fail("launched"))
    artefact, config = short
    features = load_hip(artefact, "gfx942", lambda: 0, fake.path).functions["features_prf"]
    query, key, projection = torch.randn(1, 2, 9, 5), torch.randn(1, 2, 7, 5), torch.randn(3, 5)
    phi_q, phi_k = (torch.empty(gpu_buffers.features(config, 1, 2)) for _ in range(2))
    wrong = (
        (DTypeError, "Invalid query of features_prf: expected float32, got float64", (query.double(), key)),
        (ShapeError, "expected 4 axes, got shape", (query[0], key)),
        (
            ShapeError,
            r"Invalid key .* expected shape \(1, 2, 7, 5\), .* got \(1, 3, 7, 5\)",
            (query, torch.ones(1, 3, 7, 5)),
        ),
        (ShapeError, "Invalid query .* expected a contiguous last axis", (torch.randn(1, 2, 5, 9).mT, key)),
    )
    for kind, message, (first, second) in wrong:
        with pytest.raises(kind, match=message):
            features(first, second, projection, phi_q, phi_k)
    with pytest.raises(ShapeError, match="Invalid projection .* contiguous.*Use .contiguous()"):
        features(query, key, torch.randn(5, 3).mT, phi_q, phi_k)
    with pytest.raises(TypeError, match=r"expected 5 arguments \(query, key, .*got 2"):
        features(query, key)
    features(query[:0], key[:0], projection, phi_q[:0], phi_k[:0])  # nothing to launch


def test_what_hip_refuses(fake: FakeHip, short: tuple[Path, GpuAttentionConfig], tmp_path: Path) -> None:
    fake.on_launch(lambda *launched: None)
    artefact, config = short
    largest = load_hip(artefact, "gfx942", lambda: 0, fake.path).functions["largest"]
    fake.set("fail_at_load", 209)
    with pytest.raises(
        HipError, match="hipModuleLoadData failed: no kernel image is available .209.*--target of this GPU"
    ):
        largest(torch.zeros(2, 3), 2, 2, 0, torch.zeros(2))
    fake.set("fail_at_load", 0)
    largest(torch.zeros(2, 3), 2, 2, 0, torch.zeros(2))
    with pytest.raises(GpuNotFoundError, match="No AMD GPU: HIP's libamdhip64.so cannot be loaded.*Install ROCm"):
        load_hip(artefact, "gfx942", lambda: 0, str(tmp_path / "missing.so"))


def test_damaged_artefacts_are_refused(fake: FakeHip, short: tuple[Path, GpuAttentionConfig], tmp_path: Path) -> None:
    copy = build.copy_artefact(short[0], tmp_path / "copy")
    with (copy / "kernels.hsaco").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtefactError, match="kernels.hsaco was altered or truncated"):
        load_hip(copy, "gfx942", lambda: 0, fake.path)
    with pytest.raises(ArtefactError, match="No compiled operator 'backward' for|No compiled operator"):
        load_hip(tmp_path / "nothing", "gfx942", lambda: 0, fake.path)


def test_torch_for_rocm_takes_the_code_object(
    short: tuple[Path, GpuAttentionConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact, config = short
    build.copy_artefact(artefact, tmp_path / config.name / "rocm-gfx942")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    )
    loaded = []
    monkeypatch.setattr(dispatch, "load_hip", lambda *arguments: loaded.append(arguments) or "operator")
    dispatch.use_artefacts(tmp_path)
    try:
        assert dispatch.get_gpu_operator(0, 100, 3, 5) == "operator"
    finally:
        dispatch.use_artefacts(None)
    assert loaded == [(tmp_path.resolve() / config.name, "gfx942", hip.stream)]
    assert hip.is_hip()
    with pytest.raises(GpuGradientError, match="no gradients of attention on AMD GPUs yet"):
        cuda_backward.check_length(100)
