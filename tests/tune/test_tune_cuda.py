"""Tuning for GPUs without one: candidates, races of fake operators on a fake clock, refusals, resumption, the table."""

import itertools
import json
import os
import types
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from rpe_tvm import bench_cuda_clock, bench_cuda_machine, gpu_targets, peers  # noqa: E402
from rpe_tvm.errors import BuildError, TuningError  # noqa: E402
from rpe_tvm.plan import gpu, gpu_choice, gpu_direct, gpu_wisdom, wisdom  # noqa: E402
from rpe_tvm.torch import cuda  # noqa: E402
from rpe_tvm.tune import gpu_builder, gpu_measure, gpu_session  # noqa: E402
from rpe_tvm.tune.gpu_candidates import Size, candidates, label  # noqa: E402
from rpe_tvm.tune.gpu_cli import main, parser, sizes  # noqa: E402
from rpe_tvm.tune.gpu_work import NOT_BUILT, Work  # noqa: E402

TARGET = gpu_targets.preset("sm_90")
SMALL = Size("float32", 64, 4, 8)
HALF = Size("bfloat16", 80, 4, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144])
def test_candidates_are_the_rule_first_and_no_one_twice(dtype, n):
    found = candidates(Size(dtype, n, 32, 64))
    assert found[0] == gpu_choice.rule(n, 32, 64, dtype)
    assert len({label(config) for config in found}) == len(set(found)) == len(found)
    assert len(found) > 1 or n == gpu.LONGEST  # one row alone divides that
    for config in found:
        assert config.length == n and (config.num_features, config.head_dim) == (32, 64)
        assert config.dtype == dtype or (config.dtype == "float32" and n >= 16384)
        if isinstance(config, gpu.GpuAttentionConfig):
            assert all(config.radices[0] % radix == 0 for radix in config.radices)
            assert config.row <= gpu.LONGEST_ROW and config.threads * config.radices[0] >= config.row


def test_one_library_serves_the_same_tiles_at_all_lengths():
    short, long = (gpu_direct.choose(n, 32, 64, "bfloat16") for n in (4096, 16384))
    assert short != long and label(short) == label(long)
    assert label(replace(short, blocks=2)) != label(short)
    assert label(gpu.choose(512, 32, 64)) != label(gpu.choose(512, 16, 64))


def test_options_give_buckets_and_refuse_what_has_no_kernel(capsys):
    given = parser().parse_args(["--lengths", "1000,1024", "--dtypes", "float32,float16", "--features", "16"])
    assert sizes(given) == (Size("float32", 1024, 16, 64), Size("float16", 1024, 16, 64))
    assert len(sizes(parser().parse_args([]))) == 13
    for wrong in (["--lengths", str(gpu.LONGEST + 1)], ["--dtypes", "float64"], ["--lengths", "0"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "expected" in capsys.readouterr().err or wrong == ["--lengths", "0"]


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """The CPU in the place of an H100: `cost` has seconds of a call by candidate, `spoil` changes its result."""
    state = types.SimpleNamespace(now=0.0, cost={}, spoil={}, raced=[], logs=tmp_path / "logs")
    monkeypatch.setattr(wisdom, "LOGS", state.logs)
    gpu_wisdom.records.cache_clear()
    gpu_wisdom.nearest.cache_clear()

    class Event:
        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return 1e3 * (later.at - self.at)

    def load(path):
        state.raced.append(path.parent.name)
        fields = json.loads((path / "manifest.json").read_text())["config"]
        return types.SimpleNamespace(config=gpu_wisdom.config_from_json(fields), name=path.parent.name)

    def attention(instance, query, key, value, rpe_bias, projection, out, *, feature_map, is_causal):
        assert feature_map == "nprf"
        state.now += state.cost.get(instance.name, 1e-3)
        q, k, v = (x.float() for x in (query, key, value))
        result = peers.torch_fft_attention(q, k, v, rpe_bias, projection, is_causal=is_causal)
        out.copy_(state.spoil.get(instance.name, lambda result: result)(result))

    def capture(call, count):
        return types.SimpleNamespace(replay=lambda: [call() for _ in range(count)]), None

    monkeypatch.setattr(gpu_measure, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_measure, "HEADS", 2)
    monkeypatch.setattr(gpu_measure, "MOST_CALLS", 2)
    monkeypatch.setattr(bench_cuda_clock, "TURN_CALLS", 2)
    # checks have taken all of the time: three turns each, not so many as fit into a budget of real seconds
    monkeypatch.setattr(gpu_measure, "time", types.SimpleNamespace(monotonic=itertools.count(step=1000).__next__))
    monkeypatch.setattr(gpu_measure, "load_gpu", load)
    monkeypatch.setattr(cuda, "attention", attention)
    monkeypatch.setattr(bench_cuda_clock, "new_event", Event)
    monkeypatch.setattr(bench_cuda_clock, "capture", capture)
    monkeypatch.setattr(bench_cuda_machine, "obstacle", lambda with_plot: None)
    machine = {"name": "Fake H100", "compute_capability": "9.0", "driver_version": "580.0", "torch": "2.0"}
    monkeypatch.setattr(bench_cuda_machine, "environment", lambda: machine)
    state.machine = machine
    yield state
    gpu_wisdom.records.cache_clear()
    gpu_wisdom.nearest.cache_clear()


def built(work, size):
    """Write what a build leaves, for all candidates of a size."""
    for config in candidates(size):
        artefact = work.artefact(config, TARGET.id)
        artefact.mkdir(parents=True, exist_ok=True)
        (artefact / "manifest.json").write_text(json.dumps({"config": config.to_json()}))


@pytest.fixture
def run(gpu_machine, tmp_path):
    work = Work(tmp_path / "work")
    for size in (SMALL, HALF):
        built(work, size)
    return gpu_session.Run(TARGET, (SMALL, HALF), 60.0, 1, work, gpu_machine.logs)


def table(run):
    return json.loads((run.logs / TARGET.id / "attention" / "wisdom.json").read_text())["entries"]


def test_the_fastest_right_candidate_is_chosen_from_then_on(run, gpu_machine, capsys):
    small, direct = candidates(SMALL), candidates(HALF)
    gpu_machine.cost |= {label(small[1]): 0.5e-3, label(direct[2]): 0.25e-3, label(direct[3]): 0.1e-3}
    gpu_machine.spoil[label(direct[3])] = lambda out: 1.1 * out  # the fastest one, and wrong
    gpu_session.race(run, resume=False)
    half, single = table(run)
    assert (single["dtype"], single["ms"], single["default_ms"]) == ("float32", 0.5, 1.0)
    assert (half["dtype"], half["length"], half["ms"]) == ("bfloat16", 80, 0.25)
    assert single["rule"] == label(small[0]) and single["trials"] == len(small)
    assert [each["name"] for each in half["refused"]] == [label(direct[3])]
    assert "wrong result: relative error 1.0e-01" in half["refused"][0]["reason"]
    assert "0.25" in capsys.readouterr().out

    manifest = json.loads((run.logs / TARGET.id / "attention" / "manifest.json").read_text())
    assert (manifest["device"], manifest["driver"]) == ("Fake H100", "580.0") and list(manifest["files"]) == [
        "wisdom.json"
    ]

    assert gpu_choice.choose(60, 4, 8) == small[1] != gpu_choice.rule(60, 4, 8)
    assert gpu_choice.choose(80, 4, 8, "bfloat16") == direct[2]
    assert gpu_choice.choose(70, 4, 8, "bfloat16") == direct[2]
    assert gpu_choice.choose(60, 4, 8, target_id="cuda-sm_80") == gpu_choice.rule(60, 4, 8)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_what_is_not_computed_is_seen(run, gpu_machine, value):
    for config in candidates(SMALL)[1:]:
        gpu_machine.spoil[label(config)] = lambda out: torch.full_like(out, value)
        gpu_machine.cost[label(config)] = 1e-4
    gpu_session.race(replace(run, sizes=(SMALL,)), resume=False)
    (entry,) = table(run)
    assert entry["config"] == candidates(SMALL)[0].to_json() and len(entry["refused"]) == len(candidates(SMALL)) - 1


def test_nothing_valid_is_an_error_with_the_first_reason_and_other_sizes_are_kept(run, gpu_machine, capsys):
    def broken(out):
        raise RuntimeError("the launch failed")

    for config in candidates(SMALL):
        gpu_machine.spoil[label(config)] = broken
    with pytest.raises(TuningError, match="No candidate of float32-m4-d8-n64 .* RuntimeError: the launch failed"):
        gpu_session.race(run, resume=False)
    assert [entry["dtype"] for entry in table(run)] == ["bfloat16"]
    assert main(options(run)) == 1
    assert "No candidate of float32-m4-d8-n64" in capsys.readouterr().err


def options(run):
    return ["--race-only", "--target", "sm_90", "--lengths", "64", "--features", "4", "--head-dim", "8", *common(run)]


def common(run):
    return ["--dtypes", "float32", "--seconds", "60", "--work-dir", str(run.work.directory), "--logs", str(run.logs)]


def test_results_are_protected_and_resumed(run, gpu_machine, capsys):
    assert main(options(run)) == 0
    raced = len(gpu_machine.raced)
    assert main(options(run)) == 1 and "Add --resume" in capsys.readouterr().err
    assert main([*options(run), "--resume"]) == 0 and len(gpu_machine.raced) == raced
    assert len(table(run)) == 1


def test_an_interrupt_keeps_what_is_finished(run, gpu_machine, monkeypatch):
    measure = gpu_measure.measure

    def interrupted(size, artefacts, seconds):
        if size == HALF:
            raise KeyboardInterrupt
        return measure(size, artefacts, seconds)

    monkeypatch.setattr(gpu_measure, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_session.race(run, resume=False)
    assert [entry["dtype"] for entry in table(run)] == ["float32"]
    monkeypatch.setattr(gpu_measure, "measure", measure)
    raced = len(gpu_machine.raced)
    gpu_session.race(run, resume=True)
    assert [entry["dtype"] for entry in table(run)] == ["bfloat16", "float32"]
    assert len(gpu_machine.raced) == raced + len(candidates(HALF))


def test_a_candidate_that_breaks_the_context_is_left_out_from_then_on(run, gpu_machine, monkeypatch):
    broken = label(candidates(SMALL)[1])

    def lost(name, reason):
        raise gpu_measure.GpuLostError(name, reason)

    def fault(out):
        raise RuntimeError("an illegal memory access was encountered")

    gpu_machine.spoil[broken] = fault
    monkeypatch.setattr(gpu_measure, "_raise_if_lost", lost)
    with pytest.raises(TuningError, match=f"{broken} broke .* illegal memory access.* --resume"):
        gpu_session.race(run, resume=False)
    gpu_session.race(run, resume=True)
    entry = table(run)[1]
    assert [each["name"] for each in entry["refused"]] == [broken]
    assert gpu_machine.raced.count(broken) == 1


def test_sizes_that_are_left_when_time_is_up_stay_for_later(run, monkeypatch, capsys):
    with pytest.raises(TuningError, match="No size was raced within 0 seconds"):
        gpu_session.race(replace(run, seconds=0.0), resume=False)
    assert "2 sizes are left for --resume" in capsys.readouterr().out


def test_another_gpu_or_none_is_an_error(run, gpu_machine, monkeypatch):
    gpu_machine.machine["compute_capability"] = "8.0"
    with pytest.raises(TuningError, match="expected sm_90, got Fake H100, sm_80.*--target sm_80"):
        gpu_session.race(run, resume=False)
    monkeypatch.setattr(bench_cuda_machine, "obstacle", lambda with_plot: "there is no GPU")
    with pytest.raises(TuningError, match="Cannot race here: there is no GPU"):
        gpu_session.race(run, resume=False)


def test_building_keeps_reasons_and_what_is_there(tmp_path, monkeypatch):
    work, (right, wrong, *_) = Work(tmp_path / "work"), candidates(Size("float32", 512, 32, 64))
    artefact = tmp_path / "artefact"
    artefact.mkdir()
    for name in ("lib.so", "manifest.json"):
        (artefact / name).write_text('{"library": {"file": "lib.so"}}')

    def compile_operator(config, target):
        assert target.architectures == ("sm_90",)
        if config == wrong:
            raise BuildError("Kernels spill registers:\n  attention")
        return artefact

    monkeypatch.setattr(gpu_builder.compiling, "compile_operator", compile_operator)
    monkeypatch.setattr(gpu_builder.cuda, "pack_runtime", lambda directory: None)
    assert work.failure(right, TARGET.id) == NOT_BUILT
    only = replace(TARGET, architectures=("sm_90",))
    assert gpu_builder._build(right, only, work) == "" == work.failure(right, TARGET.id)
    assert gpu_builder._build(wrong, only, work) == "Kernels spill registers: attention"
    assert work.failure(wrong, TARGET.id) == "Kernels spill registers: attention"
    # both are known, so no process is asked
    gpu_builder.build_candidates([right, wrong], TARGET, work, 1, lambda *each: pytest.fail(str(each)))


def _die(*_):
    os._exit(1)


def test_a_killed_process_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_builder, "_build", _die)
    monkeypatch.setattr(gpu_builder.cuda, "pack_runtime", lambda directory: None)
    with pytest.raises(TuningError, match="ended from outside.*run the same command again"):
        gpu_builder.build_candidates(candidates(SMALL), TARGET, Work(tmp_path), 1, lambda *each: None)
