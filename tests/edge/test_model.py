"""A whole model, exported by the script, computes PyTorch's output in C++, here and on an emulated ARM machine."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rpe_tvm import targets
from rpe_tvm.edge import contents, export_model
from rpe_tvm.errors import BuildError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import export_shapes  # noqa: E402
import train_shapes  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bundles import compile_program, emulated, needs_qemu, page_commands, run, sign, unpack  # noqa: E402

pytestmark = pytest.mark.compile

SIZES = train_shapes.Sizes(grid=6, batch=1, layers=2, width=12, heads=2, features=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as train_shapes.py writes it, of a model that was not trained."""
    model = train_shapes.VisionModel("nprf+rpe-1d", SIZES, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "relative" in name else 0.1))
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    settings = {**vars(SIZES), "contestant": "nprf+rpe-1d", "seed": 0}
    torch.save({"model": model.state_dict(), "settings": settings}, path)
    return path


@pytest.fixture(scope="module")
def model(cache: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the exported model with its program, for this machine."""
    out = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        options = ["--checkpoint", str(checkpoint), "--target", "haswell", "--out", str(out / "model.tar.gz")]
        patch.setattr(sys, "argv", ["export_shapes.py", *options])
        assert export_shapes.main() == 0
    directory = unpack(out / "model.tar.gz", out / "unpacked")
    compile_program(directory, ["src", "examples"], directory / "run_model")
    return directory


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model, tmp_path / "damaged"))


def test_the_check_of_the_host(model: Path) -> None:
    out = run(model / "run_model", model).stdout
    assert out.startswith("x86_64-haswell\n") and ", ok\n" in out


@pytest.mark.skipif(
    shutil.which("cmake") is None, reason="no cmake: as root, bash scripts/debian_packages.sh installs it"
)
def test_the_commands_for_a_board(model: Path, tmp_path: Path) -> None:
    shutil.copy(model.parents[1] / "model.tar.gz", tmp_path)
    out = run("bash", "-euc", f"cd {tmp_path}\n{page_commands('./build/run_model .')}").stdout
    assert "x86_64-haswell\n" in out and ", ok\n" in out


def test_equals_pytorch(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    torch_model, sizes = export_shapes.load(checkpoint)
    pixels, _ = train_shapes.images(1, sizes, torch.Generator().manual_seed(1))
    (tmp_path / "in").write_bytes(pixels.numpy().tobytes())
    run(model / "run_model", model, tmp_path / "in", tmp_path / "out")
    with torch.no_grad():
        expected = torch_model(pixels).numpy()
    got = np.fromfile(tmp_path / "out", np.float32).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_intermediate_results_share_memory_and_none_is_overwritten_before_it_is_read(model: Path) -> None:
    lines = [line.split() for line in (model / "model.txt").read_text().splitlines()]
    spans: dict[str, range] = {}  # bytes / 4 of the memory that tensors share
    for _, number, place, start, dtype, _, *shape in (line for line in lines if line[0] == "tensor"):
        if place == "scratch":
            size = math.prod(map(int, shape)) * (2 if dtype == "int64" else 1)
            spans[f"t{number}"] = range(int(start) // 4, int(start) // 4 + size)
    ((_, arena),) = (line for line in lines if line[0] == "arena")
    owner = [""] * (int(arena) // 4)

    def write(tensor: str) -> None:
        for at in spans[tensor]:
            owner[at] = tensor

    def read(tensor: str) -> None:
        assert {owner[at] for at in spans[tensor]} == {tensor}

    kept = [f"t{number}" for kind, number, *_ in lines if kind == "input"]
    for tensor in kept:
        write(tensor)
    for _ in range(2):  # inputs are still there for another run
        for _, _, *given, made in (line for line in lines if line[0] == "call"):
            for tensor in given:
                if tensor in spans:
                    read(tensor)
            write(made)
            assert all(owner[at] == tensor for tensor in given if tensor in spans for at in spans[tensor])
        for tensor in (*kept, *(f"t{number}" for kind, number, *_ in lines if kind == "output")):
            read(tensor)
    assert int(arena) < 4 * sum(map(len, spans.values())) / 3


@needs_qemu
def test_equals_pytorch_on_arm(cache: None, checkpoint: Path, tmp_path: Path) -> None:
    torch_model, sizes = export_shapes.load(checkpoint)
    pixels, _ = train_shapes.images(1, sizes, torch.Generator().manual_seed(2))
    with torch.no_grad():
        program = torch.export.export(torch_model, (pixels,))
    archive = export_model(program, targets.preset("cortex-a72"), tmp_path / "model.tar.gz", "none")
    directory = unpack(archive, tmp_path / "unpacked")
    compile_program(directory, ["src", "examples"], directory / "run_model", "aarch64-linux-gnu-")
    out = emulated(directory / "run_model", directory).stdout  # compares with example.bin, PyTorch's output
    assert out.startswith("aarch64-cortex-a72\n") and ", ok\n" in out


def test_a_wrong_output_is_found(damaged: Path) -> None:
    example = np.fromfile(damaged / "example.bin", np.float32)
    example[-1] += 0.1
    example.tofile(damaged / "example.bin")
    done = run(damaged / "run_model", damaged, check=False)
    assert done.returncode == 1 and "WRONG" in done.stdout


def test_an_index_out_of_range_gives_nan(model: Path, tmp_path: Path) -> None:
    pixels = np.zeros((1, SIZES.grid, SIZES.grid), np.int64)
    pixels[0, 2, 2] = 1 << 20
    pixels.tofile(tmp_path / "in")
    run(model / "run_model", model, tmp_path / "in", tmp_path / "out")
    assert np.isnan(np.fromfile(tmp_path / "out", np.float32)).any()


def _cut(path: Path, size: int) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:size])


def _edit(directory: Path, old: str, new: str) -> None:
    path = directory / "model.txt"
    body, _, _ = path.read_text().rpartition("end ")
    assert old in body
    path.write_text(contents.sign(body.replace(old, new, 1)))
    sign(directory)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: _cut(d / "lib.so", 5000), "lib.so was altered or truncated: expected"),
        (lambda d: _cut(d / "weights.bin", 100), "weights.bin was altered or truncated"),
        (lambda d: (d / "weights.bin").write_bytes(bytes((d / "weights.bin").stat().st_size)), "SHA-256"),
        (lambda d: _cut(d / "model.txt", 500), "model.txt was truncated"),
        (lambda d: (d / "model.txt").unlink(), "Expected the directory of an unpacked rpe_tvm-model"),
        (lambda d: _edit(d, ",avx2,", ",avx9000,"), "this CPU lacks avx9000"),
        (lambda d: _edit(d, "\narena ", "\narena 64\nno "), "outside of its memory"),
        (lambda d: _edit(d, "call take t", "call take t99"), "cannot read: call take"),
        (lambda d: _edit(d, "call take", "call taken"), "no function __tvm_ffi_taken"),
    ],
)
def test_refusals(damaged: Path, damage, said: str) -> None:
    damage(damaged)
    done = run(damaged / "run_model", damaged, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr


def test_too_few_inputs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(7))
    done = run(model / "run_model", model, tmp_path / "in", tmp_path / "out", check=False)
    assert done.returncode == 1 and "too short" in done.stderr


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    flexible = torch.export.export(layer, (torch.ones(4, 2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    with pytest.raises(BuildError, match="fixed size"):
        export_model(flexible, targets.preset("haswell"), tmp_path / "model.tar.gz")
    double = torch.export.export(nn.ReLU(), (torch.ones(4, 2, dtype=torch.float64),))
    with pytest.raises(BuildError, match="tensor of float64"):
        export_model(double, targets.preset("haswell"), tmp_path / "model.tar.gz")
