"""GPU libraries at load: what is refused and why, and the whole way up to a launch. No GPU is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpe_tvm import targets
from rpe_tvm.build import compile as build
from rpe_tvm.build import nvcc
from rpe_tvm.errors import ArtefactError, CompilerNotFoundError, GpuNotFoundError
from rpe_tvm.runtime import gpu, load, load_gpu, tvm_runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fake_gpu
import toy_gpu

loading = sys.modules["rpe_tvm.runtime.load"]  # the package's attribute of this name is the function
Run = Callable[..., subprocess.CompletedProcess[str]]
H100 = gpu.Gpu("Fake H100", "sm_90", 227 << 10)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts as ``python -m rpe_tvm compile --target sm_90`` writes them, of toy functions."""
    try:
        nvcc.find()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    top = tmp_path_factory.mktemp("artefacts")
    config, target = toy_gpu.CONFIG, targets.preset("sm_90")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        built = build.compile_module(toy_gpu.operator(), config.name, config.to_json(), target)
        build.cuda.pack_runtime(top)
    assert "Apache License" in (top / tvm_runtime.PACKED / "LICENSE").read_text()
    build.copy_artefact(built, top / config.name / target.id)
    return top


@pytest.fixture
def directory(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "artefacts"))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "gpus", lambda: (H100,))


def _edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    (file,) = directory.glob("*/*/manifest.json")
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def _reason(directory: Path, index: int = 0) -> str:
    with pytest.raises(ArtefactError) as caught:
        load_gpu(directory, index)
    (reason,) = caught.value.reasons
    return reason


@pytest.mark.parametrize(
    ("found", "index", "reason"),
    [
        (("sm_75", 64), 0, r"compiled for sm_80, sm_90 and later, GPU 0 \(Other\) is sm_75"),
        (("sm_90", 0), 0, r"needs 256 bytes of shared memory for each block, GPU 0 \(Other\) has 0"),
        (("sm_90", 227), 1, "this process has no GPU 1: it has 1"),
    ],
)
def test_gpus_that_cannot_run_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[str, int], index: int, reason: str
) -> None:
    arch, kib = found
    monkeypatch.setattr(loading, "gpus", lambda: (gpu.Gpu("Other", arch, kib << 10),))
    with pytest.raises(ArtefactError, match=reason):
        load_gpu(directory, index)


@pytest.mark.parametrize(
    ("arch", "machine_code", "ptx", "fine"),
    [
        ("sm_80", ["sm_80", "sm_90"], "sm_90", True),
        ("sm_86", ["sm_80", "sm_90"], "sm_90", True),  # runs what is compiled for an earlier minor version
        ("sm_89", ["sm_90"], "sm_90", False),
        ("sm_120", ["sm_80", "sm_90"], "sm_90", True),  # by the PTX
        ("sm_80", ["sm_86"], "sm_86", False),
    ],
)
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, arch: str, machine_code: list[str], ptx: str, fine: bool
) -> None:
    monkeypatch.setattr(loading, "gpus", lambda: (gpu.Gpu("Other", arch, 1 << 20),))
    device = {"architectures": machine_code, "ptx": ptx, "shared_bytes": 1}
    if fine:
        loading._fit_of_gpu({"arch": "sm_90"}, device, 0)
    else:
        with pytest.raises(loading._Unfit, match=f"Other.* is {arch}"):
            loading._fit_of_gpu({"arch": "sm_90"}, device, 0)


def test_without_a_gpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise GpuNotFoundError("No NVIDIA GPU: the driver lists none.")

    monkeypatch.setattr(loading, "gpus", none)
    assert _reason(directory).endswith("compiled for GPUs (sm_80, sm_90). No NVIDIA GPU: the driver lists none.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m["device"].pop("ptx"), "manifest.json is incomplete: KeyError('ptx')"),
        (lambda m: m.pop("device"), "manifest.json is incomplete: KeyError('device')"),
        (lambda m: m["device"].update(shared_bytes="many"), "manifest.json is incomplete: ValueError"),
        (lambda m: m["functions"].remove("spectrum"), "no function spectrum"),
        (lambda m: m["config"].update(radices=[3]), "has no usable config"),
        (lambda m: m["target"].update(kind="metal"), "operator 'attention' for metal, this rpe_tvm 0.1.0 knows"),
        (lambda m: m["library"].update(sha256="0"), "lib.so was altered or truncated"),
    ],
)
def test_damage_is_refused(directory: Path, h100: None, change: Callable[[dict[str, Any]], Any], reason: str) -> None:
    _edit(directory, change)
    assert reason in _reason(directory)


def test_operators_for_the_cpu_and_for_gpus_lie_side_by_side(directory: Path, artefacts: Path) -> None:
    with pytest.raises(ArtefactError, match="No compiled operator 'attention' under .*only others are there"):
        load(directory)
    with pytest.raises(ArtefactError, match="No compiled operator 'attention' for cuda under"):
        load_gpu(artefacts)
    shutil.copytree(artefacts, directory, dirs_exist_ok=True)
    assert load(directory).lengths == (64, 96)


def test_where_the_runtime_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tvm_runtime.VARIABLE, raising=False)
    version = tvm_runtime.metadata.version("apache-tvm")
    package = tvm_runtime.installed()
    assert package is not None and tvm_runtime.find(tmp_path, version) == package
    for name in tvm_runtime.LIBRARIES:
        (tmp_path / tvm_runtime.PACKED).mkdir(exist_ok=True)
        (tmp_path / tvm_runtime.PACKED / name).touch()
    assert tvm_runtime.find(tmp_path, "0.99.1") == tmp_path / tvm_runtime.PACKED  # made by another version
    monkeypatch.setenv(tvm_runtime.VARIABLE, str(tmp_path))
    assert tvm_runtime.find(tmp_path, version) == package  # a second copy would end a process that imports TVM later
    monkeypatch.setattr(tvm_runtime, "installed", lambda: None)
    with pytest.raises(ArtefactError, match=rf"RPE_TVM_RUNTIME={tmp_path} .*: no libtvm_runtime.so and no libtvm_run"):
        tvm_runtime.find(tmp_path, version)
    monkeypatch.setenv(tvm_runtime.VARIABLE, str(tmp_path / tvm_runtime.PACKED))
    assert tvm_runtime.find(tmp_path / "empty", version) == tmp_path / tvm_runtime.PACKED
    monkeypatch.delenv(tvm_runtime.VARIABLE)
    assert tvm_runtime.find(tmp_path, version) == tmp_path / tvm_runtime.PACKED
    with pytest.raises(ArtefactError, match="Compile with --out") as caught:
        tvm_runtime.find(tmp_path / "empty", version)
    assert [reason.split(":")[0].split(" (")[0] for reason in caught.value.reasons] == [
        "in the package apache-tvm",
        "beside the artefacts",
    ]


@pytest.mark.parametrize(
    ("missing", "hint"),
    [("libcudart.so.13", "torch that is built for CUDA 13 first"), ("libcuda.so.1", "Install NVIDIA's driver")],
)
def test_libraries_that_the_runtime_lacks(
    directory: Path, h100: None, monkeypatch: pytest.MonkeyPatch, missing: str, hint: str
) -> None:
    def fail(path: str) -> Any:
        raise OSError(f"{missing}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(tvm_runtime.ctypes, "CDLL", fail)
    assert hint in _reason(directory)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVER", "no-such-library.so")
    gpu.gpus.cache_clear()
    with pytest.raises(GpuNotFoundError, match="driver's no-such-library.so cannot be loaded"):
        gpu.gpus()


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ("121:101376", "(Gpu(name='Fake GPU', arch='sm_121', shared_bytes=101376),) cuda-sm_121"),
        ("broken", "No NVIDIA GPU: the driver's cuInit failed with CUDA error 100."),
    ],
)
def test_what_the_driver_says(tmp_path: Path, run_python: Run, fake: str, said: str) -> None:
    # in a process of its own: a library that is loaded stays
    directory = fake_gpu.write_libraries(tmp_path, _package())
    code = (
        "from rpe_tvm import targets\nfrom rpe_tvm.errors import GpuNotFoundError\nfrom rpe_tvm.runtime import gpu\n"
        "try: print(gpu.gpus(), targets.preset('cuda').id)\nexcept GpuNotFoundError as error: print(error)"
    )
    assert run_python(code, LD_LIBRARY_PATH=str(directory), FAKE_GPU=fake).stdout == f"{said}\n"


def test_loads_without_tvm_up_to_the_launch(directory: Path, tmp_path: Path, run_python: Run) -> None:
    """The packed runtime, on libraries in the place of NVIDIA's; TVM cannot be imported."""
    fake = fake_gpu.write_libraries(tmp_path / "fake", _package())
    code = """
import sys
from importlib import metadata
inner = metadata.version
def version(name):
    if name == "apache-tvm": raise metadata.PackageNotFoundError(name)
    return inner(name)
metadata.version = version
sys.modules["tvm"] = None
import numpy as np
from rpe_tvm.runtime import load_gpu
instance = load_gpu(sys.argv[1])
print(instance.config.name, len(instance.functions))
try:
    instance.functions["spectrum"](np.zeros((2, 64), "float32"), np.zeros((2, 64), "float32"))
except ValueError as error:
    print(str(error).splitlines()[-1])
print([line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime_cuda" in line][0])
"""
    variables = {"LD_LIBRARY_PATH": str(fake), "FAKE_GPU": "90:232448", tvm_runtime.VARIABLE: ""}
    config, message, library = run_python(code, str(directory), **variables).stdout.splitlines()
    assert config == "attention-m3-d8-n64-float32 8"
    assert message.strip() == "expected cuda"
    assert library == str(directory / tvm_runtime.PACKED / "libtvm_runtime_cuda.so")


def _package() -> Path:
    package = tvm_runtime.installed()
    assert package is not None
    return package
