"""The benchmark of training on an NVIDIA GPU: `bench --target cuda --mode train`.

As `rpe_tvm.bench_train`: steps are checked, then they take turns. As in `rpe_tvm.bench_cuda` the operator is measured
in CUDA graphs, too, where the GPU does not wait for the host, and what a peer cannot do costs its number, not the run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rpe_tvm import bench_cuda_clock, bench_cuda_machine, bench_output, bench_train_reference, bench_turns
from rpe_tvm.bench_cuda_clock import Failure
from rpe_tvm.bench_train import CAUSAL_ERROR_RATIO
from rpe_tvm.bench_train_steps import (
    OPERATOR,
    PARTS,
    PEERS,
    Inputs,
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

DEVICE = "cuda"
FORWARD = "rpe_tvm forward"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# Errors of 16-bit steps may be this many times the dtype's unit: torch.fft, by which float32 is judged, has no 16 bits.
UNITS = 8
SOFTMAX = "sdpa_bias"

Describe = Callable[[int, str], str]
Errors = Mapping[str, float]  # by part


@dataclass(frozen=True)
class Row:
    """The result at one length and dtype: medians in milliseconds, relative RMS errors against float64 for `PARTS`.

    `graph_ms` and `forward_graph_ms` are those of replays of a CUDA graph; None where it could not be captured.
    """

    n: int
    dtype: str
    algorithms: str
    forward_ms: float
    ms: float
    forward_graph_ms: float | None
    graph_ms: float | None
    peak_bytes: int
    peers: Mapping[str, float | str]
    errors: Errors
    torch_fft_errors: Errors | None

    @property
    def step_over_forward(self) -> float:
        """How many forward passes a step takes: in graphs, where both are there."""
        if self.graph_ms is None or self.forward_graph_ms is None:
            return self.ms / self.forward_ms
        return self.graph_ms / self.forward_graph_ms

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, the ratios included."""
        peers = {
            name: {"skipped": found} if isinstance(found, str) else {"ms": found, "ratio": found / self.ms}
            for name, found in self.peers.items()
        }
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "peers"}
        return {**fields, "step_over_forward": self.step_over_forward, "peers": peers}


def run(
    lengths: Sequence[int],
    dtypes: Sequence[str],
    heads: int = 8,
    num_features: int = 32,
    head_dim: int = 64,
    seconds: float = 4.0,
    is_causal: bool = False,
    describe: Describe | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    show: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check and time training steps of NPRF attention with relative positions and of its peers on the current GPU.

    Parameters and errors are those of `bench_train.run` and `bench_cuda.run`. A step takes query, key and value of
    `dtype` and a float32 bias to an output, and a given gradient of that to theirs.
    """
    bench_turns.check_sizes(lengths, 2, heads=heads, num_features=num_features, head_dim=head_dim)
    rows = []
    for n in lengths:
        for dtype in dtypes:
            size = Size(n, heads, num_features, head_dim, is_causal)
            rows.append(_measure(size, dtype, seconds, "-" if describe is None else describe(n, dtype), show))
            on_row(rows[-1])
    return rows


def _measure(size: Size, dtype: str, seconds: float, algorithms: str, show: Callable[[str], None]) -> Row:
    place, is_causal = f"n={size.n}, {dtype}", size.is_causal
    inputs = _on_gpu(make_inputs(size), dtype)
    show(f"{place}: making the reference")
    expected = bench_train_reference.through_fft(inputs, is_causal)
    torch_fft_errors = None
    if dtype == "float32":
        torch_fft_errors = _errors(bench_train_reference.through_fft(inputs, is_causal, in_float64=False), expected)

    def check(results: Sequence[torch.Tensor]) -> dict[str, float]:
        errors = _errors(results, expected)
        for part, error in errors.items():
            if torch_fft_errors is None:
                bench_turns.check_operator(f"{place}, {part}", error, _unit(dtype), UNITS)
            else:
                ratio = CAUSAL_ERROR_RATIO if is_causal else bench_turns.ERROR_RATIO
                bench_turns.check_operator(f"{place}, {part}", error, torch_fft_errors[part], ratio)
        return errors

    show(f"{place}: checking rpe_tvm (the first call may compile)")
    operator, forward = step_of(OPERATOR, inputs, is_causal), forward_of_operator(inputs, is_causal)
    errors = check(operator())
    check(forward())
    steps: dict[str, Step] = {OPERATOR: operator, FORWARD: forward}
    probes = {name: bench_cuda_clock.probe(step) for name, step in steps.items()}
    graphs = {
        name: bench_cuda_clock.attempt(functools.partial(bench_cuda_clock.graph_seconds, step))
        for name, step in steps.items()
    }
    peers: dict[str, float | str] = {}
    for name in PEERS:
        show(f"{place}: checking {PEERS[name]}")
        found = _checked_peer(name, inputs, size, seconds, expected)
        if isinstance(found, Failure):
            peers[name] = found.reason
        else:
            steps[name], probes[name] = found
    show(f"{place}: taking turns")
    turns = bench_cuda_clock.take_turns(steps, {name: probe.seconds for name, probe in probes.items()}, seconds)
    check(turns.output)
    peers |= turns.failures
    medians = {name: 1e3 * statistics.median(each) for name, each in turns.times.items() if name not in turns.failures}
    in_graph = {name: None if isinstance(found, Failure) else 1e3 * found[0] for name, found in graphs.items()}
    return Row(
        n=size.n,
        dtype=dtype,
        algorithms=algorithms,
        forward_ms=medians[FORWARD],
        ms=medians[OPERATOR],
        forward_graph_ms=in_graph[FORWARD],
        graph_ms=in_graph[OPERATOR],
        peak_bytes=probes[OPERATOR].peak_bytes,
        peers={name: peers[name] if name in peers else medians[name] for name in PEERS},
        errors=errors,
        torch_fft_errors=torch_fft_errors,
    )


def _checked_peer(
    name: str, inputs: Inputs, size: Size, seconds: float, expected: Sequence[torch.Tensor]
) -> tuple[Step, bench_cuda_clock.Probe] | Failure:
    """A peer's step and what it takes; softmax attention computes something else and is only run."""
    needed, free = step_bytes(name, size), bench_cuda_clock.free_bytes()
    if needed > free:
        return Failure(f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    in_dtype = inputs if name == SOFTMAX else _on_gpu(inputs, "float32")  # torch.fft has no 16-bit numbers
    step = step_of(name, in_dtype, size.is_causal)

    def check() -> bench_cuda_clock.Probe:
        results = step()
        if name != SOFTMAX:
            for part, error in _errors(results, expected).items():
                bench_turns.check_peer(PEERS[name], f"n={size.n}, {part}", error)
        del results
        return bench_cuda_clock.probe(step)

    found = bench_cuda_clock.attempt(check)
    if isinstance(found, Failure):
        return found
    if found.seconds > max(seconds, 1.0):
        return Failure(f"a step takes about {found.seconds:.1f} s, longer than the {seconds:g} s of --seconds")
    return step, found


def _on_gpu(inputs: Inputs, dtype: str) -> Inputs:
    """The inputs on the GPU; query, key, value and grad_out in `dtype`."""
    import torch

    kind = getattr(torch, dtype)
    rows = (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    query, key, value, grad_out = (x.detach().to(DEVICE, kind) for x in rows)
    return replace(
        inputs,
        query=query.requires_grad_(),
        key=key.requires_grad_(),
        value=value.requires_grad_(),
        rpe_bias=inputs.rpe_bias.detach().to(DEVICE).requires_grad_(),
        projection=inputs.projection.to(DEVICE),
        grad_out=grad_out,
    )


def _unit(dtype: str) -> float:
    import torch

    return float(torch.finfo(getattr(torch, dtype)).eps)


def _errors(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    return {
        part: float((got.double() - want).norm() / want.norm())
        for part, got, want in zip(PARTS, results, expected, strict=False)
    }


_HEADINGS = (
    *("n", "dtype", "algorithms", "forward ms", "step ms", "forward graph ms", "step graph ms", "step / forward"),
    *(f"{title} ms (ratio)" for title in PEERS.values()),
    *("peak MiB", "gradient error", "torch.fft gradient error"),
)


def table_header() -> str:
    """The two heading lines of the table."""
    return bench_output.table_header(_HEADINGS)


def table_line(row: Row) -> str:
    """One line of the table; of the gradients' errors the largest."""
    times = (row.forward_ms, row.ms, row.forward_graph_ms, row.graph_ms)
    cells = [str(row.n), row.dtype, row.algorithms, *map(bench_output.number, times), f"{row.step_over_forward:.2f}x"]
    for found in row.peers.values():
        cells.append("-" if isinstance(found, str) else f"{bench_output.number(found)} ({found / row.ms:.1f}x)")
    cells.append(f"{row.peak_bytes / 2**20:.0f}")
    for errors in (row.errors, row.torch_fft_errors):
        cells.append("-" if errors is None else f"{max(errors[part] for part in PARTS[1:]):.1e}")
    return bench_output.table_line(_HEADINGS, cells)


def main(args: argparse.Namespace, describe: Describe | None = None) -> int:
    """Run `bench --target cuda --mode train`: table on stdout, progress on stderr; exit code 1 for a wrong result or
    without a GPU. The JSON file is written again after each row.
    """
    problem = bench_cuda_machine.obstacle(with_plot=False)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1

    import torch

    settings = {**bench_output.attention_settings(args), "mode": "train"}
    gpu, setting = bench_cuda_machine.gpu_name(), bench_output.setting_of(args, threads=None)
    print(f"{gpu}; forward and backward, {setting}\n\n{table_header()}", flush=True)
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        print(table_line(row), flush=True)
        if args.json is not None:
            machine = bench_cuda_machine.environment()
            bench_output.write_json(args.json, "attention-cuda-train", rows, settings, threads=None, gpu=machine)

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
    for row in rows:
        for name, found in row.peers.items():
            if isinstance(found, str):
                print(f"n={row.n}, {row.dtype}: {PEERS[name]} skipped: {found}")
    if args.json is not None:
        print(f"measurement: {args.json}")
    return 0
