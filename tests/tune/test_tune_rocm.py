"""Tuning for AMD GPUs without one: candidates, their compilation, races on a fake loader, refusals."""

import json
import types

import pytest

torch = pytest.importorskip("torch")

from rpe_tvm import bench_cuda_machine, targets  # noqa: E402
from rpe_tvm.build import lld  # noqa: E402
from rpe_tvm.errors import CompilerNotFoundError, TuningError  # noqa: E402
from rpe_tvm.plan import gpu_choice  # noqa: E402
from rpe_tvm.plan.rocm_limits import MAX_THREADS  # noqa: E402
from rpe_tvm.tune import gpu_amd, gpu_session  # noqa: E402
from rpe_tvm.tune.gpu_candidates import Size, candidates, label  # noqa: E402
from rpe_tvm.tune.gpu_cli import AMD, main, parser, sizes  # noqa: E402
from rpe_tvm.tune.gpu_work import Work  # noqa: E402


@pytest.mark.parametrize("n", [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
def test_candidates_are_the_rule_first_and_keep_the_limits(n):
    found = candidates(Size("float32", n, 32, 64), "rocm-gfx1100")
    assert found[0] == gpu_choice.rule(n, 32, 64, target_id="rocm-gfx1100")
    assert len({label(config) for config in found}) == len(set(found)) == len(found) > 1
    assert all(config.length == n and config.threads <= MAX_THREADS for config in found)


def test_options(capsys):
    assert {size.n for size in sizes(parser(AMD).parse_args([]), AMD)} == set(AMD.lengths["float32"])
    for wrong, message in (
        (["--target", "sm_90"], "expected gfx942, or one as gfx1100, got sm_90"),
        (["--target", "gfx900"], "Unknown architecture of AMD GPUs 'gfx900'"),
        (["--dtypes", "bfloat16"], "expected dtypes of float32, got bfloat16"),
        (["--lengths", "65536", "--target", "gfx1201"], "at most 32768 positions on rocm-gfx1201"),
    ):
        with pytest.raises(SystemExit):
            main(wrong, AMD)
        assert message in capsys.readouterr().err


def test_no_race_without_an_amd_gpu(tmp_path, capsys):
    assert main(["--race-only", "--work-dir", str(tmp_path)], AMD) == 1
    assert "Cannot race: it takes an AMD GPU that PyTorch can use" in capsys.readouterr().err


def test_another_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_amd, "obstacle", lambda: None)
    monkeypatch.setattr(gpu_amd, "architecture", lambda: "gfx90a")
    monkeypatch.setattr(bench_cuda_machine, "environment", lambda: {"name": "AMD Instinct MI250X"})
    size = Size("float32", 64, 2, 3)
    run = gpu_session.Run(targets.preset("gfx942"), (size,), 1.0, 1, Work(tmp_path), tmp_path)
    with pytest.raises(TuningError, match="expected gfx942, got AMD Instinct MI250X, gfx90a.*--target gfx90a"):
        gpu_session.race(run, resume=False)


@pytest.mark.compile
def test_candidates_are_compiled(tmp_path, cache_dir, capsys, monkeypatch):
    try:
        lld.find()
    except CompilerNotFoundError as error:
        pytest.skip(str(error))
    options = ["--build-only", "--lengths", "64", "--features", "2", "--head-dim", "3", "--target", "gfx90a"]
    assert main([*options, "--workers", "1", "--work-dir", str(tmp_path)], AMD) == 0
    found = candidates(Size("float32", 64, 2, 3), "rocm-gfx90a")
    assert f"{len(found)}/{len(found)}" in capsys.readouterr().out
    for config in found:
        artefact = Work(tmp_path).artefact(config, "rocm-gfx90a")
        assert json.loads((artefact / "manifest.json").read_text())["config"] == config.to_json() | {
            "radices": list(config.radices)
        }
        assert gpu_amd.is_amd(artefact) and (artefact / "kernels.hsaco").exists()
    assert not (tmp_path / "candidates" / "tvm_runtime").exists()  # HIP alone runs them

    loaded = []
    monkeypatch.setattr(gpu_amd, "load_hip", lambda *arguments: loaded.append(arguments[:2]))
    properties = types.SimpleNamespace(gcnArchName="gfx90a:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpu_amd.load(artefact)
    assert loaded == [(artefact, "gfx90a")]
