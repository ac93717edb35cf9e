"""Default schedules and design spaces give right operators, for AVX2 on any x86 machine and for this CPU."""

from dataclasses import replace

import numpy as np
import pytest
from tvm.s_tir import Schedule

from rpe_tvm import build, reference, runtime, targets
from rpe_tvm.build.workloads import tuning_workload
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import of_machine, x86

pytestmark = pytest.mark.compile

AVX2 = targets.preset("haswell")
HERE = targets.detect()


def check(config, target, n_q, n_k, **options):
    operator = runtime.load(build.compile_operator(config, target))
    random = np.random.default_rng(0)
    m, d = config.num_features, config.head_dim

    def normal(*shape):
        return random.standard_normal(shape).astype("f4")

    arrays = normal(2, 3, n_q, d), normal(2, 3, n_k, d), normal(2, 3, n_k, d), normal(3, n_q + n_k - 1), normal(m, d)
    out = np.full((2, 3, n_q, d), np.nan, "f4")
    operator(*arrays, out=out, **options)
    expected = reference.attention(*arrays, **options)[2]
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("target", [AVX2, HERE], ids=lambda target: target.id)
@pytest.mark.parametrize(("m", "d"), [(32, 64), (24, 40), (5, 7)])
def test_direct(target, m, d):
    check(wisdom.direct_config(m, d, 256, target.lanes), target, 200, 131)


@pytest.mark.parametrize("target", [AVX2, HERE], ids=lambda target: target.id)
@pytest.mark.parametrize(
    ("m", "d", "outer", "inner"), [(32, 64, (8,), (8, 4)), (24, 40, (5,), (8, 2)), (5, 7, (3, 4), (4, 4))]
)
def test_fft(target, m, d, outer, inner):
    length = int(np.prod(outer) * np.prod(inner))
    lanes = wisdom.fft_config(target.id, m, d, length, 8).lanes
    config = AttentionConfig(m, d, length, "fft", outer, inner, lanes=lanes)
    check(config, target, length - 1, length // 2)


def test_long_sequences_have_all_threads_work_on_one_product(monkeypatch):
    long = AttentionConfig(16, 64, 65536, "fft", (8, 8, 4), (8, 8, 4), lanes=8)
    shorter = replace(long, length=32768, inner=(8, 8, 2))
    assert [x86.SCHEDULES.default_choices(config).cooperative for config in (long, shorter)] == [True, False]
    monkeypatch.setitem(of_machine._SCHEDULES, "x86_64", replace(x86.SCHEDULES, task_floats=0))
    check(AttentionConfig(16, 64, 16, "fft", (4,), (4,), lanes=8), HERE, 15, 16)


def test_sixteen_lanes_and_a_one_stage_split():
    check(AttentionConfig(16, 64, 16, "fft", (4,), (4,), lanes=16), HERE, 16, 16)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(16, 16, 64, "fft", (8,), (8,), lanes=8),
        AttentionConfig(16, 16, 64, "direct", tile=(64, 64)),
        BackwardConfig(16, 16, 64, "fft", (8,), (8,), lanes=8),
    ],
    ids=lambda config: f"{config.op} {config.algorithm}",
)
def test_design_spaces_have_decisions_and_replay(config):
    workload = tuning_workload(config)
    spaces = x86.SCHEDULES.space(Schedule(workload), config)
    assert len(spaces) > 1
    for space in spaces:
        decisions = space.trace.decisions
        assert len(decisions) >= 2
        again = Schedule(workload)
        space.trace.apply_to_schedule(again, remove_postproc=False)
        assert again.mod["main"].script() == space.mod["main"].script()
