"""Tuning of the gradients: candidates are checked, records replay. The rest is as for attention, in test_tune.py."""

import numpy as np
import pytest
from tvm.s_tir import Schedule

from rpe_tvm import targets
from rpe_tvm.build import records
from rpe_tvm.build.lower import tuned_function
from rpe_tvm.build.workloads import TUNING_HEADS, tuning_workload
from rpe_tvm.errors import TuningError
from rpe_tvm.plan import backward, wisdom
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.schedules import x86
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.tune import inputs, measure, session, store, verify
from rpe_tvm.tune.builder import build_schedules

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("processes_without_torch")]

TARGET = targets.detect()
CONFIG = BackwardConfig(3, 24, 128, "fft", (4, 4), (2, 4), lanes=8)  # the last pair of lanes is half empty


def scheduled(choices):
    sch = Schedule(tuning_workload(CONFIG))
    x86.SCHEDULES.schedule(sch, CONFIG, choices)
    return sch


def test_right_candidates_pass_and_an_error_in_any_output_is_seen(tmp_path):
    file = tmp_path / "inputs.npz"
    inputs.save(CONFIG, TUNING_HEADS, file)
    tiled = Choices(columns=2, rows=4, pad=False)
    libraries = build_schedules([scheduled(Choices()), scheduled(tiled)], targets.to_tvm(targets.detect()), 2)
    data = dict(np.load(file))
    contestants = [measure.Contestant(library, file) for library in libraries]
    for output in range(3):
        expected = f"expected{output}"
        wrong = tmp_path / f"wrong{output}.npz"
        np.savez(wrong, **{**data, expected: data[expected] * 1.001})
        contestants.append(measure.Contestant(libraries[0], wrong))
    default, with_tiles, *refused = measure.measure(contestants, 1, 0.0, 60.0)
    for right in (default, with_tiles):
        assert not right.failure and right.error < 1e-6
    assert ["wrong result" in timing.failure for timing in refused] == [True] * 3


def test_a_record_is_found_replays_and_is_right(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(wisdom, "LOGS", tmp_path)
    workload = tuning_workload(CONFIG)
    sampled, *_ = x86.SCHEDULES.space(Schedule(workload), CONFIG)
    record = records.Record(
        CONFIG, records.workload_hash(workload), records.record_json(sampled, workload, [1.0]), {"trials": 1}
    )
    entry = {"config": CONFIG.to_json(), "ms": 1.0, "default_ms": 1.0}
    where = store.environment({"device": "this test's"}, str(targets.to_tvm(TARGET)), 1)
    store.publish(wisdom.directory(TARGET.id, "backward"), entry, record, where)
    wisdom.records.cache_clear()
    try:
        assert backward.fft_config(TARGET.id, 128, 3, 24, TARGET.lanes) == CONFIG
        _, schedule = tuned_function(CONFIG, TARGET)
        assert schedule == {"source": "tuned", "trials": 1}
        assert verify.main(tmp_path) == 0
    finally:
        wisdom.records.cache_clear()
    assert "found, replays, right" in capfd.readouterr().out


def test_lengths_by_tiles_are_left_out(tmp_path):
    lengths = (64, backward.longest_direct(TARGET.id, 32, 64, TARGET.lanes), 2048)
    run = session.Run("backward", TARGET, lengths, (32,), 64, 4, 60.0, 1, tmp_path / "work", tmp_path / "logs")
    assert run.pairs == [(2048, 32)]
    with pytest.raises(TuningError, match="Expected lengths whose backward runs by FFT, got 64: .*longer --lengths"):
        session.tune(
            session.Run("backward", TARGET, (64,), (32,), 64, 4, 60.0, 1, run.work_dir, run.logs), resume=False
        )
