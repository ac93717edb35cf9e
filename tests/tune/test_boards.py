"""Tuning over RPC, with processes of this machine as boards: they disappear, candidates crash, runs resume."""

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tvm.s_tir import meta_schedule as ms

from rpe_tvm import targets
from rpe_tvm.build import records
from rpe_tvm.build.workloads import TUNING_HEADS, tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune import arm_cli, inputs, search, session, verify
from rpe_tvm.tune.boards import Boards
from rpe_tvm.tune.builder import build_schedules
from rpe_tvm.tune.measure import Contestant, Timing
from rpe_tvm.tune.runner import CheckingRunner, Settings
from rpe_tvm.tune.sessions import Connection

sys.path.append(str(Path(__file__).resolve().parents[1]))
import rpc_servers

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parents[2]
TARGET = targets.detect()
CONFIG = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=TARGET.lanes)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A tracker with one board."""
    without_torch = rpc_servers.hide_torch(tmp_path_factory.mktemp("without_torch"))
    started = rpc_servers.Boards(without_torch)
    started.board = started.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{without_torch}:{ROOT}")  # of what builds candidates, which then starts sooner
        yield started
    started.stop()


@pytest.fixture(scope="module")
def connection(servers):
    return Connection("127.0.0.1", servers.tracker.port, servers.key, 60.0)


@pytest.fixture(scope="module")
def boards(connection, tmp_path_factory):
    return Boards.connect(connection, TARGET, tmp_path_factory.mktemp("helper"))


@pytest.fixture(scope="module")
def case_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("case") / "inputs.npz"
    inputs.save(CONFIG, TUNING_HEADS, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    top = tmp_path_factory.mktemp("run")
    return session.Run("attention", TARGET, (64,), (8,), 16, 4, 60.0, 1, top / "work", top / "logs")


def c_library(directory: Path, name: str, body: str) -> Path:
    """A library whose function `main` has this body."""
    source, library = directory / f"{name}.c", directory / f"{name}.so"
    source.write_text(f"int __tvm_ffi_main(void* self, void* args, int count, void* result) {{ {body} }}\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def test_a_bad_candidate_fails_and_the_board_goes_on(boards, run, case_file, tmp_path):
    (right,) = build_schedules([session._default(run, CONFIG)], session.tvm_target(run), 1, TARGET.machine)
    data = dict(np.load(case_file))
    data["expected0"] = data["expected0"] * 1.001
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, **data)
    not_loaded = tmp_path / "text.so"
    not_loaded.write_text("no library")

    def measure(*contestants, timeout=60.0):
        return boards.measure([Contestant(*each) for each in contestants], 1, 0.05, timeout)

    first, second, third = measure((right, case_file), (right, wrong), (not_loaded, case_file))
    assert len(first.seconds) == 5 and 0 < first.best < 1 and first.error < 1e-6 and not first.failure
    assert "wrong result" in second.failure and not second.seconds
    assert "Failed to load" in third.failure
    (crash,) = measure((c_library(tmp_path, "crash", "*(volatile int*)8 = 1; return 0;"), case_file))
    assert "2 sessions ended" in crash.failure
    (endless,) = measure((c_library(tmp_path, "endless", "for (;;) {}"), case_file), timeout=1.0)
    assert endless.failure == "no answer within 1 s"
    (again,) = measure((right, case_file))
    assert not again.failure


def test_candidates_run_on_several_boards_at_once(case_file):
    meeting = threading.Barrier(2, timeout=10)  # broken where one waits for the other to finish

    class TwoBoards:
        jobs = 2
        device = {"device": "two boards"}

        def measure(self, contestants, threads, seconds, timeout):
            meeting.wait()
            return [Timing((float(contestants[0].library.name),), 0.0)]

    candidates = [ms.runner.RunnerInput(f"/{k}", "llvm", []) for k in range(4)]
    results = CheckingRunner(Settings(case_file, 1, place=TwoBoards())).run(candidates)
    assert [float(result.result().run_secs[0]) for result in results] == [0, 1, 2, 3]


class Killer:
    """One board whose server is killed in the middle of the first call, and started again if asked to."""

    jobs = 1

    def __init__(self, boards, servers, *, returns):
        self.boards, self.servers, self.returns = boards, servers, returns
        self.device, self.calls = boards.device, 0

    def measure(self, contestants, threads, seconds, timeout):
        self.calls += 1
        if self.calls > 1:
            return self.boards.measure(contestants, threads, seconds, timeout)
        threading.Thread(target=self._kill).start()
        return self.boards.measure(contestants, threads, 2.0, timeout)

    def _kill(self):
        self.servers.board.wait_for_session()
        time.sleep(0.3)
        self.servers.board.kill()
        if self.returns:
            self.servers.board = self.servers.start()


def test_a_search_survives_a_killed_server_and_resumes(boards, servers, run, case_file, tmp_path, capfd):
    def find(trials, place):
        servers.wait_for(free=1)
        return search.search(
            CONFIG,
            session.tvm_target(run),
            tmp_path,
            machine=TARGET.machine,
            trials=trials,
            seconds=300.0,
            settings=Settings(case_file, 1, seconds=0.1, place=place),
            progress=lambda done, best: None,
        )

    database = tmp_path / "database_tuning_record.json"

    # killed while a candidate runs, and back: the candidate runs once more
    assert len(find(2, Killer(boards, servers, returns=True))) == 2
    assert "a session ended" in capfd.readouterr().out
    before = database.read_text().splitlines()
    assert len(before) == 2

    # killed for good: the run ends with what to do, and its batch does not count as tried
    impatient = Boards(dataclasses.replace(boards._connection, wait=1.0), TARGET, boards._helper, is_emulated=False)
    impatient.device = boards.device
    with pytest.raises(TuningError, match=r"none was free within 1 s .* go on with --resume"):
        find(4, Killer(impatient, servers, returns=False))
    assert database.read_text().splitlines() == before

    # and with a board again it spends only what is missing
    servers.board = servers.start()
    assert len(find(4, boards)) == 4
    lines = database.read_text().splitlines()
    assert lines[:2] == before and len(lines) == 4


def test_logs_of_an_emulated_board_are_refused_everywhere(servers, connection, tmp_path, monkeypatch, capfd):
    servers.start()
    servers.wait_for(free=2)
    assert Boards.connect(connection, TARGET, tmp_path).jobs == 2
    work, logs = tmp_path / "work", tmp_path / "logs"
    command = ["--tracker", f"127.0.0.1:{servers.tracker.port}", "--key", servers.key, "--target", TARGET.mcpu]
    command += ["--lengths", "64", "--features", "8", "--head-dim", "16", "--trials", "2", "--seconds", "300"]
    command += ["--work-dir", str(work), "--logs", str(logs), "--threads", "1", "--emulated"]

    # the package's own logs are refused before anything is tried
    with monkeypatch.context() as patch:
        patch.setattr(wisdom, "LOGS", logs)
        assert arm_cli.main(command) == 1
    assert "Give another directory: --logs DIR" in capfd.readouterr().err
    assert not (work / TARGET.id).exists() and not logs.exists()

    with monkeypatch.context() as patch:
        patch.setattr(session, "candidates", lambda *_: [CONFIG])
        patch.setattr(session, "RACE_SECONDS", 0.1)
        assert arm_cli.main(command) == 0
    assert "2 trials" in capfd.readouterr().out
    log = logs / TARGET.id / "attention"
    assert json.loads((log / "manifest.json").read_text())["emulated"] is True

    # hardware adds nothing to them, nor to the work directory
    real = session.Run("attention", TARGET, (64,), (8,), 16, 2, 60.0, 1, work, logs)
    with pytest.raises(TuningError, match="one is emulated, the other is not"):
        session.tune(real, resume=True)
    with pytest.raises(TuningError, match="their times do not compare"):
        session.tune(dataclasses.replace(real, logs=tmp_path / "other"), resume=True)

    assert verify.main(logs) == 1
    assert "measured on an emulated board" in capfd.readouterr().out
    monkeypatch.setattr(wisdom, "LOGS", logs)
    with pytest.raises(TuningError, match="measured on an emulated board"):
        wisdom.records.__wrapped__(TARGET.id)
    (path,) = (log / "records").iterdir()
    record = records.read(path, AttentionConfig)
    assert record.provenance["emulated"] is True
    with pytest.raises(TuningError, match="measured on an emulated board"):
        records.find(record.config, TARGET.id, tuning_workload)
