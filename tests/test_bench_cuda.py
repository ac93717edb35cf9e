"""The benchmark on GPUs, run on the CPU: a plain operator in the place of the compiled one, and a fake clock."""

from __future__ import annotations

import functools
import json
import sys
import types

import numpy as np
import pytest

from rpe_tvm import (
    bench_cuda,
    bench_cuda_clock,
    bench_cuda_machine,
    bench_cuda_reference,
    bench_cuda_rows,
    bench_peers,
    bench_problem,
    bench_turns,
)
from rpe_tvm.bench_cuda_clock import Failure, Probe
from rpe_tvm.bench_peers import GPU_PEERS
from rpe_tvm.cli import main

torch = pytest.importorskip("torch")
from rpe_tvm import peers  # noqa: E402  (needs torch)

SMALL = {"heads": 2, "num_features": 4, "head_dim": 8, "seconds": 0.0}
OPTIONS = "--heads 2 --features 4 --head-dim 8 --seconds 0 --lengths 16,33"
COMMAND = ["bench", "--target", "cuda", *OPTIONS.split()]


class FakeClock:
    """A GPU that takes `cost` of each call, and `launch` to start one; its events read the time when they are met."""

    def __init__(self):
        self.now = 0.0

    def new_event(self):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return 1e3 * (later.at - self.at)

        return Event()

    def call(self, cost, log=None, name=""):
        def call():
            self.now += cost
            if log is not None:
                log.append(name)
            return name

        return call


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(bench_cuda_clock, "new_event", fake.new_event)
    return fake


@pytest.fixture
def gpu(monkeypatch, clock):
    """The CPU in the place of a GPU; each call of any contestant takes 1 ms. `spoil` changes the operator's results."""
    state = types.SimpleNamespace(spoil=lambda out, call: out, calls=0, cost=1e-3, flex_cost=lambda n: 0.0)

    def kernelized_attention(query, key, value, rpe_bias, *, feature_map, is_causal=False):
        state.calls += 1
        clock.now += state.cost
        q, k, v = (x.float() for x in (query, key, value))
        out = peers.torch_fft_attention(q, k, v, rpe_bias, feature_map.projection, is_causal=is_causal, chunk=2)
        return state.spoil(out.to(query.dtype), state.calls)

    module = types.ModuleType("rpe_tvm.torch")
    module.NPRF = lambda projection: types.SimpleNamespace(projection=projection)
    module.kernelized_attention = kernelized_attention
    config = types.SimpleNamespace(description="fft 8.8")
    module.dispatch = types.SimpleNamespace(get_gpu_operator=lambda *size: types.SimpleNamespace(config=config))
    monkeypatch.setitem(sys.modules, "rpe_tvm.torch", module)
    monkeypatch.setattr(sys.modules["rpe_tvm"], "torch", module, raising=False)

    def timed(call):
        def result(*args, **kwargs):
            clock.now += 2e-3
            return call(*args, **kwargs)

        return result

    def flex_with_bias(q, k, v, b, *, is_causal):
        mask = peers.bias_mask(b.to(q.dtype), q.shape[2], k.shape[2], is_causal=is_causal)

        def call():
            clock.now += state.flex_cost(q.shape[2])
            return peers.sdpa_with_bias(q, k, v, mask)

        return call

    for name in ("sdpa", "sdpa_with_bias"):
        monkeypatch.setattr(peers, name, timed(getattr(peers, name)))
    fft = peers.torch_fft_attention
    monkeypatch.setattr(peers, "torch_fft_attention", lambda *args, **kwargs: timed(fft)(*args, **kwargs))
    monkeypatch.setattr(peers, "flex_with_bias", flex_with_bias)
    monkeypatch.setattr(peers, "by_cudnn", lambda call: no_cudnn())
    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda_clock, "free_bytes", lambda: 2**30)

    def probe(call):
        (seconds,), output = bench_cuda_clock.time_calls(call, 1, untimed=0)
        return Probe(seconds, 3 * output.numel() * output.element_size())

    monkeypatch.setattr(bench_cuda_clock, "probe", probe)

    def graph_seconds(call):
        (seconds,), output = bench_cuda_clock.time_calls(call, 1, untimed=0)
        return seconds / 4, output

    monkeypatch.setattr(bench_cuda_clock, "graph_seconds", graph_seconds)
    monkeypatch.setattr(bench_cuda_machine, "obstacle", lambda with_plot: None)
    monkeypatch.setattr(bench_cuda_machine, "gpu_name", lambda: "Fake GPU")
    monkeypatch.setattr(bench_cuda_machine, "environment", lambda: {"name": "Fake GPU", "cuda": "13.0"})
    return state


def uncompiled(function, compile_=torch.compile, **options):
    """FlexAttention as it is, which then compiles what it needs inside."""
    return function if function.__name__ == "flex_attention" else compile_(function, **options)


def no_cudnn():
    raise RuntimeError("No available\nkernel.")


# ------------------------------------------------------------------------------------------------ clock


def test_calls_are_timed_one_by_one_behind_untimed_ones(clock):
    costs = iter([9.0, 1.0, 2.0, 3.0])

    def call():
        clock.now += next(costs)
        return clock.now

    times, output = bench_cuda_clock.time_calls(call, 3)
    assert times == pytest.approx([1.0, 2.0, 3.0]) and output == 15.0


def test_contestants_take_turns_and_slow_ones_run_three_times(clock):
    log = []
    costs = {"quick": 0.001, "middle": 0.1, "slow": 7.0}
    calls = {name: clock.call(cost, log, name) for name, cost in costs.items()}
    turns = bench_cuda_clock.take_turns(calls, costs, seconds=3.0)
    assert turns.output == "quick" and turns.failures == {}
    assert turns.times["slow"] == pytest.approx([7.0] * 3)
    assert turns.times["middle"] == pytest.approx([0.1] * len(turns.times["middle"]))
    # each has a share of a second; the untimed calls of the quick one come besides
    assert 1.0 <= sum(turns.times["middle"]) < 1.2 and 1.0 <= sum(turns.times["quick"]) < 1.2
    assert log.count("slow") == 3 and log.count("middle") == len(turns.times["middle"])
    assert log[:24] == ["quick"] * 21 + ["middle", "slow", "quick"]


def test_a_contestant_that_fails_takes_no_more_turns(clock):
    calls = {"first": clock.call(1.0), "broken": no_cudnn, "last": clock.call(1.0)}
    turns = bench_cuda_clock.take_turns(calls, dict.fromkeys(calls, 1.0), seconds=0.0)
    assert turns.failures == {"broken": "RuntimeError: No available kernel."}
    assert turns.times == {"first": [1.0] * 3, "broken": [], "last": [1.0] * 3}
    with pytest.raises(RuntimeError, match="No available"):
        bench_cuda_clock.take_turns({"first": no_cudnn}, {"first": 1.0}, seconds=0.0)


def test_a_failure_is_a_reason_of_one_line():
    assert bench_cuda_clock.attempt(lambda: 3) == 3
    assert bench_cuda_clock.attempt(no_cudnn) == Failure("RuntimeError: No available kernel.")
    assert bench_cuda_clock.attempt(lambda: np.zeros(2)[5]).reason.startswith("IndexError: index 5")


# ------------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize("is_causal", [False, True])
def test_flex_attention_has_the_bias_of_the_mask(is_causal, monkeypatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    n = 130  # more than a block, and no multiple of it
    inputs = bench_problem.make_inputs(n, 2, 4, 16)
    got = peers.flex_with_bias(inputs.query, inputs.key, inputs.value, inputs.rpe_bias, is_causal=is_causal)()
    rows = np.arange(n)
    expected = bench_problem.softmax_rows(rows, inputs, is_causal, with_bias=True)
    assert bench_turns.relative_error(got, rows, expected) < 1e-6


def test_cudnn_alone_is_allowed_within_its_call():
    seen = []

    def call():
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return torch.zeros(1)

    peers.by_cudnn(call)
    assert seen == [(True, False)] and torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_compute_in_their_own_dtype(dtype, monkeypatch):
    monkeypatch.setattr(torch, "compile", uncompiled)
    inputs = bench_problem.make_inputs(40, 2, 4, 16).to("cpu", dtype)
    rows = np.arange(40)
    calls, skipped = bench_peers.gpu_peer_calls(inputs, False, 2**30)
    assert set(calls) == set(GPU_PEERS) and skipped == {}
    limit = 3e-6 if dtype == torch.float32 else 5e-3
    for name in ("torch_fft", "torch_fft_by_feature", "sdpa", "sdpa_bias", "flex_bias"):
        out = calls[name]()
        if name.startswith("torch_fft"):
            expected = bench_problem.expected_rows(rows, inputs, False)
        else:
            expected = bench_problem.softmax_rows(rows, inputs, False, with_bias=name != "sdpa")
        assert out.dtype == dtype
        assert bench_turns.relative_error(out, rows, expected) < limit
    _, skipped = bench_peers.gpu_peer_calls(inputs, False, 1000)
    assert set(skipped) == {"torch_fft", "sdpa_bias", "sdpa_bias_cudnn"}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 63, 300])
def test_rows_in_torch_are_those_of_the_reference(n, is_causal):
    inputs = bench_problem.make_inputs(n, 2, 5, 7)
    rows = bench_turns.sample_rows(n)
    got = bench_cuda_reference.attention_rows(rows, inputs, is_causal)
    np.testing.assert_allclose(got, bench_problem.expected_rows(rows, inputs, is_causal), rtol=1e-10, atol=1e-12)
    for with_bias in (False, True):
        got = bench_cuda_reference.softmax_rows(rows, inputs, is_causal, with_bias)
        expected = bench_problem.softmax_rows(rows, inputs, is_causal, with_bias)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------ run


@pytest.mark.parametrize("is_causal", [False, True])
def test_run(gpu, is_causal):
    seen = []
    rows = bench_cuda.run(
        [1, 70], **SMALL, is_causal=is_causal, describe=lambda n, dtype: f"{n} {dtype}", on_row=seen.append
    )
    assert rows == seen
    assert [row.algorithm for row in rows] == ["1 float32", "1 bfloat16", "70 float32", "70 bfloat16"]
    for row in rows:
        assert [peer.name for peer in row.peers] == list(GPU_PEERS)
        peers_of = {peer.name: peer for peer in row.peers}
        assert peers_of["sdpa_bias_cudnn"].skipped == "RuntimeError: No available kernel."
        assert row.operator.ms > 1.0 and row.operator.graph_ms == pytest.approx(row.operator.ms / 4)
        assert row.ratio("sdpa") == pytest.approx(2.0 / row.operator.ms) and row.ratio("sdpa_bias_cudnn") is None
        assert peers_of["sdpa"].graph_ms == pytest.approx(0.5) and peers_of["flex_bias"].graph_ms is None
        size = 2 if row.dtype == "bfloat16" else 4
        output = 2 * row.n * 8 * size
        data = 4 * output + 4 * (2 * (2 * row.n - 1) + 4 * 8)
        assert row.memory(row.operator) == pytest.approx((data + 2 * output) / data)
        limit = 1e-4 if row.dtype == "float32" else 5e-3
        assert row.operator.error <= 2 * row.torch_fft_error + bench_turns.ERROR_FLOOR
        assert max(row.operator.error, *(peer.error or 0 for peer in row.peers)) < limit
    assert bench_cuda.run([5], ["float32"], **SMALL)[0].algorithm == "-"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, call: out * 1.01,
        lambda out, call: out.index_fill(2, torch.tensor(out.shape[2] - 1), torch.nan),
        lambda out, call: out if call < 3 else out + 0.01,  # right when checked, wrong in a graph
        lambda out, call: out if call < 4 else out * torch.nan,  # wrong when timed
    ],
    ids=["1% off", "one NaN row", "wrong in a graph", "NaN later"],
)
def test_a_wrong_result_has_no_speed(gpu, spoil, dtype, capsys, tmp_path):
    gpu.spoil = spoil
    with pytest.raises(bench_turns.WrongResultError, match=f"Wrong result of rpe_tvm at n=50, {dtype}"):
        bench_cuda.run([50], [dtype], **SMALL)
    gpu.calls = 0
    assert main([*COMMAND, "--dtypes", dtype, "--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2:] == bench_cuda_rows.table_header().splitlines()  # no row
    assert f"error: Wrong result of rpe_tvm at n=16, {dtype}" in printed.err
    assert not list(tmp_path.iterdir())


def test_a_wrong_peer_has_no_speed_and_is_no_yardstick(gpu, monkeypatch):
    right = peers.torch_fft_attention

    def wrong(*args, chunk=None, **kwargs):
        return right(*args, chunk=chunk, **kwargs) * (1.05 if chunk is None else 1.0)

    monkeypatch.setattr(peers, "torch_fft_attention", wrong)
    row = bench_cuda.run([50], ["float32"], **SMALL)[0]
    assert row.peers[0].ms is None and "Wrong result of torch.fft at n=50, float32" in row.peers[0].skipped
    assert row.torch_fft_error == row.peers[1].error
    monkeypatch.setattr(peers, "torch_fft_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)
    with pytest.raises(bench_turns.WrongResultError, match="Cannot check rpe_tvm at n=50, float32"):
        bench_cuda.run([50], ["float32"], **SMALL)


def test_slow_peers_are_foreseen(gpu):
    called = set()

    def flex_cost(n):
        called.add(n)
        return 0.3 * (n / 50) ** 2

    gpu.flex_cost = flex_cost
    rows = bench_cuda.run([50, 100, 40], ["float32"], **SMALL)
    found = [{peer.name: peer for peer in row.peers}["flex_bias"] for row in rows]
    assert found[0].ms == pytest.approx(302.0) and found[2].ms == pytest.approx(194.0)
    assert found[1].skipped == "a call takes about 1.2 s, longer than the 0 s of --seconds"
    assert called == {50, 40}
    assert bench_cuda.foreseen({("float32", "torch_fft"): (50, 0.2)}, "float32", "torch_fft", 100) == 0.4
    assert bench_cuda.foreseen({("float32", "flex_bias"): (50, 0.2)}, "float32", "flex_bias", 801) == 0.0
    assert bench_cuda.foreseen({}, "float32", "flex_bias", 100) == 0.0


# ------------------------------------------------------------------------------------------------ output


def test_command_writes_table_json_and_plot(gpu, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    json_file, plot_file = tmp_path / "out.json", tmp_path / "out.svg"
    assert main([*COMMAND, "--json", str(json_file), "--plot", str(plot_file), "--causal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Fake GPU; float32, bfloat16, 2 heads, m=4, d=8, causal"
    assert lines[2:4] == bench_cuda_rows.table_header().splitlines()
    headings, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[2], *lines[4:8]))
    assert {len(line) for line in cells} == {len(headings)}
    assert [line[:3] for line in cells] == [
        *(["16", "float32", "fft 8.8"], ["16", "bfloat16", "fft 8.8"]),
        *(["33", "float32", "fft 8.8"], ["33", "bfloat16", "fft 8.8"]),
    ]
    first = dict(zip(headings, cells[0], strict=True))
    assert first["SDPA + bias, cuDNN ms (ratio)"] == "-"
    assert first["SDPA ms (ratio)"].startswith("2 (")
    note = "n=16, float32: SDPA + bias, cuDNN skipped: RuntimeError: No available kernel."
    assert lines[8] == note and lines[-2:] == [f"measurement: {json_file}", f"plot: {plot_file}"]

    document = json.loads(json_file.read_text())
    assert document["gpu"]["name"] == "Fake GPU" and "commit" in document and document["cpu"]
    assert document["settings"] == {
        **{"target": "cuda", "lengths": [16, 33], "heads": 2, "features": 4, "head_dim": 8, "seconds": 0.0},
        **{"causal": True, "feature_map": "nprf", "dtype": "float32, bfloat16"},
    }
    assert len(document["rows"]) == 4
    row = document["rows"][0]
    assert row["peers"]["sdpa"]["ratio"] == pytest.approx(row["peers"]["sdpa"]["ms"] / row["ms"])
    assert row["peers"]["sdpa_bias_cudnn"]["skipped"] and row["memory"] > 1 and row["graph_ms"] > 0
    drawn = plot_file.read_text()
    assert drawn.count("<!-- rpe_tvm -->") == 2 and all(f"<!-- {dtype} -->" in drawn for dtype in bench_cuda.DTYPES)


def test_a_run_that_ends_early_leaves_its_rows(gpu, capsys, tmp_path):
    gpu.spoil = lambda out, call: out * torch.nan if out.shape[2] == 33 else out
    assert main([*COMMAND, "--dtypes", "float32", "--json", str(tmp_path / "out.json")]) == 1
    assert "Wrong result of rpe_tvm at n=33" in capsys.readouterr().err
    assert [row["n"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [16]


@pytest.mark.parametrize("error", [ValueError("too long"), torch.OutOfMemoryError("too large")])
def test_what_the_operator_cannot_do_ends_the_run_with_a_message(gpu, error, capsys):
    def refuse(out, call):
        raise error

    gpu.spoil = refuse
    assert main(COMMAND) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error}"


def test_a_call_that_cannot_be_captured_says_so(gpu, monkeypatch):
    monkeypatch.setattr(bench_cuda_clock, "graph_seconds", lambda call: no_cudnn())
    row = bench_cuda.run([20], ["float32"], **SMALL)[0]
    assert row.operator.graph_ms is None and row.operator.ms > 0
    assert "n=20, float32: rpe_tvm not in a CUDA graph: RuntimeError: No available kernel." in bench_cuda_rows.notes(
        [row]
    )
    monkeypatch.setattr(bench_cuda, "LONGEST_GRAPH", 10)
    row = bench_cuda.run([20], ["float32"], **SMALL)[0]
    assert row.operator.graph_ms is None and row.operator.graph_skipped is None


# ------------------------------------------------------------------------------------------------ command line


def test_options(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_cuda, "main", lambda args, describe: seen.append(args) or 0)
    assert main(["bench", "--target", "cuda"]) == 0
    assert main(["bench", "--target", "cuda", "--dtypes", "bfloat16", "--lengths", "7", "--heads", "3"]) == 0
    first, second = seen
    assert (first.lengths, first.dtypes, first.heads) == ((1024, 2048, 4096, 16384, 65536), bench_cuda.DTYPES, 8)
    assert (first.features, first.head_dim, first.causal, first.seconds) == (32, 64, False, 4.0)
    assert (second.lengths, second.dtypes, second.heads) == ((7,), ("bfloat16",), 3)
    for wrong, message in (
        (["--target", "cuda", "--dtypes", "float64"], "expected float32 or bfloat16, got 'float64'"),
        (["--target", "cuda", "--op", "toeplitz", "--mode", "train"], "toeplitz has no --mode train"),
        (["--target", "cuda", "--op", "toeplitz", "--dtypes", "bfloat16"], "expected float32 for --op toeplitz"),
        (["--target", "cuda", "--threads", "2"], "argument --threads: expected --target x86"),
        (["--dtypes", "bfloat16"], "argument --dtypes: expected --target cuda for bfloat16"),
    ):
        with pytest.raises(SystemExit) as status:
            main(["bench", *wrong])
        assert status.value.code == 2 and message in capsys.readouterr().err
    assert len(seen) == 2


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(COMMAND) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: target cuda needs an NVIDIA GPU that PyTorch can use; PyTorch ")
    monkeypatch.setattr(bench_cuda_machine.bench_machine, "missing_package", lambda with_plot: "no matplotlib")
    assert main(COMMAND) == 1
    assert capsys.readouterr().err == "error: no matplotlib\n"


def test_the_driver_may_say_nothing(monkeypatch):
    says = functools.partial(bench_cuda_machine._driver_says, "GPU-0")
    monkeypatch.setattr(bench_cuda_machine.subprocess, "run", lambda *args, **options: (_ for _ in ()).throw(OSError()))
    assert set(says().values()) == {None}
    answer = types.SimpleNamespace(stdout="580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 120.00 W, 700.00 W\n")
    monkeypatch.setattr(bench_cuda_machine.subprocess, "run", lambda *args, **options: answer)
    assert says()["driver_version"] == "580.1" and says()["power.limit"] == "700.00 W"
    answer.stdout = "No devices were found\n"
    assert set(says().values()) == {None}


def test_nothing_of_it_needs_tvm(run_python):
    run_python(
        "import sys\nfor name in ('tvm', 'tqdm', 'psutil'): sys.modules[name] = None\n"
        "import rpe_tvm.bench_cuda\nfrom rpe_tvm.cli import main\n"
        "assert main(['bench', '--target', 'cuda', '--lengths', '8']) == 1\n",
        CUDA_VISIBLE_DEVICES="",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    x = torch.randn(2048, 2048, device="cuda")
    times, output = bench_cuda_clock.time_calls(lambda: x @ x, 5)
    assert len(times) == 5 and min(times) > 0 and torch.equal(output, x @ x)
    graph, replayed = bench_cuda_clock.graph_seconds(lambda: x @ x)
    assert 0 < graph < 1 and torch.equal(replayed, output)
    found = bench_cuda_clock.probe(lambda: x @ x)
    assert found.seconds > 0 and found.peak_bytes >= x.numel() * 4
    failed = bench_cuda_clock.attempt(lambda: torch.empty(2**50, device="cuda"))
    assert failed.reason.startswith("OutOfMemoryError") or "memory" in failed.reason
    assert bench_cuda_clock.free_bytes() > 0
    assert bench_cuda_machine.environment()["cuda"] == torch.version.cuda
