"""A tuning run end to end on a small operator: records, resumption, refusal of wrong candidates, errors."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rpe_tvm import targets
from rpe_tvm.build import records
from rpe_tvm.build.lower import lower
from rpe_tvm.build.workloads import TUNING_HEADS, tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.files import write_json
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune import inputs, measure, search, session, store, verify
from rpe_tvm.tune.builder import build_schedules
from rpe_tvm.tune.cli import main
from rpe_tvm.tune.runner import Settings

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("processes_without_torch")]

ROOT = Path(__file__).resolve().parents[2]
TARGET = targets.detect()
SMALL = ["--lengths", "64", "--features", "8", "--head-dim", "16", "--trials", "4", "--seconds", "300"]


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """An empty directory of tuning logs, seen by the plan."""
    monkeypatch.setattr(wisdom, "LOGS", tmp_path / "logs")
    wisdom.records.cache_clear()
    yield tmp_path / "logs"
    wisdom.records.cache_clear()


@pytest.fixture
def run(tmp_path, logs):
    return session.Run("attention", TARGET, (64,), (8,), 16, 4, 60.0, 1, tmp_path / "work", logs)


def options(run):
    return [*SMALL, "--work-dir", str(run.work_dir), "--logs", str(run.logs)]


def test_a_killed_run_goes_on_and_ships_a_record_that_lower_finds_and_verify_accepts(run, monkeypatch, capfd):
    command = [sys.executable, str(ROOT / "scripts" / "tune_x86.py"), *options(run)]
    command[command.index("--trials") + 1] = "400"
    database = run.work_dir / TARGET.id / "attention" / "n64-m8-d16" / "database" / "database_tuning_record.json"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (database.exists() and database.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    finished = len(search.open_database(database.parent))
    assert finished > 0

    # the work directory is protected; with --resume only the missing trial is made
    assert main(options(run)) == 1
    assert "Add --resume" in capfd.readouterr().err
    monkeypatch.setattr(session, "RACE_SECONDS", 0.2)
    trials = finished + 1
    resumed = [*options(run), "--resume", "--trials", str(trials)]
    assert main(resumed) == 0
    assert len(search.open_database(database.parent)) == trials
    assert f"{trials} trials" in capfd.readouterr().out
    wisdom.records.cache_clear()
    (entry,) = wisdom.records(TARGET.id)
    config = wisdom.choose(TARGET.id, 64, 8, 16, TARGET.lanes)
    assert entry.config == config and 0 < entry.ms <= entry.default_ms
    schedule = lower(config, TARGET).schedule
    assert schedule["source"] == "tuned" and schedule["trials"] == trials
    assert verify.main(run.logs) == 0

    # of a finished run nothing is measured again
    before = database.read_bytes()
    assert main(resumed) == 0
    assert database.read_bytes() == before

    # a record of another version of the tensor expressions is not used, and verify says so
    path = records.path_of(config, TARGET.id)
    fields = json.loads(path.read_text())
    fields["workload_hash"] = "0" * 16
    write_json(path, fields)
    assert lower(config, TARGET).schedule == {"source": "default"}
    capfd.readouterr()
    assert verify.main(run.logs) == 1
    assert "SHA-256 is not the manifest's" in capfd.readouterr().out


def test_wrong_candidates_are_never_timed(tmp_path):
    config = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=TARGET.lanes)
    file = tmp_path / "inputs.npz"
    inputs.save(config, TUNING_HEADS, file)
    data = dict(np.load(file))
    data["expected0"] = data["expected0"] * 1.001
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, **data)
    (library,) = build_schedules([session._default(_run(tmp_path), config)], session.tvm_target(_run(tmp_path)), 1)
    right, refused = measure.measure(
        [measure.Contestant(library, file), measure.Contestant(library, wrong)], 1, 0.05, 60.0
    )
    assert right.best > 0 and right.error < 1e-6 and not right.failure
    assert "wrong result" in refused.failure and not refused.seconds


def _run(tmp_path):
    return session.Run("attention", TARGET, (64,), (8,), 16, 4, 60.0, 1, tmp_path / "work", tmp_path / "logs")


def test_a_crashing_candidate_is_a_failure_with_a_reason(tmp_path):
    file = tmp_path / "inputs.npz"
    inputs.save(AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=8), 1, file)
    (timing,) = measure.measure([measure.Contestant(tmp_path / "missing.so", file)], 1, 0.05, 60.0)
    assert timing.failure


def test_nothing_valid_is_an_error_that_shows_the_first_one(tmp_path):
    config = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=TARGET.lanes)
    file = tmp_path / "inputs.npz"
    inputs.save(config, TUNING_HEADS, file)
    data = dict(np.load(file))
    data["expected0"] = data["expected0"] + 1.0
    np.savez(file, **data)
    with pytest.raises(TuningError, match="No candidate of attention-m8-d16-n64 .* First error: wrong result"):
        search.search(
            config,
            session.tvm_target(_run(tmp_path)),
            tmp_path / "database",
            machine=TARGET.machine,
            trials=2,
            seconds=0.0,  # spent after the first batch
            settings=Settings(file, 1, seconds=0.05),
            progress=lambda done, best: None,
        )


def test_an_interrupt_ends_the_search_and_keeps_its_trials(tmp_path):
    config = AttentionConfig(8, 16, 64, "direct", tile=(64, 64), lanes=TARGET.lanes)
    file = tmp_path / "inputs.npz"
    inputs.save(config, TUNING_HEADS, file)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        search.search(
            config,
            session.tvm_target(_run(tmp_path)),
            tmp_path / "database",
            machine=TARGET.machine,
            trials=100,
            seconds=300.0,
            settings=Settings(file, 1, seconds=0.05),
            progress=lambda done, best: signal.raise_signal(signal.SIGINT),  # as Ctrl-C does
        )
    assert len(search.open_database(tmp_path / "database")) == search.BATCH
    assert signal.getsignal(signal.SIGINT) is before


def test_a_missing_compiler_ends_the_script_with_the_build_error(run, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(options(run)) == 1
    assert "no-such-compiler" in capfd.readouterr().err


def test_json_is_written_by_rename(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    assert store.read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert store.read_json(tmp_path / "none.json") is None


def test_the_workload_hash_is_of_the_workload_alone():
    config = wisdom.direct_config(8, 16, 64, 8)
    other = wisdom.direct_config(8, 16, 80, 8)
    assert records.workload_hash(tuning_workload(config)) == records.workload_hash(tuning_workload(config))
    assert records.workload_hash(tuning_workload(config)) != records.workload_hash(tuning_workload(other))
