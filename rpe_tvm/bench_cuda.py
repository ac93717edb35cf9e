"""The benchmark of the forward pass on an NVIDIA GPU: `bench --target cuda`.

As `rpe_tvm.bench`: contestants are checked, then they take turns. What a peer cannot do costs its number, not the run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rpe_tvm import (
    bench_cuda_clock,
    bench_cuda_machine,
    bench_cuda_reference,
    bench_output,
    bench_peers,
    bench_problem,
    bench_turns,
)
from rpe_tvm.bench_cuda_clock import Failure
from rpe_tvm.bench_cuda_rows import OPERATOR, Result, Row, notes, plot, table_header, table_line
from rpe_tvm.bench_peers import GPU_PEERS
from rpe_tvm.errors import RpeTvmError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")
DEVICE = "cuda"

# Up to this length calls are measured in a CUDA graph, too: there, launching may take longer than computing.
LONGEST_GRAPH = 4096
GRAPH_PEERS = ("sdpa", "sdpa_bias", "sdpa_bias_cudnn")
# Their time grows with the square of the length, that of the other peers about linearly.
SOFTMAX_PEERS = (*GRAPH_PEERS, "flex_bias")
# How many times longer a sequence may be for which the time of a call is foreseen.
FORESIGHT = 16
# Peers may always take this long for a call, however short --seconds is.
LEAST_LIMIT = 1.0

Call = Callable[[], "torch.Tensor"]
# From length and dtype to the algorithm.
Describe = Callable[[int, str], str]
# From dtype and peer to the last length measured and the seconds of a call there.
Known = dict[tuple[str, str], tuple[int, float]]


def run(
    lengths: Sequence[int],
    dtypes: Sequence[str] = DTYPES,
    heads: int = 8,
    num_features: int = 32,
    head_dim: int = 64,
    seconds: float = 4.0,
    is_causal: bool = False,
    describe: Describe | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    show: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check and time NPRF attention with relative positions against its peers, at each length and dtype.

    Every contestant is timed end to end from query, key and value of that dtype, on the current GPU. Bias and
    projection are float32; the bias mask of softmax attention is made beforehand, of that dtype.

    Parameters
    ----------
    lengths
        Sequence lengths, n_q = n_k; ascending ones let it foresee which peers would take too long.
    dtypes
        Of `DTYPES`.
    heads, num_features, head_dim
        H, m and d; the batch is 1.
    seconds
        Time budget for each row. Every contestant has its share and runs at least three times; a peer of which one call
        takes longer than all of it is skipped.
    is_causal
        Whether query i sees keys j <= i only, for all contestants.
    describe
        Says for a length and dtype which algorithm the operator takes; None: the column stays "-".
    on_row
        Called with each row as soon as it is there.
    show
        Called with what is being done.

    Returns
    -------
    list of Row
        One row for each length and dtype.

    Raises
    ------
    WrongResultError
        If the operator's numbers are wrong, before or after the timing, or the formula's that they are measured by.
        Other peers whose numbers are wrong are skipped.
    """
    import torch

    bench_turns.check_sizes(lengths, 1, heads=heads, num_features=num_features, head_dim=head_dim)
    known: Known = {}
    rows = []
    for n in lengths:
        made = bench_problem.make_inputs(n, heads, num_features, head_dim)
        for dtype in dtypes:
            with torch.no_grad():
                inputs = made.to(DEVICE, getattr(torch, dtype))
                algorithm = "-" if describe is None else describe(n, dtype)
                rows.append(_measure(inputs, dtype, algorithm, seconds, is_causal, known, show))
            on_row(rows[-1])
    return rows


@dataclass(frozen=True)
class _Checked:
    """A contestant whose numbers are right: its error, and what a call of it takes."""

    error: float
    probe: bench_cuda_clock.Probe


def _measure(
    inputs: bench_problem.Inputs,
    dtype: str,
    algorithm: str,
    seconds: float,
    is_causal: bool,
    known: Known,
    show: Callable[[str], None],
) -> Row:
    """One row: build the contestants, check them, let them take turns, check the operator again."""
    n = inputs.query.shape[2]
    place = f"n={n}, {dtype}"
    rows = bench_turns.sample_rows(n)

    show(f"{place}: checking rpe_tvm (the first call may compile)")
    expected = bench_cuda_reference.attention_rows(rows, inputs, is_causal)
    operator = bench_problem.operator_call(inputs, is_causal)
    error = bench_turns.relative_error(operator(), rows, expected)
    calls: dict[str, Call] = {OPERATOR: operator}
    checked = {OPERATOR: _Checked(error, bench_cuda_clock.probe(operator))}

    softmax = {biased: bench_cuda_reference.softmax_rows(rows, inputs, is_causal, biased) for biased in (False, True)}
    peers, skipped = bench_peers.gpu_peer_calls(inputs, is_causal, bench_cuda_clock.free_bytes())
    for name, call in peers.items():
        show(f"{place}: checking {GPU_PEERS[name]}")
        right = softmax[name != "sdpa"] if name in SOFTMAX_PEERS else expected
        found = _too_long(foreseen(known, dtype, name, n), seconds) or _checked_peer(name, place, call, rows, right)
        if isinstance(found, _Checked):
            known[dtype, name] = n, found.probe.seconds
            found = _too_long(found.probe.seconds, seconds) or found
        if isinstance(found, Failure):
            skipped[name] = found.reason
        else:
            calls[name], checked[name] = call, found

    fft_errors = [checked[name].error for name in peers if name in checked and name not in SOFTMAX_PEERS]
    if not fft_errors:
        raise bench_turns.WrongResultError(
            f"Cannot check rpe_tvm at {place}: expected a result of the formula through torch.fft, got "
            f"{skipped['torch_fft_by_feature']}; no speed is shown: make room on the GPU, or measure shorter sequences"
        )
    bench_turns.check_operator(place, error, fft_errors[0])

    def check(place: str, output: torch.Tensor) -> None:
        bench_turns.check_operator(place, bench_turns.relative_error(output, rows, expected), fft_errors[0])

    graphs = _in_graphs(calls, place, check, show) if n <= LONGEST_GRAPH else {}
    show(f"{place}: taking turns")
    turns = bench_cuda_clock.take_turns(calls, {name: each.probe.seconds for name, each in checked.items()}, seconds)
    # Once more: a race between threads or a reused buffer need not show at the first call.
    check(place, turns.output)

    skipped.update(turns.failures)
    for name, each in turns.times.items():
        if each:
            known[dtype, name] = n, statistics.median(each)

    def result(name: str) -> Result:
        if name in skipped:
            return Result(name, skipped=skipped[name])
        graph = graphs.get(name)
        return Result(
            name,
            ms=1e3 * statistics.median(turns.times[name]),
            graph_ms=1e3 * graph if isinstance(graph, float) else None,
            error=checked[name].error,
            peak_bytes=checked[name].probe.peak_bytes,
            graph_skipped=graph.reason if isinstance(graph, Failure) else None,
        )

    output_bytes = _bytes(turns.output)
    arrays = (inputs.query, inputs.key, inputs.value, inputs.rpe_bias, inputs.projection)
    return Row(
        n=n,
        dtype=dtype,
        algorithm=algorithm,
        data_bytes=sum(map(_bytes, arrays)) + output_bytes,
        output_bytes=output_bytes,
        torch_fft_error=fft_errors[0],
        operator=result(OPERATOR),
        peers=tuple(map(result, GPU_PEERS)),
    )


def _in_graphs(
    calls: Mapping[str, Call],
    place: str,
    check: Callable[[str, torch.Tensor], None],
    show: Callable[[str], None],
) -> dict[str, float | Failure]:
    """Seconds of a call in a CUDA graph, by contestant; the operator's result there is checked, too."""
    found: dict[str, float | Failure] = {}
    for name in (OPERATOR, *GRAPH_PEERS):
        if name in calls:
            show(f"{place}: {name} in a CUDA graph")
            replayed = bench_cuda_clock.attempt(functools.partial(bench_cuda_clock.graph_seconds, calls[name]))
            found[name] = replayed if isinstance(replayed, Failure) else replayed[0]
            if name == OPERATOR and not isinstance(replayed, Failure):
                check(f"{place} in a CUDA graph", replayed[1])
    return found


def _checked_peer(
    name: str, place: str, call: Call, rows: bench_problem.Rows, expected: bench_problem.Float64
) -> _Checked | Failure:
    def check() -> _Checked:
        error = bench_turns.relative_error(call(), rows, expected)
        bench_turns.check_peer(GPU_PEERS[name], place, error)
        return _Checked(error, bench_cuda_clock.probe(call))

    return bench_cuda_clock.attempt(check)


def foreseen(known: Known, dtype: str, name: str, n: int) -> float:
    """Seconds that a call of a peer will take at length n, from the last length measured; 0 where that says nothing."""
    last, seconds = known.get((dtype, name), (n, 0.0))
    if n > FORESIGHT * last:
        return 0.0  # most of a short call is launching
    return seconds * (n / last) ** (2 if name in SOFTMAX_PEERS else 1)


def _too_long(of_call: float, seconds: float) -> Failure | None:
    if of_call <= max(seconds, LEAST_LIMIT):
        return None
    return Failure(f"a call takes about {of_call:.1f} s, longer than the {seconds:g} s of --seconds")


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


# --------------------------------------------------------------------------------------------- command line


def main(args: argparse.Namespace, describe: Describe | None = None) -> int:
    """Run `bench --target cuda`: table on stdout, progress on stderr; exit code 1 for a wrong result or without a GPU.

    The JSON file is written again after each row, so that a run that ends early leaves what it has.
    """
    problem = bench_cuda_machine.obstacle(with_plot=args.plot is not None)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1

    import torch

    settings = bench_output.attention_settings(args)
    gpu, setting = bench_cuda_machine.gpu_name(), bench_output.setting_of(args, threads=None)
    print(f"{gpu}; {setting}\n\n{table_header()}", flush=True)
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        print(table_line(row), flush=True)
        if args.json is not None:
            bench_output.write_json(
                args.json, "attention-cuda", rows, settings, threads=None, gpu=bench_cuda_machine.environment()
            )

    try:
        run(
            args.lengths,
            args.dtypes,
            heads=args.heads,
            num_features=args.features,
            head_dim=args.head_dim,
            seconds=args.seconds,
            is_causal=args.causal,
            describe=describe,
            on_row=on_row,
            show=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except (RpeTvmError, ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in notes(rows):
        print(note)
    if args.json is not None:
        print(f"measurement: {args.json}")
    if args.plot is not None:
        plot(rows, args.plot, f"Attention with relative positions: {setting}\n{gpu}")
        print(f"plot: {args.plot}")
    return 0
