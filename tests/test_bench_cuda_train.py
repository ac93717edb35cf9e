"""The benchmark of training on GPUs, with the CPU in the place of one: what is checked, timed, written and skipped."""

from __future__ import annotations

import json
import time
import types

import pytest

from rpe_tvm import bench_cuda_clock, bench_cuda_machine, bench_cuda_train, bench_train_steps, peers
from rpe_tvm.bench_cuda_clock import Failure, Probe
from rpe_tvm.bench_turns import WrongResultError
from rpe_tvm.cli import main

COMMAND = ["bench", "--target", "cuda", "--mode", "train", "--lengths", "20", "--heads", "2", "--seconds", "0.01"]
COMMAND += ["--features", "4", "--head-dim", "4"]


@pytest.fixture
def gpu(monkeypatch):
    """`spoil` changes the operator's gradient of the bias; a step takes two units of time, a forward pass one."""
    state = types.SimpleNamespace(spoil=lambda out: out, free=2**30)

    def attention(name, inputs, is_causal):
        def attend():
            q, k, v = (x.float() for x in inputs.learned[:3])
            out = peers.torch_fft_attention(q, k, v, inputs.rpe_bias, inputs.projection, is_causal=is_causal, chunk=1)
            return state.spoil(out.to(inputs.query.dtype)) if name == bench_train_steps.OPERATOR else out

        return attend

    def timed(call):
        start = time.perf_counter()
        output = call()
        return max(time.perf_counter() - start, 1e-6), output

    def take_turns(steps, estimates, seconds):
        done = {name: timed(step) for name, step in steps.items()}
        times = {name: [each[0]] for name, each in done.items()}
        return bench_cuda_clock.Turns(times, done[bench_train_steps.OPERATOR][1], {})

    monkeypatch.setattr(bench_train_steps, "_attention", attention)
    monkeypatch.setattr(bench_cuda_train, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda_clock, "probe", lambda call: Probe(timed(call)[0], 2**20))
    monkeypatch.setattr(bench_cuda_clock, "graph_seconds", timed)
    monkeypatch.setattr(bench_cuda_clock, "free_bytes", lambda: state.free)
    monkeypatch.setattr(bench_cuda_clock, "take_turns", take_turns)
    monkeypatch.setattr(bench_cuda_machine, "obstacle", lambda with_plot: None)
    monkeypatch.setattr(bench_cuda_machine, "gpu_name", lambda: "Fake GPU")
    monkeypatch.setattr(bench_cuda_machine, "environment", lambda: {"name": "Fake GPU"})
    monkeypatch.setattr("rpe_tvm.cli._describe_gpu_training", lambda args, n, dtype: "fft 8.8, fft 8.8")
    return state


@pytest.mark.parametrize("causal", [[], ["--causal"]])
def test_table_and_file(gpu, capsys, tmp_path, causal):
    path = tmp_path / "train.json"
    assert main([*COMMAND, *causal, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Fake GPU; forward and backward" in printed and "fft 8.8, fft 8.8" in printed
    written = json.loads(path.read_text())
    assert [row["dtype"] for row in written["rows"]] == ["float32", "bfloat16"]
    for row in written["rows"]:
        assert row["step_over_forward"] == pytest.approx(row["graph_ms"] / row["forward_graph_ms"])
        assert set(row["peers"]) == set(bench_train_steps.PEERS)
        assert max(row["errors"].values()) < (1e-4 if row["dtype"] == "float32" else 0.05)


def test_without_room_a_peer_is_skipped_with_the_reason(gpu, capsys):
    gpu.free = 2**20
    assert main(COMMAND) == 0
    assert "SDPA + bias skipped: needs about 0 GiB, 0 are free" in capsys.readouterr().out


def test_without_a_graph_the_ratio_is_that_of_calls(gpu, monkeypatch):
    monkeypatch.setattr(bench_cuda_clock, "attempt", lambda call: Failure("no graph"))
    (row,) = bench_cuda_train.run((20,), ("float32",), 2, 4, 4, 0.01)
    assert row.graph_ms is None and row.step_over_forward == row.ms / row.forward_ms
    assert set(row.peers.values()) == {"no graph"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_speed_of_a_wrong_gradient(gpu, dtype):
    def twice_the_gradient(out):
        return (out - 0.5 * out.detach()) * 2

    gpu.spoil = twice_the_gradient
    with pytest.raises(WrongResultError, match=rf"n=20, {dtype}, gradient of query"):
        bench_cuda_train.run((20,), (dtype,), 2, 4, 4, 0.01)


def test_options(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_cuda_train, "main", lambda args, describe: seen.append(args) or 0)
    assert main(["bench", "--target", "cuda", "--mode", "train"]) == 0
    assert (seen[0].lengths, seen[0].heads) == (bench_cuda_train.LENGTHS, 8)
    with pytest.raises(SystemExit):
        main(["bench", "--target", "cuda", "--mode", "train", "--plot", "x.png"])
    assert "argument --plot: expected --mode forward" in capsys.readouterr().err
