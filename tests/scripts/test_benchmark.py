"""scripts/benchmark.py: its commands are understood, and a failure of one does not stop the others."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rpe_tvm import cli

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_understood(benchmark, tmp_path):
    parsed = [cli._parser().parse_args(arguments) for arguments in benchmark.commands(tmp_path, 3)]
    assert [(args.op, args.mode) for args in parsed] == [
        ("attention", "forward"),
        ("attention", "train"),
        ("toeplitz", "forward"),
    ]
    assert {args.threads for args in parsed} == {3}
    assert [args.json.name for args in parsed] == ["x86.json", "x86-train.json", "x86-toeplitz.json"]
    assert 16384 in parsed[1].memory_lengths and parsed[2].plot is None


def test_the_commands_for_gpus_are_understood(benchmark, tmp_path):
    attention, toeplitz = (cli._parser().parse_args(arguments) for arguments in benchmark.gpu_commands(tmp_path))
    assert (attention.target, toeplitz.target) == ("cuda", "cuda")
    assert (attention.lengths[-1], attention.json.name, attention.plot.name) == (262144, "cuda.json", "cuda.png")
    assert (toeplitz.op, toeplitz.json.name, toeplitz.plot) == ("toeplitz", "cuda-toeplitz.json", None)


def test_a_failure_is_told_at_the_end(benchmark, tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, **options):
        ran.append(command)
        return subprocess.CompletedProcess(command, 1 if "train" in command else 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--out", str(tmp_path)])
    assert benchmark.main() == 1
    printed = capsys.readouterr()
    assert len(ran) == printed.out.count("$ python -m rpe_tvm bench") == 3
    assert printed.err.startswith("failed: python -m rpe_tvm bench --mode train") and printed.err.count("\n") == 1
