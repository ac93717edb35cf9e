"""The benchmark: the operator against what a user could pick instead, checked, then timed, in one run.

Imports neither torch nor tvm before it runs, so that the command line can offer it everywhere.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rpe_tvm.errors import RpeTvmError
from rpe_tvm.reference import attention_rows

if TYPE_CHECKING:
    import torch

# The peers by name, with their headings.
PEERS = {
    "torch_fft": "torch.fft",
    "torch_fft_by_feature": "torch.fft by feature",
    "sdpa": "SDPA",
    "sdpa_bias": "SDPA + bias",
}

# The operator's error may be this many times the torch.fft formula's, plus a floor below float32's rounding.
ERROR_RATIO = 2.0
ERROR_FLOOR = 1e-7
# A peer with a larger error computes something else, and it is no yardstick for the operator's error.
PEER_ERROR_LIMIT = 1e-2

SAMPLED_ROWS = 64
MIN_ROUNDS = 3
# A contestant's turn: calls for this long, after one that is not timed and brings its data into cache.
TURN_SECONDS = 0.2
# Share of the free memory that one peer may take.
MEMORY_SHARE = 0.8

Describe = Callable[[int], str]


class WrongResultError(RpeTvmError, ArithmeticError):
    """A contestant's numbers are wrong, so that its speed means nothing."""


@dataclass(frozen=True)
class PeerTime:
    """Median time of one peer in milliseconds; None where it was not run, and why."""

    name: str
    ms: float | None
    skipped: str | None = None


@dataclass(frozen=True)
class Row:
    """The result at one sequence length; errors are relative RMS errors against float64 over sampled rows."""

    n: int
    algorithm: str
    ms: float
    peers: tuple[PeerTime, ...]
    error: float
    torch_fft_error: float
    rounds: int

    def ratio(self, peer: str) -> float | None:
        """How many times faster than `peer` the operator is."""
        ms = {each.name: each.ms for each in self.peers}[peer]
        return None if ms is None else ms / self.ms

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, the ratios included."""
        peers = {
            each.name: {"ms": each.ms, "ratio": self.ratio(each.name), "skipped": each.skipped} for each in self.peers
        }
        return {
            "n": self.n,
            "algorithm": self.algorithm,
            "ms": self.ms,
            "peers": peers,
            "error": self.error,
            "torch_fft_error": self.torch_fft_error,
            "rounds": self.rounds,
        }


@dataclass(frozen=True)
class _Inputs:
    """Float32 tensors: q, k, v `[1, H, n, d]`, rpe_bias `[H, 2n-1]`, projection `[m, d]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rpe_bias: torch.Tensor
    projection: torch.Tensor


def run(
    lengths: Sequence[int],
    heads: int = 4,
    num_features: int = 32,
    head_dim: int = 64,
    threads: int | None = None,
    seconds: float = 8.0,
    is_causal: bool = False,
    describe: Describe | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Check and time NPRF attention with relative positions against its peers, at each length.

    The contestants take turns (A B C D A B C D ...), so that a slow minute of the machine hits them alike.
    The operator is timed end to end: feature maps, weights from the bias, denominator and division included.
    The bias mask of softmax attention is made beforehand.

    Parameters
    ----------
    lengths
        Sequence lengths, n_q = n_k.
    heads, num_features, head_dim
        H, m and d; the batch is 1.
    threads
        Threads of torch and of the operator; None: torch's present number.
    seconds
        Time budget for each length; every contestant runs at least three times.
    is_causal
        Whether query i sees keys j <= i only, for all contestants.
    describe
        Says for a length which algorithm the operator takes; None: the column stays "-".
    on_row
        Called with each row as soon as it is there.

    Returns
    -------
    list of Row
        One row for each length.

    Raises
    ------
    WrongResultError
        If a contestant's numbers are wrong, before and after the timing.
    """
    sizes = {"heads": heads, "num_features": num_features, "head_dim": head_dim}
    for name, size in [*sizes.items(), *(("length", n) for n in lengths)]:
        if size < 1:
            raise ValueError(f"Invalid {name}: expected at least 1, got {size}; pass a positive number")

    import torch
    from tqdm import tqdm

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    rows = []
    try:
        with torch.no_grad(), tqdm(lengths, unit="length", file=sys.stderr, leave=False) as progress:
            for n in progress:
                progress.set_description(f"n={n}")
                inputs = _make_inputs(n, heads, num_features, head_dim)
                row = _measure(inputs, seconds, is_causal, describe, progress.set_postfix_str)
                rows.append(row)
                if on_row is not None:
                    progress.clear()
                    on_row(row)
    finally:
        torch.set_num_threads(threads_before)
    return rows


def _make_inputs(n: int, heads: int, num_features: int, head_dim: int) -> _Inputs:
    import torch

    generator = torch.Generator().manual_seed(n)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
    return _Inputs(
        query=normal(1, heads, n, head_dim),
        key=normal(1, heads, n, head_dim),
        value=normal(1, heads, n, head_dim),
        rpe_bias=normal(heads, 2 * n - 1),
        projection=normal(num_features, head_dim),
    )


def _measure(
    inputs: _Inputs,
    seconds: float,
    is_causal: bool,
    describe: Describe | None,
    show: Callable[[str], None],
) -> Row:
    """One row: build the contestants, check them, let them take turns, check the operator again."""
    n = inputs.query.shape[2]
    rows = _sample_rows(n)
    operator = _operator(inputs, is_causal)

    show("checking rpe_tvm (the first call may compile)")
    output = operator()
    show("checking the peers")
    expected = _expected_rows(rows, inputs, is_causal)
    softmax = {
        "sdpa": _softmax_rows(rows, inputs, is_causal, with_bias=False),
        "sdpa_bias": _softmax_rows(rows, inputs, is_causal, with_bias=True),
    }
    calls, skipped = _peer_calls(inputs, is_causal, free_bytes())
    errors = {name: relative_error(call(), rows, softmax.get(name, expected)) for name, call in calls.items()}
    _check_peers(n, errors)
    # Where the plain formula does not fit into memory, its leaner form rounds just as it does.
    torch_fft_error = errors.get("torch_fft", errors["torch_fft_by_feature"])
    error = relative_error(output, rows, expected)
    _check_operator(n, error, torch_fft_error)

    times, output = take_turns({"rpe_tvm": operator, **calls}, seconds, lambda count: show(f"round {count}"))
    # Once more: a race between threads or a reused buffer need not show at the first call.
    _check_operator(n, relative_error(output, rows, expected), torch_fft_error)

    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    return Row(
        n=n,
        algorithm="-" if describe is None else describe(n),
        ms=medians["rpe_tvm"],
        peers=tuple(PeerTime(name, medians.get(name), skipped.get(name)) for name in PEERS),
        error=error,
        torch_fft_error=torch_fft_error,
        rounds=len(times["rpe_tvm"]),
    )


def _operator(inputs: _Inputs, is_causal: bool) -> Callable[[], torch.Tensor]:
    module = importlib.import_module("rpe_tvm.torch")
    feature_map = module.NPRF(inputs.projection)

    def call() -> torch.Tensor:
        output: torch.Tensor = module.kernelized_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.rpe_bias,
            feature_map=feature_map,
            is_causal=is_causal,
        )
        return output

    return call


def _peer_calls(
    inputs: _Inputs, is_causal: bool, free: int
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str]]:
    """The peers that fit into `free` bytes, ready to be called, and for the others why they are skipped."""
    from rpe_tvm import peers

    q, k, v, b, w = inputs.query, inputs.key, inputs.value, inputs.rpe_bias, inputs.projection
    (batch, heads, n, head_dim), num_features = q.shape, w.shape[0]
    mask_bytes = 4 * heads * n * n
    fft = functools.partial(peers.torch_fft_attention, q, k, v, b, w, is_causal=is_causal)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    skipped: dict[str, str] = {}

    def fits(name: str, needed: int) -> bool:
        if needed <= MEMORY_SHARE * free:
            return True
        skipped[name] = f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        return False

    with_mask = fits("sdpa_bias", mask_bytes)
    if with_mask:
        free -= mask_bytes
    if fits("torch_fft", peers.torch_fft_bytes(batch, heads, n, n, num_features, head_dim)):
        calls["torch_fft"] = fft
    calls["torch_fft_by_feature"] = functools.partial(fft, chunk=1)
    calls["sdpa"] = functools.partial(peers.sdpa, q, k, v, is_causal=is_causal)
    if with_mask:
        mask = peers.bias_mask(b, n, n, is_causal=is_causal)
        calls["sdpa_bias"] = functools.partial(peers.sdpa_with_bias, q, k, v, mask)
    return calls, skipped


def take_turns(
    contestants: Mapping[str, Callable[[], torch.Tensor]], seconds: float, on_round: Callable[[int], None]
) -> tuple[dict[str, list[float]], torch.Tensor]:
    """Time the contestants in turns for `seconds`, at least three rounds.

    Returns the times in seconds by name, and the last output of the first contestant.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    first = next(iter(contestants))
    kept: dict[str, torch.Tensor] = {}
    rounds = 0
    end = time.perf_counter() + seconds
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        rounds += 1
        on_round(rounds)
        for name, call in contestants.items():
            if times[name] and times[name][-1] < TURN_SECONDS:
                call()
            turn = time.perf_counter()
            while True:
                start = time.perf_counter()
                output = call()
                now = time.perf_counter()
                times[name].append(now - start)
                if now - turn > TURN_SECONDS:
                    break
            if name == first:
                kept[name] = output
            del output  # the next contestant may need the memory
    return times, kept[first]


def relative_error(output: torch.Tensor, rows: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """RMS of the error of `output[:, :, rows]` over the RMS of `expected`; NaN where anything is NaN."""
    got = output[:, :, rows.tolist()].double().numpy()
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def _check_peers(n: int, errors: Mapping[str, float]) -> None:
    for name, error in errors.items():
        if not error <= PEER_ERROR_LIMIT:  # a NaN fails, too
            raise WrongResultError(
                f"Wrong result of {PEERS[name]} at n={n}: expected a relative error of at most "
                f"{PEER_ERROR_LIMIT:.0e} against float64, got {error:.1e}; no speed is shown: check torch"
            )


def _check_operator(n: int, error: float, torch_fft_error: float) -> None:
    limit = ERROR_RATIO * torch_fft_error + ERROR_FLOOR
    if not error <= limit:  # a NaN fails, too
        raise WrongResultError(
            f"Wrong result of rpe_tvm at n={n}: expected a relative error of at most {limit:.1e} against "
            f"float64 ({ERROR_RATIO:g} times torch.fft's {torch_fft_error:.1e}), got {error:.1e}; no speed "
            "is shown: run `python -m rpe_tvm cache clear`, measure again, and report it if it comes back"
        )


def _sample_rows(n: int) -> npt.NDArray[np.int64]:
    """One row at random from each of at most 64 stretches of equal length, and the last one."""
    edges = np.linspace(0, n, min(n, SAMPLED_ROWS) + 1).astype(np.int64)
    rows = np.random.default_rng(n).integers(edges[:-1], edges[1:])
    return np.unique(np.append(rows, n - 1))


def _expected_rows(rows: npt.NDArray[np.int64], inputs: _Inputs, is_causal: bool) -> npt.NDArray[np.float64]:
    """Rows of the operator's result in float64, `[1, H, r, d]`."""
    q, k, v, b, w = (
        each.numpy() for each in (inputs.query, inputs.key, inputs.value, inputs.rpe_bias, inputs.projection)
    )
    return attention_rows(rows, q, k, v, b, w, is_causal=is_causal)


def _softmax_rows(
    rows: npt.NDArray[np.int64], inputs: _Inputs, is_causal: bool, with_bias: bool
) -> npt.NDArray[np.float64]:
    """Rows of softmax attention in float64 (Luo et al. 2021, Eq. 6), `[1, H, r, d]`."""
    query, key, value, bias = (
        each.double().numpy() for each in (inputs.query, inputs.key, inputs.value, inputs.rpe_bias)
    )
    n, head_dim = query.shape[2:]
    offset = np.arange(n) - rows[:, None]
    scores = query[:, :, rows] @ key.swapaxes(-1, -2) / np.sqrt(head_dim)
    if with_bias:
        scores = scores + bias[:, offset + n - 1]
    if is_causal:
        scores = np.where(offset > 0, -np.inf, scores)
    alpha = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float64] = (alpha / alpha.sum(axis=-1, keepdims=True)) @ value
    return result


def free_bytes() -> int:
    """Memory that this process can still take: the machine's, and its control group's where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used, statistics_file, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())
            lines = (line.split() for line in (group / statistics_file).read_text().splitlines())
            room += int(dict(lines)[cache])  # file pages that the system gives back when asked
        except (OSError, ValueError, KeyError):
            continue  # no such group here, or it has no limit
        free = min(free, max(room, 0))
    return free


# --------------------------------------------------------------------------------------------------- output

_HEADINGS = (
    "n",
    "algorithm",
    "ms",
    *(cell for title in PEERS.values() for cell in (f"{title} ms", "ratio")),
    "error",
    "torch.fft error",
)
_WIDTHS = tuple(16 if heading == "algorithm" else max(len(heading), 7) for heading in _HEADINGS)


def table_header() -> str:
    """The two heading lines of the table; Markdown, and aligned for the eye."""
    rule = "|".join("-" * (width + 1) + ":" for width in _WIDTHS)
    return f"{_join(_HEADINGS)}\n|{rule}|"


def table_line(row: Row) -> str:
    """One line of the table; a ratio says how many times faster than the peer the operator is."""
    cells = [str(row.n), row.algorithm, _number(row.ms)]
    for peer in row.peers:
        ratio = row.ratio(peer.name)
        cells += [_number(peer.ms), "-" if ratio is None else f"{ratio:.1f}x"]
    return _join([*cells, f"{row.error:.1e}", f"{row.torch_fft_error:.1e}"])


def notes(rows: Sequence[Row]) -> list[str]:
    """Why peers are missing, one line for each."""
    return [
        f"n={row.n}: {PEERS[peer.name]} skipped: {peer.skipped}"
        for row in rows
        for peer in row.peers
        if peer.skipped is not None
    ]


def format_table(rows: Sequence[Row]) -> str:
    """The whole table with the reasons for what is missing."""
    return "\n".join([table_header(), *map(table_line, rows), *notes(rows)])


def _join(cells: Sequence[str]) -> str:
    padded = (f" {cell:>{width}} " for cell, width in zip(cells, _WIDTHS, strict=True))
    return f"|{'|'.join(padded)}|"


def _number(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def environment(threads: int) -> dict[str, Any]:
    """What a reader needs to judge a measurement: CPU, threads, versions, commit, date."""
    packages = ("rpe_tvm", "apache-tvm", "apache-tvm-ffi", "torch", "numpy")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git_commit(),
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
    }


def cpu_name() -> str:
    """The CPU's own name, such as "Intel(R) Xeon(R) Platinum 8481C"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: str | Path, rows: Sequence[Row], settings: Mapping[str, Any], threads: int) -> None:
    """Write the measurement with its settings and environment; a file is complete or is not there."""
    document = {
        "format": 1,
        "benchmark": "attention",
        **environment(threads),
        "settings": dict(settings),
        "rows": [row.to_json() for row in rows],
    }
    text = json.dumps(document, indent=2) + "\n"
    _write_and_rename(Path(path), lambda staged: staged.write_text(text, encoding="utf-8"))


def plot(rows: Sequence[Row], path: str | Path, title: str | None = None) -> None:
    """Draw time over length, both logarithmic, one line for the operator and each peer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    series = {"rpe_tvm": [(row.n, row.ms) for row in rows]}
    for name, label in PEERS.items():
        times = [(row.n, peer.ms) for row in rows for peer in row.peers if peer.name == name]
        series[label] = [(n, ms) for n, ms in times if ms is not None]
    styles = zip("osD^v", ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7"), strict=True)
    for (label, points), (marker, colour) in zip(series.items(), styles, strict=True):
        if points:
            lengths, milliseconds = zip(*points, strict=True)
            width = 2.5 if label == "rpe_tvm" else 1.5
            axes.plot(lengths, milliseconds, marker=marker, color=colour, linewidth=width, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.n for row in rows}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sequence length n")
    axes.set_ylabel("time of one call, ms (median)")
    axes.set_title(title or "Attention with relative positions, forward, float32")
    axes.grid(True, which="major", color="#dddddd")
    axes.legend(frameon=False)
    _write_and_rename(Path(path), lambda staged: figure.savefig(staged, dpi=150))


def _write_and_rename(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as staging:
        staged = Path(staging) / path.name
        write(staged)
        os.replace(staged, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this checkout, "+" where tracked files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # the package lies inside some other project's checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


# --------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to its parser."""
    parser.add_argument("--op", choices=["attention", "toeplitz"], default="attention", help="default: %(default)s")
    parser.add_argument("--target", choices=["x86"], default="x86", help="what to run on (default: %(default)s)")
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=(512, 1024, 2048, 4096, 8192, 16384),
        metavar="N,N,...",
        help="sequence lengths (default: 512,1024,2048,4096,8192,16384)",
    )
    parser.add_argument("--heads", type=_positive, default=4, help="heads, with a batch of 1 (default: %(default)s)")
    parser.add_argument("--features", type=_positive, default=32, help="random features m (default: %(default)s)")
    parser.add_argument("--head-dim", type=_positive, default=64, help="channels of a head d (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, help="threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each length (default: %(default)s)")
    parser.add_argument("--causal", action="store_true", help="queries see no later keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurement here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over length (needs matplotlib)")


def main(args: argparse.Namespace, describe: Describe | None = None) -> int:
    """Run `bench`: table on stdout, progress on stderr; exit code 1 for a wrong result."""
    problem = _obstacle(args)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1

    import torch

    threads = args.threads or torch.get_num_threads()
    settings = {
        "target": args.target,
        "lengths": list(args.lengths),
        "heads": args.heads,
        "features": args.features,
        "head_dim": args.head_dim,
        "seconds": args.seconds,
        "causal": args.causal,
        "feature_map": "nprf",
        "dtype": "float32",
    }
    shape = f"{args.heads} heads, m={args.features}, d={args.head_dim}{', causal' if args.causal else ''}"
    setting = f"float32, {shape}, {threads} {'thread' if threads == 1 else 'threads'}"
    print(f"{cpu_name()}; {setting}\n\n{table_header()}", flush=True)
    try:
        rows = run(
            args.lengths,
            heads=args.heads,
            num_features=args.features,
            head_dim=args.head_dim,
            threads=threads,
            seconds=args.seconds,
            is_causal=args.causal,
            describe=describe,
            on_row=lambda row: print(table_line(row), flush=True),
        )
    except RpeTvmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes(rows):
        print(note)
    if args.json is not None:
        write_json(args.json, rows, settings, threads)
        print(f"measurement: {args.json}")
    if args.plot is not None:
        plot(rows, args.plot, f"Attention with relative positions: {setting}\n{cpu_name()}")
        print(f"plot: {args.plot}")
    return 0


def _obstacle(args: argparse.Namespace) -> str | None:
    """What stands in the way of the measurement, found before minutes are spent on it."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"target {args.target} needs an x86-64 CPU, got {machine}; run the benchmark on such a machine"
    if importlib.util.find_spec("torch") is None:
        return "the benchmark needs PyTorch, which is not installed; run: pip install torch"
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib, which is not installed; run: pip install matplotlib"
    return None


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return number


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))
