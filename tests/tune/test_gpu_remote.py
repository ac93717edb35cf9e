"""Races over TVM's RPC: a server of this machine stands for one with an AMD GPU, which torch on the CPU stands for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from rpe_tvm.errors import TuningError  # noqa: E402
from rpe_tvm.tune import gpu_job, gpu_measure, gpu_server, sessions  # noqa: E402
from rpe_tvm.tune.gpu_candidates import Size, candidates, label  # noqa: E402
from rpe_tvm.tune.gpu_cli import AMD, main  # noqa: E402
from rpe_tvm.tune.gpu_measure import GpuLostError  # noqa: E402
from rpe_tvm.tune.gpu_remote import RemoteGpu  # noqa: E402
from rpe_tvm.tune.gpu_work import Work  # noqa: E402

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS))
import rpc_servers  # noqa: E402

pytestmark = pytest.mark.compile

SIZE, TARGET = Size("float32", 256, 1, 2), "rocm-gfx942"
CONFIGS = candidates(SIZE, TARGET)[:3]
NAMES = [label(config) for config in CONFIGS]
# a process that answers has the GPU; all others start sooner without torch
SITE = """
import pathlib, sys
if "rpe_tvm.tune.gpu_job" in sys.orig_argv:
    import raced_on_cpu
    raced_on_cpu.install_as_amd(pathlib.Path({scenario!r}))
else:
    sys.modules["torch"] = None
"""


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def tracker(top):
    """A tracker with one server, and what its GPU does in the file `scenario.json`."""
    (top / "sitecustomize.py").write_text(SITE.format(scenario=str(top / "scenario.json")))
    path = f"{top}:{TESTS}"
    started = rpc_servers.Server(path, "tvm.exec.rpc_tracker")
    address = f"127.0.0.1:{started.port}"
    server = rpc_servers.Server(path, "rpe_tvm.tune.gpu_server", "--tracker", address, "--key", "mi300")
    yield address
    server.kill()
    started.kill()


@pytest.fixture
def race(top, tracker, tmp_path, monkeypatch):
    """Race three candidates; the arguments say what the GPU does, and the rest are options."""
    work = Work(tmp_path / "work")
    for config in candidates(SIZE, TARGET):
        artefact = work.artefact(config, TARGET)
        artefact.mkdir(parents=True)
        if config in CONFIGS:
            content = {"config": config.to_json(), "target": {"kind": "rocm"}}
            (artefact / "manifest.json").write_text(json.dumps(content))
        else:
            (artefact / "failure.json").write_text(json.dumps({"reason": "not compiled"}))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))

    def run(*options: str, **scenario) -> int:
        said = {"cost": {}, "wrong": [], **scenario}
        (top / "scenario.json").write_text(json.dumps(said))
        command = ["--race-only", "--target", "gfx942", "--lengths", "256", "--features", "1", "--head-dim", "2"]
        command += ["--tracker", tracker, "--key", "mi300", "--work-dir", str(work.directory)]
        return main([*command, "--logs", str(tmp_path / "logs"), "--seconds", "60", *options], AMD)

    run.log = tmp_path / "logs" / TARGET / "attention"
    return run


def test_the_fastest_right_candidate_of_the_other_machine_is_chosen(race):
    wrong, best = NAMES[1:]
    assert race(cost={wrong: 1e-4, best: 0.5e-3}, wrong=[wrong]) == 0
    (entry,) = json.loads((race.log / "wisdom.json").read_text())["entries"]
    assert entry["config"] == CONFIGS[2].to_json() and (entry["ms"], entry["default_ms"]) == (0.5, 1.0)
    assert any("wrong result" in each["reason"] for each in entry["refused"] if each["name"] == wrong)
    manifest = json.loads((race.log / "manifest.json").read_text())
    assert (manifest["device"], manifest["driver"]) == ("Fake MI300X", "6.4")


def test_a_process_that_ends_there_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = gpu_server._answer('{"size": {}}')  # no archive of candidates
    assert "the process of the race ended with status 1; it said: FileNotFoundError" in answer
    monkeypatch.setattr(sessions, "answer", lambda *_: json.loads(answer))
    remote = RemoteGpu(sessions.Connection("tracker", 1, "mi300", 1.0), 60.0)
    with pytest.raises(TuningError, match=r"Boards 'mi300' at tracker tracker:1: .* status 1.*gpu_server there"):
        remote.gpu("rocm")


def test_what_breaks_the_gpu_there_is_named_here(tmp_path, monkeypatch):
    def lost(*_):
        raise GpuLostError("a", "an illegal memory access")

    def answer(connection, module, job, timeout):
        assert timeout == 61
        return gpu_job._main(job["question"], Path(job["candidates"]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_measure, "measure", lost)
    monkeypatch.setattr(sessions, "answer", answer)
    (tmp_path / "a" / TARGET).mkdir(parents=True)
    remote = RemoteGpu(sessions.Connection("tracker", 1, "mi300", 1.0), 60.0)
    with pytest.raises(GpuLostError, match="The candidate a broke the GPU's context: an illegal memory access"):
        remote.measure(SIZE, {"a": tmp_path / "a" / TARGET}, 1.0)


def test_no_server(race, capsys):
    assert race("--key", "other", "--wait", "1") == 1
    assert "Boards 'other' at tracker 127.0.0.1:" in (said := capsys.readouterr().err) and "none was free" in said
    with pytest.raises(SystemExit):
        main(["--key", "mi300"], AMD)
    assert "arguments --tracker and --key: expected both or none" in capsys.readouterr().err
