"""The case that candidates of the gradients are checked against accepts right ones, and only those."""

import numpy as np
import pytest
from tvm.s_tir import Schedule

from rpe_tvm import targets
from rpe_tvm.build.workloads import TUNING_HEADS, tuning_workload
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.schedules import x86
from rpe_tvm.schedules.cpu import Choices
from rpe_tvm.tune import inputs, measure
from rpe_tvm.tune.builder import build_schedules

pytestmark = pytest.mark.compile

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
