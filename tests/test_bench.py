import argparse
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpe_tvm import bench, bench_machine, bench_output, bench_peers, bench_problem, bench_turns, reference

torch = pytest.importorskip("torch")
from rpe_tvm import peers  # noqa: E402  (needs torch)

SMALL = {"heads": 2, "num_features": 4, "head_dim": 8, "threads": 1, "seconds": 0.0}
PARTS = ("query", "key", "value", "rpe_bias", "projection")


def make_inputs(n_q, n_k, heads=2, batch=2, num_features=6, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, n_q, head_dim),
        (batch, heads, n_k, head_dim),
        (batch, heads, n_k, head_dim),
        (heads, n_q + n_k - 1),
        (num_features, head_dim),
    )
    return dict(zip(PARTS, (torch.randn(shape, generator=generator) for shape in shapes), strict=True))


@pytest.fixture
def operator(monkeypatch):
    """Puts a plain float32 operator in the place of rpe_tvm.torch; `spoil` changes its results."""
    monkeypatch.setattr(bench_turns, "TURN_SECONDS", 0.0)  # one call in a turn
    state = types.SimpleNamespace(spoil=lambda out, call: out, calls=0, threads=set())

    def kernelized_attention(query, key, value, rpe_bias, *, feature_map, is_causal=False):
        state.calls += 1
        state.threads.add(torch.get_num_threads())
        out = peers.torch_fft_attention(
            query, key, value, rpe_bias, feature_map.projection, is_causal=is_causal, chunk=2
        )
        return state.spoil(out, state.calls)

    module = types.ModuleType("rpe_tvm.torch")
    module.NPRF = lambda projection: types.SimpleNamespace(projection=projection)
    module.kernelized_attention = kernelized_attention
    monkeypatch.setitem(sys.modules, "rpe_tvm.torch", module)
    return state


def parse(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.fill_in(parser.parse_args(arguments))


def command(*arguments):
    small = "--heads 2 --features 4 --head-dim 8 --threads 1 --seconds 0 --lengths 16,33"
    return bench.main(parse(*small.split(), *arguments), describe=lambda n: "fft" if n > 20 else "direct")


def make_row(n=2048, ms=10.0, skipped=None):
    times = {"torch_fft": 400.0, "torch_fft_by_feature": 120.0, "sdpa": 8.0, "sdpa_bias": 25.0}
    listed = tuple(
        bench_turns.PeerTime(name, None, skipped)
        if skipped and name == "torch_fft"
        else bench_turns.PeerTime(name, each)
        for name, each in times.items()
    )
    return bench.Row(n, "direct", ms, listed, error=2e-7, torch_fft_error=3e-7, rounds=7)


# ------------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_q, n_k", [(1, 1), (2, 7), (63, 63), (40, 17), (17, 40)])
def test_torch_fft_agrees_with_the_reference(n_q, n_k, feature_map, is_causal):
    inputs = {name: each.double() for name, each in make_inputs(n_q, n_k).items()}
    options = {"feature_map": feature_map, "is_causal": is_causal}
    expected = reference.attention(**inputs, **options)[2]
    for chunk in (None, 1, 4):
        got = peers.torch_fft_attention(**inputs, **options, chunk=chunk)
        np.testing.assert_allclose(got, expected, atol=1e-9, rtol=1e-7)
    single = peers.torch_fft_attention(*(each.float() for each in inputs.values()), **options)
    assert single.dtype == torch.float32 and single.shape == expected.shape


def test_torch_fft_leaves_its_inputs_alone():
    inputs = make_inputs(9, 9)
    before = {name: each.clone() for name, each in inputs.items()}
    peers.torch_fft_attention(**inputs, is_causal=True)
    peers.bias_mask(inputs["rpe_bias"], 9, 9, is_causal=True)
    assert all(torch.equal(inputs[name], before[name]) for name in PARTS)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_q, n_k", [(1, 1), (5, 5), (3, 6), (6, 3)])
def test_softmax_peers(n_q, n_k, is_causal):
    """Luo 2021, Eq. 6."""
    inputs = make_inputs(n_q, n_k)
    q, k, v, bias = (inputs[name].double().numpy() for name in PARTS[:4])
    mask = peers.bias_mask(inputs["rpe_bias"], n_q, n_k, is_causal=is_causal)
    offset = np.arange(n_k) - np.arange(n_q)[:, None]
    allowed = (offset <= 0) | (not is_causal)
    assert mask.shape == (2, n_q, n_k) and mask.is_contiguous()
    np.testing.assert_array_equal(mask, np.where(allowed, inputs["rpe_bias"].numpy()[:, offset + n_q - 1], -np.inf))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    for got, logits in (
        (peers.sdpa(*(inputs[name] for name in PARTS[:3]), is_causal=is_causal), scores),
        (
            peers.sdpa_with_bias(*(inputs[name] for name in PARTS[:3]), mask),
            scores + bias[:, offset + n_q - 1],
        ),
    ):
        alpha = np.where(allowed, np.exp(logits), 0.0)
        np.testing.assert_allclose(got, alpha / alpha.sum(axis=-1, keepdims=True) @ v, atol=2e-6)


@given(st.integers(0, 3000))
@settings(max_examples=100, deadline=None)
def test_fft_length_is_the_smallest_smooth_number(minimum):
    def is_smooth(number):
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    expected = next(number for number in range(max(minimum, 1), 5000) if is_smooth(number))
    assert peers.fft_length(minimum) == expected


def test_memory_estimate_follows_the_arrays():
    sizes = {"batch": 1, "heads": 4, "n_q": 4096, "n_k": 4096, "num_features": 32, "head_dim": 64}
    plain = peers.torch_fft_bytes(**sizes)
    assert plain > 5 * 4 * 4 * 4096 * 32 * 64  # the products and two transforms of twice the length
    assert peers.torch_fft_bytes(**sizes, chunk=1) < plain / 6


# ------------------------------------------------------------------------------------------------ run


@pytest.mark.parametrize("is_causal", [False, True])
def test_run(operator, is_causal):
    before = torch.get_num_threads()
    seen = []
    rows = bench.run([1, 70, 33], **SMALL, is_causal=is_causal, describe="n={}".format, on_row=seen.append)
    assert rows == seen
    assert [row.n for row in rows] == [1, 70, 33]
    assert [row.algorithm for row in rows] == ["n=1", "n=70", "n=33"]
    for row in rows:
        assert row.ms > 0 and row.rounds == bench_turns.MIN_ROUNDS
        assert [peer.name for peer in row.peers] == list(bench.PEERS)
        assert all(peer.ms > 0 and peer.skipped is None for peer in row.peers)
        assert 0 < row.error <= 2 * row.torch_fft_error + bench_turns.ERROR_FLOOR < 1e-3
    assert operator.threads == {1}
    assert torch.get_num_threads() == before
    assert bench.run([5], **SMALL)[0].algorithm == "-"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out, call: out * 1.01,
        lambda out, call: out.index_fill(2, torch.tensor(out.shape[2] - 1), torch.nan),
        lambda out, call: out * torch.inf,
        lambda out, call: out if call == 1 else out + 0.01,  # right when checked, wrong when timed
        lambda out, call: out if call == 1 else out * torch.nan,
    ],
    ids=["1% off", "one NaN row", "infinite", "wrong later", "NaN later"],
)
def test_a_wrong_result_has_no_speed(operator, spoil, capsys, tmp_path):
    operator.spoil = spoil
    with pytest.raises(bench_turns.WrongResultError, match="Wrong result of rpe_tvm at n=50: expected a relative"):
        bench.run([50], **SMALL)
    operator.calls = 0
    assert command("--json", str(tmp_path / "out.json")) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2:] == bench.table_header().splitlines()  # no row
    assert "error: Wrong result of rpe_tvm at n=16" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("peer", ["torch_fft_attention", "sdpa", "sdpa_with_bias"])
def test_a_wrong_peer_has_no_speed(operator, peer, monkeypatch):
    right = getattr(peers, peer)
    operator.spoil = lambda out, call: out.clone()
    monkeypatch.setattr(peers, peer, lambda *args, **kwargs: 1.05 * right(*args, **kwargs))
    with pytest.raises(bench_turns.WrongResultError, match="Wrong result of (torch.fft|SDPA)"):
        bench.run([50], **SMALL)


def test_peers_without_room_are_skipped_and_say_so(operator, monkeypatch):
    monkeypatch.setattr(bench_machine, "free_bytes", lambda: 20_000)
    row = bench.run([100], **SMALL)[0]
    assert {peer.name for peer in row.peers if peer.ms is None} == {"torch_fft", "sdpa_bias"}
    assert row.ratio("sdpa_bias") is None and row.ratio("sdpa") > 0
    assert row.torch_fft_error > 0
    assert "| - |" in " ".join(bench.table_line(row).split())
    first, second = bench.notes([row])
    assert first.startswith("n=100: torch.fft skipped: needs about 0.0 GiB of memory, 0.0 GiB are free")
    assert second.startswith("n=100: SDPA + bias skipped: needs about ")


def test_the_mask_counts_against_the_room_of_torch_fft(monkeypatch):
    inputs = bench_problem.make_inputs(64, 2, 4, 8)
    mask_bytes, fft_bytes = 4 * 2 * 64 * 64, peers.torch_fft_bytes(1, 2, 64, 64, 4, 8)
    enough = int((fft_bytes + mask_bytes) / bench_machine.MEMORY_SHARE) + 2
    assert not bench_peers.peer_calls(inputs, False, enough)[1]
    assert set(bench_peers.peer_calls(inputs, False, enough - mask_bytes)[1]) == {"torch_fft"}


def test_free_memory_is_measured():
    assert 2**20 < bench_machine.free_bytes() < 2**50


def test_contestants_take_turns():
    order = []

    def contestant(name, duration):
        def call():
            order.append(name)
            time.sleep(duration)
            return torch.zeros(1)

        return call

    calls = {"a": contestant("a", bench_turns.TURN_SECONDS), "b": contestant("b", bench_turns.TURN_SECONDS / 8)}
    times, output = bench_turns.take_turns(calls, 0.0, lambda count: None)
    assert re.sub("b+", "b", "".join(order)) == "ab" * 3
    # A slow one is called once in a turn; a quick one often, and once more untimed when it is known to be quick.
    assert order.count("a") == len(times["a"]) == 3
    assert order.count("b") == len(times["b"]) + 2 > 6
    assert min(times["a"]) >= bench_turns.TURN_SECONDS > max(times["b"])
    assert output.shape == (1,)


def test_bad_sizes_are_refused(operator):
    with pytest.raises(ValueError, match="Invalid length: expected at least 1, got 0"):
        bench.run([16, 0], **SMALL)
    with pytest.raises(ValueError, match="Invalid heads: expected at least 1, got 0"):
        bench.run([16], **{**SMALL, "heads": 0})
    assert operator.calls == 0


def test_rows_are_sampled_from_the_whole_length():
    for n in (1, 2, 63, 64, 1000, 65536):
        rows = bench_turns.sample_rows(n)
        assert rows[-1] == n - 1 and rows[0] <= n // bench_turns.SAMPLED_ROWS
        assert len(rows) == min(n, len(rows)) <= bench_turns.SAMPLED_ROWS + 1
        assert len(rows) >= min(n, bench_turns.SAMPLED_ROWS)


# ------------------------------------------------------------------------------------------------ output


def test_ratios():
    row = make_row()
    assert {name: row.ratio(name) for name in bench.PEERS} == {
        "torch_fft": 40.0,
        "torch_fft_by_feature": 12.0,
        "sdpa": 0.8,
        "sdpa_bias": 2.5,
    }


def test_table():
    rows = [make_row(), make_row(16384, 123.4, skipped="needs about 9.0 GiB of memory, 1.0 GiB are free")]
    header, rule, first, second, note = bench.format_table(rows).splitlines()
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells == [
        *("n", "algorithm", "ms", "torch.fft ms", "ratio", "torch.fft by feature ms", "ratio"),
        *("SDPA ms", "ratio", "SDPA + bias ms", "ratio", "error", "torch.fft error"),
    ]
    assert {len(line) for line in (header, rule, first, second)} == {len(header)}
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        *("2048", "direct", "10", "400", "40.0x", "120", "12.0x", "8", "0.8x", "25", "2.5x"),
        *("2.0e-07", "3.0e-07"),
    ]
    assert [cell.strip() for cell in second.strip("|").split("|")][2:5] == ["123", "-", "-"]
    assert note == "n=16384: torch.fft skipped: needs about 9.0 GiB of memory, 1.0 GiB are free"


def test_command_writes_table_json_and_plot(operator, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    json_file, plot_file = tmp_path / "new" / "out.json", tmp_path / "out.png"
    assert command("--json", str(json_file), "--plot", str(plot_file), "--causal") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("; float32, 2 heads, m=4, d=8, causal, 1 thread")
    assert lines[2:4] == bench.table_header().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:6]] == ["16", "33"]
    assert lines[6:] == [f"measurement: {json_file}", f"plot: {plot_file}"]

    document = json.loads(json_file.read_text())
    assert document["cpu"] and document["threads"] == 1
    assert document["date"].endswith("+00:00")
    assert document["versions"]["torch"] and document["versions"]["python"]
    assert set(document["versions"]) >= {"apache-tvm", "apache-tvm-ffi", "numpy", "rpe_tvm"}
    assert "commit" in document
    assert document["settings"] == {
        **{"target": "x86", "lengths": [16, 33], "heads": 2, "features": 4, "head_dim": 8, "seconds": 0.0},
        **{"causal": True, "feature_map": "nprf", "dtype": "float32"},
    }
    first, second = document["rows"]
    assert (first["n"], first["algorithm"], second["n"], second["algorithm"]) == (16, "direct", 33, "fft")
    assert list(first["peers"]) == list(bench.PEERS)
    for peer in first["peers"].values():
        assert peer["ratio"] == pytest.approx(peer["ms"] / first["ms"])
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"new", "out.png"}
    assert [path.name for path in json_file.parent.iterdir()] == ["out.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        bench_output.write_json(path, "attention", [make_row()], {"not JSON": object()}, 1)
    with pytest.raises(OSError, match="disk full"):
        bench_output.write_and_rename(path, lambda staged: (_ for _ in ()).throw(OSError("disk full")))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_plot_draws_every_series_it_has(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [make_row(1024, 3.0), make_row(2048, 6.0, skipped="no room")]
    for name in ("a.png", "b.svg"):
        bench.plot(rows, tmp_path / name)
    drawn = (tmp_path / "b.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in ("rpe_tvm", *bench.PEERS.values()))


def test_arguments(capsys):
    args = parse()
    assert args.lengths == (512, 1024, 2048, 4096, 8192, 16384)
    assert (args.target, args.heads, args.features, args.head_dim) == ("x86", 4, 32, 64)
    assert (args.threads, args.causal, args.json, args.plot) == (None, False, None, None)
    assert parse("--lengths", "7,9", "--json", "x.json").lengths == (7, 9)
    for wrong in (["--lengths", "7,x"], ["--lengths", ""], ["--heads", "0"], ["--target", "abacus"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
    assert "expected a positive whole number, got 'x'" in capsys.readouterr().err


def test_what_is_missing_is_said_at_once(operator, monkeypatch, capsys):
    found = bench_machine.importlib.util.find_spec
    for name, arguments in (("torch", []), ("matplotlib", ["--plot", "x.png"])):
        monkeypatch.setattr(
            bench_machine.importlib.util,
            "find_spec",
            lambda asked, name=name: None if asked == name else found(asked),
        )
        assert command(*arguments) == 1
        assert f"pip install {name}" in capsys.readouterr().err
    monkeypatch.setattr(bench_machine.platform, "machine", lambda: "aarch64")
    assert command() == 1
    assert "needs an x86-64 CPU, got aarch64" in capsys.readouterr().err
    assert operator.calls == 0


def test_the_command_line_can_import_it_without_torch_and_tvm():
    code = (
        "import sys; import rpe_tvm.bench; "
        "sys.exit(', '.join({'torch', 'tvm', 'matplotlib', 'tqdm'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
