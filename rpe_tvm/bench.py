"""The benchmark of the forward pass: the operator against what a user could pick instead, in one run.

Imports neither torch nor tvm before it runs, so that the command line can offer it everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpe_tvm import bench_machine, bench_output, bench_problem, bench_turns
from rpe_tvm.bench_peers import PEERS, peer_calls
from rpe_tvm.errors import RpeTvmError

Describe = Callable[[int], str]


@dataclass(frozen=True)
class Row:
    """The result at one sequence length; errors are relative RMS errors against float64 over sampled rows."""

    n: int
    algorithm: str
    ms: float
    peers: tuple[bench_turns.PeerTime, ...]
    error: float
    torch_fft_error: float
    rounds: int

    def ratio(self, peer: str) -> float | None:
        """How many times faster than `peer` the operator is."""
        return bench_turns.ratio(self.peers, peer, self.ms)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, the ratios included."""
        return {
            "n": self.n,
            "algorithm": self.algorithm,
            "ms": self.ms,
            "peers": bench_turns.peers_to_json(self.peers, self.ms),
            "error": self.error,
            "torch_fft_error": self.torch_fft_error,
            "rounds": self.rounds,
        }


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
    bench_turns.WrongResultError
        If a contestant's numbers are wrong, before and after the timing.
    """
    bench_turns.check_sizes(lengths, 1, heads=heads, num_features=num_features, head_dim=head_dim)

    def measure(n: int, show: Callable[[str], None]) -> Row:
        import torch

        with torch.no_grad():
            inputs = bench_problem.make_inputs(n, heads, num_features, head_dim)
            return _measure(inputs, seconds, is_causal, describe, show)

    return bench_turns.rows_of(lengths, threads, measure, on_row)


def _measure(
    inputs: bench_problem.Inputs,
    seconds: float,
    is_causal: bool,
    describe: Describe | None,
    show: Callable[[str], None],
) -> Row:
    """One row: build the contestants, check them, let them take turns, check the operator again."""
    n = inputs.query.shape[2]
    rows = bench_turns.sample_rows(n)
    operator = bench_problem.operator_call(inputs, is_causal)

    show("checking rpe_tvm (the first call may compile)")
    output = operator()
    show("checking the peers")
    expected = bench_problem.expected_rows(rows, inputs, is_causal)
    softmax = {
        "sdpa": bench_problem.softmax_rows(rows, inputs, is_causal, with_bias=False),
        "sdpa_bias": bench_problem.softmax_rows(rows, inputs, is_causal, with_bias=True),
    }
    calls, skipped = peer_calls(inputs, is_causal, bench_machine.free_bytes())
    errors = {
        name: bench_turns.relative_error(call(), rows, softmax.get(name, expected)) for name, call in calls.items()
    }
    for name, peer_error in errors.items():
        bench_turns.check_peer(PEERS[name], f"n={n}", peer_error)
    # Where the plain formula does not fit into memory, its leaner form rounds just as it does.
    torch_fft_error = errors.get("torch_fft", errors["torch_fft_by_feature"])
    error = bench_turns.relative_error(output, rows, expected)
    bench_turns.check_operator(f"n={n}", error, torch_fft_error)

    times, output = bench_turns.take_turns(
        {"rpe_tvm": operator, **calls}, seconds, lambda count: show(f"round {count}")
    )
    # Once more: a race between threads or a reused buffer need not show at the first call.
    bench_turns.check_operator(f"n={n}", bench_turns.relative_error(output, rows, expected), torch_fft_error)

    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    return Row(
        n=n,
        algorithm="-" if describe is None else describe(n),
        ms=medians["rpe_tvm"],
        peers=tuple(bench_turns.PeerTime(name, medians.get(name), skipped.get(name)) for name in PEERS),
        error=error,
        torch_fft_error=torch_fft_error,
        rounds=len(times["rpe_tvm"]),
    )


# --------------------------------------------------------------------------------------------------- output

_HEADINGS = (
    "n",
    "algorithm",
    "ms",
    *(cell for title in PEERS.values() for cell in (f"{title} ms", "ratio")),
    "error",
    "torch.fft error",
)


def table_header() -> str:
    """The two heading lines of the table."""
    return bench_output.table_header(_HEADINGS)


def table_line(row: Row) -> str:
    """One line of the table; a ratio says how many times faster than the peer the operator is."""
    cells = [str(row.n), row.algorithm, bench_output.number(row.ms)]
    for peer in row.peers:
        ratio = row.ratio(peer.name)
        cells += [bench_output.number(peer.ms), "-" if ratio is None else f"{ratio:.1f}x"]
    return bench_output.table_line(_HEADINGS, [*cells, f"{row.error:.1e}", f"{row.torch_fft_error:.1e}"])


def notes(rows: Sequence[Row]) -> list[str]:
    """Why peers are missing, one line for each."""
    return [note for row in rows for note in bench_turns.skip_notes(row.n, row.peers, PEERS)]


def format_table(rows: Sequence[Row]) -> str:
    """The whole table with the reasons for what is missing."""
    return "\n".join([table_header(), *map(table_line, rows), *notes(rows)])


def plot(rows: Sequence[Row], path: str | Path, title: str | None = None) -> None:
    """Draw time over length, one line for the operator and each peer."""
    series = {"rpe_tvm": [(row.n, row.ms) for row in rows]}
    for name, label in PEERS.items():
        times = [(row.n, peer.ms) for row in rows for peer in row.peers if peer.name == name]
        series[label] = [(n, ms) for n, ms in times if ms is not None]
    bench_output.plot(
        series, path, title or "Attention with relative positions, forward, float32", "time of one call, ms (median)"
    )


# --------------------------------------------------------------------------------------------- command line


# What options are where they are not given, by target.
DEFAULTS: dict[str, dict[str, Any]] = {
    "x86": {"lengths": (512, 1024, 2048, 4096, 8192, 16384), "dtypes": ("float32",), "heads": 4, "seconds": 8.0},
    "cuda": {
        "lengths": (1024, 2048, 4096, 16384, 65536),
        "dtypes": ("float32", "bfloat16"),
        "heads": 8,
        "seconds": 4.0,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench` to its parser."""
    parser.add_argument("--op", choices=["attention", "toeplitz"], default="attention", help="default: %(default)s")
    parser.add_argument(
        "--mode",
        choices=["forward", "train"],
        default="forward",
        help="train: forward and backward, times and peak memory (default: %(default)s)",
    )
    parser.add_argument("--target", choices=[*DEFAULTS], default="x86", help="what to run on (default: %(default)s)")
    parser.add_argument("--lengths", type=_lengths, metavar="N,N,...", help=f"sequence lengths {_default('lengths')}")
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        metavar="DTYPE,...",
        help=f"of query, key and value, with --target cuda: float32, bfloat16 {_default('dtypes')}",
    )
    parser.add_argument(
        "--memory-lengths",
        type=_lengths,
        metavar="N,N,...",
        help="with --mode train: where to measure peak memory (default: --lengths)",
    )
    parser.add_argument("--heads", type=_positive, help=f"heads, with a batch of 1 {_default('heads')}")
    parser.add_argument("--features", type=_positive, default=32, help="random features m (default: %(default)s)")
    parser.add_argument("--head-dim", type=_positive, default=64, help="channels of a head d (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, help="threads of a CPU (default: torch's)")
    parser.add_argument("--seconds", type=float, help=f"time for each row of the table {_default('seconds')}")
    parser.add_argument("--causal", action="store_true", help="queries see no later keys")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurement here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over length (needs matplotlib)")


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """The parsed options with those of `DEFAULTS` for their target."""
    for name, value in DEFAULTS[args.target].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(args: argparse.Namespace, describe: Describe | None = None) -> int:
    """Run `bench`: table on stdout, progress on stderr; exit code 1 for a wrong result."""
    problem = bench_machine.obstacle(args.target, with_plot=args.plot is not None)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1

    import torch

    threads = args.threads or torch.get_num_threads()
    settings = bench_output.attention_settings(args)
    setting = bench_output.setting_of(args, threads)
    print(f"{bench_machine.cpu_name()}; {setting}\n\n{table_header()}", flush=True)
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
        bench_output.write_json(args.json, "attention", rows, settings, threads)
        print(f"measurement: {args.json}")
    if args.plot is not None:
        plot(rows, args.plot, f"Attention with relative positions: {setting}\n{bench_machine.cpu_name()}")
        print(f"plot: {args.plot}")
    return 0


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


def _dtypes(text: str) -> tuple[str, ...]:
    known = DEFAULTS["cuda"]["dtypes"]
    for part in text.split(","):
        if part not in known:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(known)}, got {part!r}")
    return tuple(text.split(","))


def _default(option: str) -> str:
    """The defaults of an option, for its help."""
    texts = {
        target: ",".join(map(str, each[option])) if isinstance(each[option], tuple) else str(each[option])
        for target, each in DEFAULTS.items()
    }
    return f"(default: {texts['x86']}; cuda: {texts['cuda']})"
