"""The benchmark of Toeplitz products on GPUs, run on the CPU: a plain operator in the place of the compiled one."""

from __future__ import annotations

import functools
import json
import sys
import types

import pytest

from rpe_tvm import bench_cuda_clock, bench_cuda_machine, bench_cuda_toeplitz, bench_turns
from rpe_tvm.bench_cuda_clock import Probe
from rpe_tvm.cli import main

torch = pytest.importorskip("torch")
from rpe_tvm import peers  # noqa: E402  (needs torch)

PEERS = ["torch.fft", "torch.fft contiguous"]
OPTIONS = "--op toeplitz --target cuda --lengths 5,40 --heads 2 --head-dim 3 --seconds 0"
COMMAND = ["bench", *OPTIONS.split()]


@pytest.fixture
def operator(monkeypatch):
    """The CPU in the place of a GPU; each call takes 1 ms. `spoil` changes the operator's results."""
    state = types.SimpleNamespace(spoil=lambda out, call: out, calls=0, now=0.0)

    class Event:
        def record(self):
            self.at = state.now

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return 1e3 * (later.at - self.at)

    def toeplitz_matmul(weights, x):
        state.calls += 1
        state.now += 1e-3
        return state.spoil(peers.torch_fft_toeplitz_contiguous(weights, x), state.calls)

    def probe(call):
        call()
        return Probe(1e-3, 1000)

    module = types.ModuleType("rpe_tvm.torch")
    module.toeplitz_matmul = toeplitz_matmul
    monkeypatch.setitem(sys.modules, "rpe_tvm.torch", module)
    monkeypatch.setattr(bench_cuda_toeplitz, "DEVICE", "cpu")
    monkeypatch.setattr(bench_cuda_clock, "new_event", Event)
    monkeypatch.setattr(bench_cuda_clock, "probe", probe)
    monkeypatch.setattr(bench_cuda_clock, "graph_seconds", lambda call: (5e-4, call()))
    monkeypatch.setattr(bench_cuda_machine, "obstacle", lambda with_plot: None)
    monkeypatch.setattr(bench_cuda_machine, "gpu_name", lambda: "GPU")
    monkeypatch.setattr(bench_cuda_machine, "environment", lambda: {"name": "GPU"})
    return state


def test_rows(operator):
    seen = []
    rows = bench_cuda_toeplitz.run([5, 40], heads=2, head_dim=3, seconds=0, on_row=seen.append)
    assert rows == seen and [(row.n, row.mode) for row in rows] == [
        (n, mode) for n in (5, 40) for mode in ("forward", "train")
    ]
    for row in rows:
        names = ["rpe_tvm", *PEERS, *(["dense matrix"] if row.mode == "forward" else [])]
        assert list(row.ms) == list(row.errors) == list(row.graph_ms) == list(row.peak_bytes) == names
        assert all(error < 1e-5 for error in row.errors.values()) and row.skipped == {}
        assert row.ms["rpe_tvm"] == pytest.approx(1.0) and row.graph_ms["rpe_tvm"] == pytest.approx(0.5)
    assert rows[0].data_bytes == 4 * (2 * 9 + 2 * 2 * 5 * 3) and rows[1].data_bytes == 4 * (2 * 2 * 9 + 4 * 2 * 5 * 3)


def test_the_matrix_and_graphs_are_for_short_sequences(operator, monkeypatch):
    monkeypatch.setattr(bench_cuda_toeplitz, "LONGEST_DENSE", 5)
    monkeypatch.setattr(bench_cuda_toeplitz, "LONGEST_GRAPH", 5)
    rows = bench_cuda_toeplitz.run([6], heads=2, head_dim=3, seconds=0)
    assert list(rows[0].ms) == ["rpe_tvm", *PEERS] and rows[0].graph_ms == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, call: out * 1.01,
        lambda out, call: out * torch.nan,
        lambda out, call: out if call < 4 else out + 0.1,  # right when checked and in the graph, wrong when timed
    ],
    ids=["1% off", "NaN", "wrong later"],
)
def test_a_wrong_result_has_no_speed(operator, spoil, capsys):
    operator.spoil = spoil
    assert main(COMMAND) == 1
    printed = capsys.readouterr()
    assert "Wrong result of rpe_tvm at n=5, forward" in printed.err and " ms" not in printed.out


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_gradient_has_no_speed(operator, monkeypatch, which):
    step = bench_cuda_toeplitz._step

    def spoilt(product, *tensors):
        gradients = list(step(product, *tensors))
        if product not in (peers.torch_fft_toeplitz, peers.torch_fft_toeplitz_contiguous):
            gradients[which] = gradients[which] * 1.01
        return gradients

    monkeypatch.setattr(bench_cuda_toeplitz, "_step", spoilt)
    with pytest.raises(bench_turns.WrongResultError, match="rpe_tvm at n=5, train"):
        bench_cuda_toeplitz.run([5], heads=2, head_dim=3, seconds=0)


def test_peers(operator, monkeypatch, capsys):
    def fails(weights, x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_cuda_clock, "attempt", functools.partial(_attempt))
    monkeypatch.setattr(peers, "torch_fft_toeplitz_contiguous", fails)
    operator_of_peers = peers.torch_fft_toeplitz
    sys.modules["rpe_tvm.torch"].toeplitz_matmul = lambda weights, x: operator_of_peers(weights, x)
    (row, _) = bench_cuda_toeplitz.run([5], heads=2, head_dim=3, seconds=0)
    assert row.skipped == {"torch.fft contiguous": "out of memory"} and "torch.fft contiguous" not in row.ms
    monkeypatch.setattr(peers, "torch_fft_toeplitz", lambda weights, x: torch.zeros_like(x))
    with pytest.raises(bench_turns.WrongResultError, match=r"Wrong result of torch\.fft at n=5"):
        bench_cuda_toeplitz.run([5], heads=2, head_dim=3, seconds=0)


def _attempt(call):
    try:
        return call()
    except RuntimeError as error:
        return bench_cuda_clock.Failure(str(error))


def test_command(operator, capsys, tmp_path):
    file = tmp_path / "out.json"
    assert main([*COMMAND, "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 heads, d=3" in lines[0] and [line.split()[:2] for line in lines[2:4]] == [
        ["5", "forward"],
        ["5", "train"],
    ]
    document = json.loads(file.read_text())
    assert document["benchmark"] == "toeplitz-cuda" and document["settings"]["head_dim"] == 3
    assert set(document["rows"][0]["ratios"]) == {*PEERS, "dense matrix"} and document["gpu"] == {"name": "GPU"}


def test_default_lengths(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_cuda_toeplitz, "main", lambda args: seen.append(args.lengths) or 0)
    assert main(["bench", "--op", "toeplitz", "--target", "cuda"]) == 0
    assert seen == [bench_cuda_toeplitz.LENGTHS]
