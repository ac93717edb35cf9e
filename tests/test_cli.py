"""The command line, in this process: what it prints, and its exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpe_tvm import __version__, bench, cli
from rpe_tvm import build as package
from rpe_tvm.build import cache, manifest, nvcc
from rpe_tvm.build import compile as build
from rpe_tvm.errors import GpuNotFoundError, TuningError
from rpe_tvm.plan import (
    backward,
    gpu_direct_backward,
    gpu_tiles,
    gpu_tiles_backward,
    gpu_toeplitz,
    toeplitz,
    wisdom,
)
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.runtime import gpu as runtime_gpu
from rpe_tvm.runtime import load


@pytest.fixture
def naive_operators(
    cache_dir: Path, naive: tuple[AttentionConfig, Any], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, int, int, int, int]]:
    """Compiles naive kernels instead of the real ones; the list gets what was asked of the plan."""
    config, module = naive
    asked: list[tuple[str, int, int, int, int]] = []

    def choose(target_id: str, n: int, num_features: int, head_dim: int, lanes: int) -> AttentionConfig:
        asked.append((target_id, n, num_features, head_dim, lanes))
        return config

    monkeypatch.setattr(wisdom, "choose", choose)
    lowered = SimpleNamespace(mod=module, schedule={"source": "default"})
    monkeypatch.setattr(build, "_lower", lambda config, target: lowered)
    return asked


def test_info(cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wisdom, "records", lambda *_: ())
    assert cli.main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["rpe_tvm"] == __version__
    assert lines["apache-tvm"] == manifest.versions()["apache-tvm"]
    assert lines["target"].startswith("x86_64-") and lines["target"].endswith("float32 lanes")
    assert lines["cache"] == f"{cache_dir} (0 libraries, 0 B)"
    assert lines["Default"].endswith("python scripts/tune_x86.py")
    assert "not measured" in lines["static"] and "aarch64-cortex-a72 " in lines["aarch64-cortex-a53"]


def test_info_lists_records(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AttentionConfig(32, 64, 4096, "fft", (8, 8), (8, 8))
    monkeypatch.setattr(wisdom, "records", lambda *_: (wisdom.Wisdom(config, 31.5, 40.25),))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "attention-m32-d64-n4096" in out and "31.50 ms (default schedule: 40.25 ms)" in out
    assert "compiler        none: No C++ compiler" in out


def test_info_without_tvm(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys\nfrom importlib import metadata\ninner = metadata.version\n"
        "def version(name):\n"
        "    if name == 'apache-tvm': raise metadata.PackageNotFoundError(name)\n"
        "    return inner(name)\n"
        "metadata.version = version\nsys.modules['tvm'] = None\n"
        "from rpe_tvm import cli\nsys.exit(cli.main(['info']))"
    )
    out = run_python(code).stdout
    assert "apache-tvm      not installed" in out and "Nothing can be compiled here: Compiling needs" in out


def test_compile(naive_operators: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "compile --op attention --features 3 --head-dim 8 --lengths 50,60 --target haswell --out"
    assert cli.main([*command.split(), str(tmp_path / "out")]) == 0
    assert naive_operators == [("x86_64-haswell", 50, 3, 8, 8), ("x86_64-haswell", 60, 3, 8, 8)]
    (line,) = capsys.readouterr().out.splitlines()  # both lengths are of one bucket
    library = tmp_path / "out" / "attention-m3-d8-n64" / "x86_64-haswell" / "lib.so"
    assert line.startswith(f"{library}  ") and "KiB  direct 64x64, default schedule" in line
    x = np.ones((1, 1, 64, 8), np.float32)
    out = load(tmp_path / "out")(x, x, x, np.zeros((1, 127), np.float32), np.ones((3, 8), np.float32))
    np.testing.assert_allclose(out, x, rtol=1e-5)


@pytest.mark.parametrize(("op", "plan"), [("backward", backward), ("toeplitz", toeplitz)])
def test_compile_other_operators(
    op: str, plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def export(config: Any, target: Any, out: Path) -> Path:
        asked.append((config, target.id, out))
        return out

    monkeypatch.setattr(package, "export", export)
    monkeypatch.setattr(
        manifest, "read", lambda path: {"library": {"file": "lib.so", "bytes": 1}, "schedule": {"source": "default"}}
    )
    command = f"compile --op {op} --features 3 --head-dim 8 --lengths 50,2000 --target haswell --out"
    assert cli.main([*command.split(), str(tmp_path)]) == 0
    sizes = (8, 8) if op == "toeplitz" else (3, 8, 8)
    wanted = [plan.choose("x86_64-haswell", n, *sizes) for n in (50, 2000)]
    assert asked == [(config, "x86_64-haswell", tmp_path) for config in wanted]
    assert [config.op for config in wanted] == [op, op] and len(capsys.readouterr().out.splitlines()) == 2


def test_compile_for_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def export(config: Any, target: Any, out: Path) -> Path:
        asked.append((config, target.id, out))
        return out

    monkeypatch.setattr(package, "export", export)
    monkeypatch.setattr(
        manifest, "read", lambda path: {"library": {"file": "lib.so", "bytes": 1}, "schedule": {"source": "default"}}
    )
    command = ["compile", "--features", "3", "--head-dim", "8", "--lengths", "50,200", "--out", str(tmp_path)]
    assert cli.main([*command, "--target", "sm_80"]) == 0
    assert asked == [(gpu_tiles.choose(n, 3, 8), "cuda-sm_80", tmp_path) for n in (50, 200)]
    assert cli.main([*command, "--target", "sm_75"]) == 1
    assert capsys.readouterr().err.startswith("error: Unknown GPU architecture 'sm_75'")
    assert cli.main([*command, "--target", "sm_90", "--lengths", "9999999"]) == 1
    assert "expected at most" in capsys.readouterr().err
    asked.clear()
    assert cli.main([*command, "--target", "sm_80", "--op", "toeplitz", "--lengths", "50,8000"]) == 0
    assert asked == [(gpu_toeplitz.choose(n, 8, 163 * 1024), "cuda-sm_80", tmp_path) for n in (50, 8000)]
    capsys.readouterr()
    assert cli.main([*command, "--target", "sm_90", "--op", "toeplitz", "--lengths", "300000"]) == 1
    assert "expected at most 262144 positions on a GPU so far, got 300000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--target", "sm_90", "--op", "toeplitz", "--dtype", "bfloat16"])
    assert "argument --dtype: expected float32 for --op toeplitz" in capsys.readouterr().err
    asked.clear()
    assert cli.main([*command, "--target", "sm_80", "--op", "backward"]) == 0
    assert asked == [(gpu_tiles_backward.choose(n, 3, 8), "cuda-sm_80", tmp_path) for n in (50, 200)]
    capsys.readouterr()
    assert cli.main([*command, "--target", "sm_80", "--op", "backward", "--lengths", "300000"]) == 1
    assert "expected at most 262144 positions for gradients on a GPU, got 300000" in capsys.readouterr().err
    asked.clear()
    assert cli.main([*command, "--target", "sm_80", "--op", "backward", "--dtype", "bfloat16"]) == 0
    assert asked == [(gpu_direct_backward.choose(n, 3, 8, "bfloat16"), "cuda-sm_80", tmp_path) for n in (50, 200)]


def test_info_shows_nvcc_and_gpus(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Any:
        raise GpuNotFoundError("No NVIDIA GPU: the driver lists none.")

    monkeypatch.setattr(nvcc, "find", lambda: Path("/opt/cuda/bin/nvcc"))
    monkeypatch.setattr(nvcc, "version", lambda: "13.0.88")
    monkeypatch.setattr(runtime_gpu, "gpus", none)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "nvcc            /opt/cuda/bin/nvcc 13.0.88\n" in out
    assert "gpu             none; --target cuda compiles for sm_90. No NVIDIA GPU: the driver lists none.\n" in out
    monkeypatch.setattr(runtime_gpu, "gpus", lambda: (runtime_gpu.Gpu("H100", "sm_90", 232448),))
    assert cli.main(["info"]) == 0
    assert "gpu 0           cuda-sm_90, H100, 227 KiB of shared memory for a block\n" in capsys.readouterr().out


def test_compile_errors_are_one_message(
    naive_operators: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["compile", "--lengths", "64", "--out", str(tmp_path / "out"), "--target"]
    assert cli.main([*command, "pentium9"]) == 1
    assert capsys.readouterr().err.startswith("error: Unknown target 'pentium9'")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main([*command, "haswell"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: No C++ compiler") and "apt install g++" in captured.err
    assert captured.out == "" and "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "unknown",
        "cache",
        "cache unknown",
        "tuning",
        "compile --out x",
        "compile --lengths 64",
        "compile --lengths 64 --op convolution --out x",
        "compile --lengths 0 --out x",
        "compile --lengths 64,-5 --out x",
        "compile --lengths 64,, --out x",
        "compile --lengths many --out x",
        "compile --lengths 64 --features 0 --out x",
        "compile --lengths 64 --head-dim 1.5 --out x",
        "bench --lengths none",
    ],
)
def test_wrong_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments.split())
    assert exit.value.code == 2
    assert "usage: rpe-tvm" in capsys.readouterr().err


def test_cache(naive_operators: list[Any], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "path"]) == 0
    assert capsys.readouterr().out == f"{cache_dir}\n"
    cli.main(["compile", "--lengths", "64", "--target", "haswell", "--out", str(tmp_path)])
    capsys.readouterr()
    assert cli.main(["cache", "list"]) == 0
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith("attention-m3-d8-n64") and "x86_64-haswell" in line
    assert total.startswith("1 libraries, ") and total.endswith(f" in {cache_dir}")
    assert cli.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 1 libraries from {cache_dir}\n"
    assert cache.entries() == []


def test_bench_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(bench, "main", lambda args, describe: calls.append(args) or 7)
    assert cli.main(["bench", "--lengths", "512,1024", "--heads", "2"]) == 7
    assert (tuple(calls[0].lengths), calls[0].heads) == ((512, 1024), 2)


def test_tuning_verify_is_handed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise TuningError("record 3 does not replay")

    verify = SimpleNamespace(main=lambda: 0)
    monkeypatch.setitem(sys.modules, "rpe_tvm.tune", SimpleNamespace(verify=verify))
    assert cli.main(["tuning", "verify"]) == 0
    verify.main = main
    assert cli.main(["tuning", "verify"]) == 1
    assert capsys.readouterr().err == "error: record 3 does not replay\n"


def test_python_m_rpe_tvm(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "import runpy, sys\nsys.argv[1:] = ['--version']\nrunpy.run_module('rpe_tvm', run_name='__main__')"
    assert run_python(code).stdout == f"rpe_tvm {__version__}\n"
