"""Default schedules and design spaces give right operators, for AVX2 on any x86 machine and for this CPU."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.s_tir import Schedule
from tvm.s_tir import transform as s_tir

from rpe_tvm import build, reference, runtime, targets
from rpe_tvm.build.shared_arrays import share_arrays
from rpe_tvm.build.workloads import function_of, tuning_workload
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.schedules import of_machine, x86
from rpe_tvm.te import shapes

pytestmark = pytest.mark.compile

AVX2 = targets.preset("haswell")
HERE = targets.detect()


def check(config, target, n_q, n_k):
    operator = runtime.load(build.compile_operator(config, target))
    arrays = problem(config, n_q, n_k)
    out = np.full(arrays[0].shape, np.nan, "f4")
    operator(*arrays, out=out)
    expected = reference.attention(*arrays)[2]
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)


def problem(config, n_q, n_k):
    random = np.random.default_rng(0)
    m, d = config.num_features, config.head_dim

    def normal(*shape):
        return random.standard_normal(shape).astype("f4")

    return normal(2, 3, n_q, d), normal(2, 3, n_k, d), normal(2, 3, n_k, d), normal(3, n_q + n_k - 1), normal(m, d)


@pytest.mark.parametrize("target", [AVX2, HERE], ids=lambda target: target.id)
@pytest.mark.parametrize(("m", "d"), [(32, 64), (24, 40), (5, 7)])
def test_direct(target, m, d):
    check(wisdom.direct_config(m, d, 256, target.lanes), target, 200, 131)


@pytest.mark.parametrize(("n_q", "n_k"), [(200, 131), (70, 128), (1, 1)])
@pytest.mark.parametrize("d", [16, 56, 72, 136])
def test_panels(d, n_q, n_k):
    """Panels of 2, 3 and 4 vectors, some with zeros; 3 and 6 panels share a row's 8 vectors of weights unevenly."""
    length = 256 if n_q > 128 else 128  # packed before all tasks, and by each
    check(wisdom.direct_config(8, d, length, AVX2.lanes), AVX2, n_q, n_k)


@pytest.mark.parametrize("lanes", [8, 16])  # with panels and without
def test_last_tiles_of_any_length(lanes):
    config = wisdom.direct_config(8, 40, 192, lanes)
    operator = runtime.load(build.compile_operator(config, AVX2))
    for n_q, n_k in [(n, 193 - n) for n in range(1, 193, 5)] + [(48, 64), (49, 65), (96, 128), (97, 129)]:
        for is_causal in (False, True):
            arrays = problem(config, n_q, n_k)
            out = np.full(arrays[0].shape, np.nan, "f4")
            operator(*arrays, is_causal=is_causal, out=out)
            expected = reference.attention(*arrays, is_causal=is_causal)[2]
            assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected), (n_q, n_k, is_causal)


@pytest.mark.parametrize("target", [AVX2, HERE], ids=lambda target: target.id)
@pytest.mark.parametrize(
    ("m", "d", "outer", "inner"), [(32, 64, (8,), (8, 4)), (24, 40, (5,), (8, 2)), (5, 7, (3, 4), (4, 4))]
)
def test_fft(target, m, d, outer, inner):
    length = int(np.prod(outer) * np.prod(inner))
    lanes = wisdom.fft_config(target.id, m, d, length, 8).lanes
    config = AttentionConfig(m, d, length, "fft", outer, inner, lanes=lanes)
    check(config, target, length - 1, length // 2)


def test_long_sequences_have_all_threads_work_on_one_product():
    long = AttentionConfig(16, 64, 65536, "fft", (8, 8, 4), (8, 8, 4), lanes=8)
    shorter = replace(long, length=32768, inner=(8, 8, 2))
    one_stage = AttentionConfig(16, 64, 65536, "fft", (8,), (8, 8, 8, 4, 4), lanes=8)
    configs = (long, shorter, one_stage)
    assert [x86.SCHEDULES.default_choices(config).cooperative for config in configs] == [True, False, False]


def test_products_in_parts(monkeypatch):
    config = AttentionConfig(5, 7, 128, "fft", (8, 2, 2), (4,), lanes=8)
    one_for_each_thread = runtime.load(build.compile_operator(config, HERE))
    monkeypatch.setitem(of_machine._SCHEDULES, "x86_64", replace(x86.SCHEDULES, task_floats=0))
    check(config, HERE, 127, 128)
    operator = runtime.load(build.compile_operator(config, HERE))
    arrays = problem(config, 125, 69)
    assert np.array_equal(*(each(*arrays, is_causal=True) for each in (operator, one_for_each_thread)))


def test_products_in_parts_have_three_arrays_of_all_points():
    """Value, output and the product itself; what lies between columns and rows has the points of a part."""
    config = AttentionConfig(16, 64, 65536, "fft", (8, 8, 4), (8, 8, 4), lanes=8)
    sch = Schedule(function_of(config, shapes.symbolic()))
    x86.SCHEDULES.default(sch, config)
    steps = (
        *(s_tir.PlanAndUpdateBufferAllocationLocation, s_tir.ConvertBlocksToOpaque),
        *(s_tir.CompactBufferAllocation, s_tir.LowerOpaqueBlock),
    )
    mod = tvm.transform.Sequential([step() for step in steps])(tvm.IRModule({"main": share_arrays(sch.mod["main"])}))
    sizes = {}

    def note(statement):
        name, shape = str(statement.buffer.name), statement.buffer.shape
        if name.startswith(("value", "packed_value", "numerator")):
            sizes[name] = int(np.prod([int(extent) for extent in shape]))

    tvm_ffi.structural_walk(mod["main"].body, (tvm.tirx.AllocBuffer, note))
    points = 2 * config.lanes * config.length
    large = {name: size for name, size in sizes.items() if size > points // 8}
    assert large == {"packed_value": points, "value_columns0": points, "numerator": 2 * points}  # of both parities
    assert sizes["value_columns2"] == points // 8


def test_sixteen_lanes_and_a_one_stage_split():
    check(AttentionConfig(16, 64, 16, "fft", (4,), (4,), lanes=16), HERE, 16, 16)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(16, 16, 64, "fft", (8,), (8,), lanes=8),
        AttentionConfig(16, 16, 64, "direct", tile=(64, 64)),
        AttentionConfig(16, 40, 256, "direct", tile=(54, 64), lanes=8),
        BackwardConfig(16, 16, 64, "fft", (8,), (8,), lanes=8),
    ],
    ids=lambda config: f"{config.op} {config.description}",
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
