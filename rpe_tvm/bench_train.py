"""The benchmark of training: forward and backward with a learned bias, against what a user could pick instead."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rpe_tvm import bench_machine, bench_output, bench_train_reference, bench_turns
from rpe_tvm.bench_train_memory import Peaks, peaks
from rpe_tvm.bench_train_steps import (
    OPERATOR,
    PARTS,
    PEERS,
    Size,
    Step,
    forward_of_operator,
    make_inputs,
    step_bytes,
    step_of,
)
from rpe_tvm.errors import RpeTvmError

if TYPE_CHECKING:
    import torch

FORWARD = "rpe_tvm forward"
# Causal errors are those of the first few rows, whose sums have few terms (docs/operators.md), so that the error of
# one draw scatters: by up to 2.4 times among nine draws of 63 to 1000 positions.
CAUSAL_ERROR_RATIO = 8.0

Describe = Callable[[int], str]
Errors = Mapping[str, float]  # by part


@dataclass(frozen=True)
class Row:
    """The result at one length; errors are relative RMS errors against float64, for each of `PARTS`."""

    n: int
    algorithms: str
    forward_ms: float
    ms: float
    peers: tuple[bench_turns.PeerTime, ...]
    errors: Errors
    torch_fft_errors: Errors
    rounds: int

    def ratio(self, peer: str) -> float | None:
        """How many times faster than `peer` the operator's step is."""
        return bench_turns.ratio(self.peers, peer, self.ms)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, the ratios included."""
        return {
            "n": self.n,
            "algorithms": self.algorithms,
            "forward_ms": self.forward_ms,
            "ms": self.ms,
            "step_over_forward": self.ms / self.forward_ms,
            "peers": bench_turns.peers_to_json(self.peers, self.ms),
            "errors": dict(self.errors),
            "torch_fft_errors": dict(self.torch_fft_errors),
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
    """Check and time training steps of NPRF attention with relative positions and of its peers, at each length.

    A step takes query, key, value and rpe_bias to an output, and a given gradient of that to theirs. Everything in
    between is timed: feature maps and weights of the operator and of torch.fft; the mask that softmax attention
    needs, made of rpe_bias, and the way of its gradient back to `[H, 2n-1]`. The operator's forward pass is also timed
    alone, under `torch.no_grad`. The contestants take turns.

    Parameters
    ----------
    lengths
        Sequence lengths, n_q = n_k, of at least 2: with one token all gradients but value's are 0, and no error is
        relative to that.
    heads, num_features, head_dim
        H, m and d; the batch is 1.
    threads
        Threads of torch and of the operator; None: torch's present number.
    seconds
        Time budget for each length; every contestant runs at least three times.
    is_causal
        Whether query i sees keys j <= i only, for all contestants.
    describe
        Says for a length which algorithms forward and backward take; None: the column stays "-".
    on_row
        Called with each row as soon as it is there.

    Returns
    -------
    list of Row
        One row for each length.

    Raises
    ------
    bench_turns.WrongResultError
        If an output or a gradient is wrong, before or after the timing.
    bench_train_reference.NoRoomError
        If a length is too long for the reference.
    """
    bench_turns.check_sizes(lengths, 2, heads=heads, num_features=num_features, head_dim=head_dim)

    def measure(n: int, show: Callable[[str], None]) -> Row:
        return _measure(Size(n, heads, num_features, head_dim, is_causal), seconds, describe, show)

    return bench_turns.rows_of(lengths, threads, measure, on_row)


def _measure(size: Size, seconds: float, describe: Describe | None, show: Callable[[str], None]) -> Row:
    """One row: build the contestants, check them, let them take turns, check the operator again."""
    n, inputs = size.n, make_inputs(size)
    show("making the reference")
    expected = bench_train_reference.expected(inputs, size.is_causal)
    show("checking rpe_tvm (the first call may compile)")
    operator, forward = step_of(OPERATOR, inputs, size.is_causal), forward_of_operator(inputs, size.is_causal)
    own, of_forward = _errors(operator(), expected), _errors(forward(), expected[:1])

    show("checking the peers")
    free = bench_machine.free_bytes()
    skipped = {name: bench_machine.shortage(step_bytes(name, size), free) for name in PEERS}
    steps: dict[str, Step] = {name: step_of(name, inputs, size.is_causal) for name in PEERS if skipped[name] is None}
    torch_fft_errors = None
    for name, step in steps.items():
        is_softmax = name == "sdpa_bias"
        truth = bench_train_reference.expected_softmax(inputs, size.is_causal) if is_softmax else expected
        of_peer = _errors(step(), truth)
        for part, error in of_peer.items():
            bench_turns.check_peer(PEERS[name], f"n={n}, {part}", error)
        if not is_softmax and torch_fft_errors is None:
            torch_fft_errors = of_peer
    if torch_fft_errors is None:  # neither form fits into memory: the same formula, one head at a time
        by_head = bench_train_reference.through_fft(inputs, size.is_causal, in_float64=False)
        torch_fft_errors = _errors(by_head, expected)
    _check(size, of_forward, torch_fft_errors)
    _check(size, own, torch_fft_errors)

    times, last = bench_turns.take_turns(
        {OPERATOR: operator, FORWARD: forward, **steps}, seconds, lambda count: show(f"round {count}")
    )
    # Once more: a race between threads or a reused buffer need not show at the first call.
    _check(size, _errors(last, expected), torch_fft_errors)

    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    return Row(
        n=n,
        algorithms="-" if describe is None else describe(n),
        forward_ms=medians[FORWARD],
        ms=medians[OPERATOR],
        peers=tuple(bench_turns.PeerTime(name, medians.get(name), skipped[name]) for name in PEERS),
        errors=own,
        torch_fft_errors=torch_fft_errors,
        rounds=len(times[OPERATOR]),
    )


def _errors(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """The error of each part that is in `results`."""
    return {
        part: bench_turns.rms_error(got.double().numpy(), want.numpy())
        for part, got, want in zip(PARTS, results, expected, strict=False)
    }


def _check(size: Size, errors: Errors, torch_fft_errors: Errors) -> None:
    ratio = CAUSAL_ERROR_RATIO if size.is_causal else bench_turns.ERROR_RATIO
    for part, error in errors.items():
        bench_turns.check_operator(f"n={size.n}, {part}", error, torch_fft_errors[part], ratio)


# --------------------------------------------------------------------------------------------------- output

_HEADINGS = (
    *("n", "algorithms", "forward ms", "step ms", "step / forward"),
    *(cell for title in PEERS.values() for cell in (f"{title} ms", "ratio")),
    *("gradient error", "torch.fft gradient error"),
)
_MEMORY_HEADINGS = ("n", "rpe_tvm MiB", *(cell for title in PEERS.values() for cell in (f"{title} MiB", "ratio")))


def table_header() -> str:
    """The two heading lines of the table."""
    return bench_output.table_header(_HEADINGS)


def table_line(row: Row) -> str:
    """One line of the table; of the gradients' errors the largest."""
    cells = [str(row.n), row.algorithms, bench_output.number(row.forward_ms), bench_output.number(row.ms)]
    cells.append(f"{row.ms / row.forward_ms:.1f}x")
    for peer in row.peers:
        ratio = row.ratio(peer.name)
        cells += [bench_output.number(peer.ms), "-" if ratio is None else f"{ratio:.1f}x"]
    largest = (max(each[part] for part in PARTS[1:]) for each in (row.errors, row.torch_fft_errors))
    return bench_output.table_line(_HEADINGS, [*cells, *(f"{error:.1e}" for error in largest)])


def notes(rows: Sequence[Row]) -> list[str]:
    """Why peers are missing, one line for each."""
    return [note for row in rows for note in bench_turns.skip_notes(row.n, row.peers, PEERS)]


def memory_header() -> str:
    """The two heading lines of the table of peak memory."""
    return bench_output.table_header(_MEMORY_HEADINGS)


def memory_line(found: Peaks) -> str:
    """One line of the table of peak memory; "~" stands before what was scaled from a smaller n."""
    cells = [str(found.n)]
    for peak in found.of:
        mark = "" if peak.measured_n == found.n else "~"
        cells.append(f"{mark}{peak.bytes / 2**20:.0f}")
        if peak.name != OPERATOR:
            cells.append(f"{mark}{found.ratio(peak.name):.1f}x")
    return bench_output.table_line(_MEMORY_HEADINGS, cells)


def memory_notes(found: Sequence[Peaks]) -> list[str]:
    """What was scaled, one line for each."""
    return [
        f"n={each.n}: memory of {PEERS[peak.name]} scaled from n={peak.measured_n}, which fits"
        for each in found
        for peak in each.of
        if peak.measured_n != each.n
    ]


def plot(rows: Sequence[Row], path: str, title: str) -> None:
    """Draw the time of a step over length, one line for each contestant and one for the forward pass alone."""
    series = {"rpe_tvm": [(row.n, row.ms) for row in rows], FORWARD: [(row.n, row.forward_ms) for row in rows]}
    for name, label in PEERS.items():
        times = [(row.n, peer.ms) for row in rows for peer in row.peers if peer.name == name]
        series[label] = [(n, ms) for n, ms in times if ms is not None]
    bench_output.plot(series, path, title, "time of one forward and backward, ms (median)")


def main(args: argparse.Namespace, describe: Describe | None = None) -> int:
    """Run `bench --mode train`: tables on stdout, progress on stderr; exit code 1 for a wrong result."""
    problem = bench_machine.obstacle(args.target, with_plot=args.plot is not None)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1

    import torch

    threads = args.threads or torch.get_num_threads()
    memory_lengths = args.memory_lengths or args.lengths
    settings = {**bench_output.attention_settings(args), "mode": "train", "memory_lengths": list(memory_lengths)}
    setting = bench_output.setting_of(args, threads)
    print(f"{bench_machine.cpu_name()}; forward and backward, {setting}\n\n{table_header()}", flush=True)
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
        for note in notes(rows):
            print(note)
        print(f"\nPeak memory of one forward and backward, above its inputs:\n\n{memory_header()}", flush=True)
        found = peaks(
            [Size(n, args.heads, args.features, args.head_dim, args.causal) for n in memory_lengths],
            threads,
            on_peaks=lambda each: print(memory_line(each), flush=True),
        )
    except (RpeTvmError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in memory_notes(found):
        print(note)
    if args.json is not None:
        memory = [each.to_json() for each in found]
        bench_output.write_json(args.json, "attention training", rows, settings, threads, memory=memory)
        print(f"measurement: {args.json}")
    if args.plot is not None:
        plot(rows, args.plot, f"Training with relative positions: {setting}\n{bench_machine.cpu_name()}")
        print(f"plot: {args.plot}")
    return 0
