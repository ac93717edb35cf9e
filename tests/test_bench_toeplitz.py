"""The benchmark of Toeplitz products, on plain operators in the place of compiled ones."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from rpe_tvm import bench_toeplitz, bench_turns, reference
from rpe_tvm.cli import main

torch = pytest.importorskip("torch")
from rpe_tvm import peers  # noqa: E402  (needs torch)

PEERS = ["torch.fft", "torch.fft contiguous"]


@pytest.fixture
def operator(monkeypatch):
    """Plain operators; `spoil` changes the results of the first one."""
    monkeypatch.setattr(bench_turns, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(bench_toeplitz, "GRID", (3, 4))
    state = types.SimpleNamespace(spoil=lambda out, call: out, calls=0)

    def toeplitz_matmul(weights, x):
        state.calls += 1
        return state.spoil(peers.torch_fft_toeplitz_contiguous(weights, x), state.calls)

    def grid_toeplitz_matmul(weights, x):
        height, width = x.shape[2:4]
        spread = torch.nn.functional.pad(x, (0, 0, 0, width - 1)).flatten(2, 3)[:, :, : 1 - width or None]
        y = peers.torch_fft_toeplitz(weights.flatten(1), spread)
        y = torch.nn.functional.pad(y, (0, 0, 0, width - 1))
        return y.unflatten(2, (height, 2 * width - 1))[:, :, :, :width]

    module = types.ModuleType("rpe_tvm.torch")
    module.toeplitz_matmul, module.grid_toeplitz_matmul = toeplitz_matmul, grid_toeplitz_matmul
    monkeypatch.setitem(sys.modules, "rpe_tvm.torch", module)
    return state


@pytest.mark.parametrize("n", [1, 2, 63, 100])
def test_peers_agree_with_the_reference(n):
    g = torch.Generator().manual_seed(n)
    weights, x = torch.randn(3, 2 * n - 1, generator=g).double(), torch.randn(2, 3, n, 5, generator=g).double()
    expected = reference.toeplitz_dense(weights.numpy(), x.numpy(), n)
    for peer in (peers.torch_fft_toeplitz, peers.torch_fft_toeplitz_contiguous):
        np.testing.assert_allclose(peer(weights, x), expected, rtol=1e-9, atol=1e-9)


def test_rows(operator):
    seen = []
    rows = bench_toeplitz.run([5, 100], heads=2, head_dim=3, threads=1, seconds=0, on_row=seen.append)
    assert rows == seen and [row.size for row in rows] == ["5", "100", "3x4"]
    for row in rows[:2]:
        assert list(row.ms) == list(row.errors) == ["rpe_tvm", *PEERS]
        assert row.rounds == bench_turns.MIN_ROUNDS and all(error < 1e-6 for error in row.errors.values())
        assert all(0 < row.min_ms[name] <= row.ms[name] for name in row.ms)
        assert row.ratio("torch.fft") == row.ms["torch.fft"] / row.ms["rpe_tvm"]
    assert list(rows[2].ms) == ["rpe_tvm", "dense matrix"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, call: out * 1.01,
        lambda out, call: out * torch.nan,
        lambda out, call: out if call == 1 else out + 0.1,  # right when checked, wrong when timed
    ],
    ids=["1% off", "NaN", "wrong later"],
)
def test_a_wrong_result_has_no_speed(operator, spoil, capsys):
    operator.spoil = spoil
    command = "bench --op toeplitz --lengths 40 --heads 2 --head-dim 3 --threads 1 --seconds 0"
    assert main(command.split()) == 1
    printed = capsys.readouterr()
    assert "Wrong result of rpe_tvm at 40" in printed.err and "ms (" not in printed.out


def test_a_wrong_peer_has_no_speed(operator, monkeypatch):
    monkeypatch.setattr(peers, "torch_fft_toeplitz", lambda weights, x: torch.zeros_like(x))
    with pytest.raises(bench_turns.WrongResultError, match=r"Wrong result of torch\.fft at 5"):
        bench_toeplitz.run([5], heads=2, head_dim=3, threads=1, seconds=0)


def test_command(operator, capsys, tmp_path):
    file = tmp_path / "out.json"
    arguments = f"bench --op toeplitz --lengths 5,9 --heads 2 --head-dim 3 --threads 1 --seconds 0 --json {file}"
    assert main(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 heads, d=3" in lines[0] and [line.split()[0] for line in lines[2:5]] == ["5", "9", "3x4"]
    document = json.loads(file.read_text())
    assert document["benchmark"] == "toeplitz" and document["settings"]["head_dim"] == 3
    assert [set(row["ratios"]) for row in document["rows"]] == [set(PEERS), set(PEERS), {"dense matrix"}]
