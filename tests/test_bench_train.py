"""The benchmark of training, on a plain operator in the place of the compiled one."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from rpe_tvm import (
    bench_machine,
    bench_train,
    bench_train_memory,
    bench_train_reference,
    bench_train_steps,
    bench_turns,
    reference,
)
from rpe_tvm.bench_train_steps import OPERATOR, PARTS, PEERS, Size
from rpe_tvm.cli import main

torch = pytest.importorskip("torch")
from rpe_tvm import peers  # noqa: E402  (needs torch)

SMALL = {"heads": 2, "num_features": 4, "head_dim": 8, "threads": 1, "seconds": 0.0}
COMMAND = [
    "bench",
    "--mode",
    "train",
    "--lengths",
    "16,33",
    "--heads",
    "2",
    "--features",
    "4",
    "--head-dim",
    "8",
    "--threads",
    "1",
    "--seconds",
    "0",
]


@pytest.fixture
def operator(monkeypatch):
    """A plain operator; `spoil` changes its gradient of tensor `of`, `spoil_forward` its output in inference."""
    monkeypatch.setattr(bench_turns, "TURN_SECONDS", 0.0)  # one call in a turn
    state = types.SimpleNamespace(
        of="query", spoil=lambda gradient, step: gradient, spoil_forward=lambda out: out, steps=0, threads=set()
    )

    def kernelized_attention(query, key, value, rpe_bias, *, feature_map, is_causal=False):
        tensors = {"query": query, "key": key, "value": value, "rpe_bias": rpe_bias}
        state.threads.add(torch.get_num_threads())
        if torch.is_grad_enabled():
            state.steps += 1
            step = state.steps
            tensors[state.of] = tensors[state.of].clone()
            tensors[state.of].register_hook(lambda gradient: state.spoil(gradient, step))
        out = peers.torch_fft_attention(**tensors, projection=feature_map.projection, is_causal=is_causal, chunk=2)
        return out if torch.is_grad_enabled() else state.spoil_forward(out)

    module = types.ModuleType("rpe_tvm.torch")
    module.NPRF = lambda projection: types.SimpleNamespace(projection=projection)
    module.kernelized_attention = kernelized_attention
    module.describe = lambda n, num_features, head_dim: "direct"
    config = types.SimpleNamespace(description="fft 8x8")
    module.dispatch = types.SimpleNamespace(
        get_backward=lambda n, num_features, head_dim: types.SimpleNamespace(config=config)
    )
    monkeypatch.setitem(sys.modules, "rpe_tvm.torch", module)
    monkeypatch.setattr(sys.modules["rpe_tvm"], "torch", module, raising=False)
    return state


@pytest.fixture
def measured(monkeypatch):
    """Peak memory that is not measured: 10 bytes for each position and contestant before it in the list."""
    asked = []

    def measure(name, size, threads):
        asked.append((name, size.n, threads))
        return 10 * size.n * (1 + [OPERATOR, *PEERS].index(name))

    monkeypatch.setattr(bench_train_memory, "measure", measure)
    return asked


# ------------------------------------------------------------------------------------------------ reference


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [2, 33, 63])
def test_both_references_agree_with_the_dense_gradients(n, is_causal, monkeypatch):
    inputs = bench_train_steps.make_inputs(Size(n, 3, 5, 7))
    arrays = [x.detach().numpy() for x in (*inputs.learned, inputs.projection)]
    gradients = reference.attention_gradients(inputs.grad_out.numpy(), *arrays, "nprf", is_causal)
    expected = (reference.attention(*arrays, "nprf", is_causal)[2], *gradients[:4])
    dense = bench_train_reference.expected(inputs, is_causal)
    monkeypatch.setattr(bench_train_reference, "DENSE_LENGTH", 0)
    by_fft = bench_train_reference.expected(inputs, is_causal)
    for part, truth, first, second in zip(PARTS, expected, dense, by_fft, strict=True):
        assert first.dtype == second.dtype == torch.float64
        np.testing.assert_allclose(first, truth, rtol=1e-12, atol=1e-14, err_msg=part)
        scale = np.abs(truth).max()  # by FFT the first causal rows lose digits
        np.testing.assert_allclose(second, truth, rtol=0, atol=1e-10 * scale, err_msg=part)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [2, 63])
def test_the_gradient_of_softmax_attention_reaches_the_bias(n, is_causal):
    """The mask's gradient is summed along diagonals."""
    inputs = bench_train_steps.make_inputs(Size(n, 2, 4, 8))
    truth = bench_train_reference.expected_softmax(inputs, is_causal)
    for got, want in zip(bench_train_steps.step_of("sdpa_bias", inputs, is_causal)(), truth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6)
    mask = peers.bias_mask(inputs.rpe_bias.detach().double(), n, n, is_causal=is_causal).requires_grad_()
    q, k, v = (x.detach().double() for x in inputs.learned[:3])
    (of_mask,) = torch.autograd.grad(peers.sdpa_with_bias(q, k, v, mask), mask, inputs.grad_out.double())
    by_offset = [of_mask.diagonal(t, dim1=1, dim2=2).sum(-1) for t in range(1 - n, n)]
    torch.testing.assert_close(truth[4], torch.stack(by_offset, -1), rtol=1e-9, atol=1e-12)
    assert truth[4].abs().max() > 0


def test_a_reference_without_room_is_refused(operator, monkeypatch):
    monkeypatch.setattr(bench_train_reference, "DENSE_LENGTH", 10)
    monkeypatch.setattr(bench_machine, "free_bytes", lambda: 20_000)
    with pytest.raises(bench_train_reference.NoRoomError, match=r"n=11: .* needs about 0\.1 GiB .*--memory-lengths"):
        bench_train.run([11], **SMALL)
    assert operator.steps == 0


# ------------------------------------------------------------------------------------------------ run


@pytest.mark.parametrize("is_causal", [False, True])
def test_run(operator, is_causal):
    before = torch.get_num_threads()
    seen = []
    rows = bench_train.run([2, 70, 33], **SMALL, is_causal=is_causal, describe="n={}".format, on_row=seen.append)
    assert rows == seen
    assert [row.n for row in rows] == [2, 70, 33]
    assert [row.algorithms for row in rows] == ["n=2", "n=70", "n=33"]
    for row in rows:
        assert row.ms > 0 and row.forward_ms > 0 and row.rounds == bench_turns.MIN_ROUNDS
        assert [peer.name for peer in row.peers] == list(PEERS)
        assert all(row.ratio(peer.name) == peer.ms / row.ms > 0 and peer.skipped is None for peer in row.peers)
        assert tuple(row.errors) == tuple(row.torch_fft_errors) == PARTS
        assert all(0 < error < 1e-3 for error in row.errors.values())
    assert operator.threads == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("of", ["query", "key", "value", "rpe_bias"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda gradient, step: gradient * 1.01,
        lambda gradient, step: gradient.index_fill(-1, torch.tensor(3), torch.nan),
        lambda gradient, step: torch.zeros_like(gradient),
        lambda gradient, step: gradient if step == 1 else gradient + 0.01,  # right when checked, wrong when timed
    ],
    ids=["1% off", "NaN", "zeros", "wrong later"],
)
def test_a_wrong_gradient_has_no_speed(operator, of, spoil):
    operator.of, operator.spoil = of, spoil
    with pytest.raises(
        bench_turns.WrongResultError, match=f"Wrong result of rpe_tvm at n=50, gradient of {of}: expected a relative"
    ):
        bench_train.run([50], **SMALL)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_gradient_that_is_a_little_off_has_no_speed(operator, is_causal):
    operator.spoil = lambda gradient, step: gradient * 1.001
    with pytest.raises(bench_turns.WrongResultError, match="gradient of query"):
        bench_train.run([50], **SMALL, is_causal=is_causal)


def test_a_wrong_forward_pass_has_no_speed(operator):
    operator.spoil_forward = lambda out: out * 1.001
    with pytest.raises(bench_turns.WrongResultError, match="Wrong result of rpe_tvm at n=50, output"):
        bench_train.run([50], **SMALL)


@pytest.mark.parametrize("peer", ["torch_fft_attention", "sdpa_with_bias", "bias_mask"])
def test_a_wrong_peer_has_no_speed(operator, peer, monkeypatch):
    right = getattr(peers, peer)
    step = bench_train_reference.expected(bench_train_steps.make_inputs(Size(50, 2, 4, 8)), False)
    monkeypatch.setattr(bench_train_reference, "expected", lambda inputs, is_causal: step)
    monkeypatch.setattr(peers, peer, lambda *args, **kwargs: 1.05 * right(*args, **kwargs))
    with pytest.raises(bench_turns.WrongResultError, match=r"Wrong result of (torch\.fft|SDPA \+ bias) at n=50, "):
        bench_train.run([50], **SMALL)


def test_peers_without_room_are_skipped_and_say_so(operator, monkeypatch):
    monkeypatch.setattr(bench_machine, "free_bytes", lambda: 20_000)
    row = bench_train.run([100], **SMALL)[0]
    assert {peer.name for peer in row.peers if peer.ms is None} == set(PEERS)
    assert all(row.ratio(name) is None for name in PEERS)
    assert all(0 < error < 1e-5 for error in row.torch_fft_errors.values())  # made one head at a time
    assert bench_train.table_line(row).count(" - ") == 1 + 2 * len(PEERS)
    assert bench_train.notes([row])[0].startswith("n=100: torch.fft skipped: needs about 0.1 GiB of memory, 0.0")


def test_bad_sizes_are_refused(operator):
    with pytest.raises(ValueError, match="Invalid length: expected at least 2, got 1"):
        bench_train.run([16, 1], **SMALL)
    with pytest.raises(ValueError, match="Invalid heads: expected at least 1, got 0"):
        bench_train.run([16], **{**SMALL, "heads": 0})
    assert operator.steps == 0


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", PEERS)
def test_the_estimate_is_a_little_above_the_measured_memory(name):
    size = Size(1024, 2, 16, 32)
    arrays = {"torch_fft": 5 * 16 * 32 * 2048, "torch_fft_by_feature": 3 * 16 * 32 * 2048, "sdpa_bias": 2 * 1024**2}
    estimate = bench_train_steps.step_bytes(name, size)
    measured = bench_train_memory.measure(name, size, threads=1)
    assert 4 * size.heads * arrays[name] < measured < estimate


@pytest.mark.compile
def test_the_memory_of_the_operator_is_measured(monkeypatch):
    monkeypatch.setattr(bench_train_memory, "PEERS", {})  # the subject of the test above
    size = Size(60, 2, 8, 8)
    (found,) = bench_train_memory.peaks([size], threads=1, on_peaks=lambda each: None)
    gradients = 4 * 2 * (3 * 60 * 8 + 119)
    # far below what a compilation in that process would take
    assert gradients < found.of[0].bytes < 150 * 2**20


def test_a_failed_measurement_says_why():
    with pytest.raises(bench_train_memory.MemoryMeasurementError, match="(?s)unknown at n=4: .*KeyError: 'unknown'"):
        bench_train_memory.measure("unknown", Size(4, 1, 2, 3), threads=1)


def test_memory_that_does_not_fit_is_scaled(measured, monkeypatch):
    size = Size(4096, 4, 32, 64)
    room = {name: bench_train_steps.step_bytes(name, dataclasses.replace(size, n=1024)) for name in PEERS}
    monkeypatch.setattr(bench_machine, "free_bytes", lambda: int(room["torch_fft"] / bench_machine.MEMORY_SHARE) + 1)
    (found,) = bench_train_memory.peaks([size], threads=3, on_peaks=lambda each: None)
    peaks = {peak.name: peak for peak in found.of}
    assert measured[:3] == [(OPERATOR, 4096, 3), (OPERATOR, 4096, 3), ("torch_fft", 1024, 3)]
    assert peaks[OPERATOR] == bench_train_memory.Peak(OPERATOR, 40960, 4096)
    scale = bench_train_steps.step_bytes("torch_fft", size) / room["torch_fft"]
    assert 3 < scale < 4  # n times four, and a constant part
    assert peaks["torch_fft"] == bench_train_memory.Peak("torch_fft", round(scale * 20480), 1024)
    assert found.ratio("torch_fft") == peaks["torch_fft"].bytes / 40960
    assert bench_train.memory_line(found).split("|")[3].strip() == f"~{peaks['torch_fft'].bytes / 2**20:.0f}"
    assert bench_train.memory_notes([found])[0].startswith("n=4096: memory of torch.fft scaled from n=1024")


# ------------------------------------------------------------------------------------------------ command line


def test_command_writes_tables_json_and_plot(operator, measured, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    json_file, plot_file = tmp_path / "out.json", tmp_path / "out.png"
    assert main([*COMMAND, "--memory-lengths", "8", "--json", str(json_file), "--plot", str(plot_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("; forward and backward, float32, 2 heads, m=4, d=8, 1 thread")
    assert lines[2:4] == bench_train.table_header().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["16", "33"]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[7].startswith("Peak memory of one forward and backward")
    assert lines[9:11] == bench_train.memory_header().splitlines()
    assert [cell.strip() for cell in lines[11].split("|")[1:4:2]] == ["8", "0"]
    assert lines[12:] == [f"measurement: {json_file}", f"plot: {plot_file}"]

    document = json.loads(json_file.read_text())
    assert document["benchmark"] == "attention training" and document["threads"] == 1
    assert document["cpu"] and document["versions"]["torch"] and "commit" in document
    assert document["settings"]["mode"] == "train" and document["settings"]["memory_lengths"] == [8]
    for row in document["rows"]:
        assert row["algorithms"] == "direct, fft 8x8"
        assert row["step_over_forward"] == row["ms"] / row["forward_ms"]
        assert list(row["peers"]) == list(PEERS)
        assert all(peer["ratio"] == peer["ms"] / row["ms"] for peer in row["peers"].values())
        assert tuple(row["errors"]) == tuple(row["torch_fft_errors"]) == PARTS
    (memory,) = document["memory"]
    assert memory["n"] == 8 and memory["peaks"]["torch_fft"] == {"bytes": 160, "measured_n": 8, "ratio": 2.0}
    assert plot_file.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_prints_one_message_and_writes_nothing(operator, measured, capsys, tmp_path):
    operator.spoil = lambda gradient, step: -gradient
    assert main([*COMMAND, "--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2:] == bench_train.table_header().splitlines()  # no row
    assert "error: Wrong result of rpe_tvm at n=16, gradient of query" in printed.err
    assert not list(tmp_path.iterdir()) and not measured


def test_too_short_a_length_is_one_message(operator, measured, capsys):
    assert main([*COMMAND, "--lengths", "1"]) == 1
    assert "error: Invalid length: expected at least 2, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--memory-lengths 8", "--memory-lengths: expected --mode train"),
        ("--mode train --op toeplitz", "--mode: train expects --op attention"),
        ("--mode backward", "invalid choice: 'backward'"),
        ("--mode train --memory-lengths 0", "expected a positive whole number, got '0'"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments.split()])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
