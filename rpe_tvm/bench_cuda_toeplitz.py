"""The benchmark of Toeplitz products on an NVIDIA GPU: `bench --op toeplitz --target cuda`.

`toeplitz_matmul` and its gradients against torch.fft and the dense matrix. As in `rpe_tvm.bench_cuda`, contestants are
checked, then they take turns, and what a peer cannot do costs its number, not the run.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rpe_tvm import bench_cuda_clock, bench_cuda_machine, bench_output, bench_turns
from rpe_tvm.bench_cuda_clock import Failure
from rpe_tvm.errors import RpeTvmError

if TYPE_CHECKING:
    import torch

    Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# The product, or the gradients of weights and x.
Output = Any
Call = Callable[[], Output]
OPERATOR = "rpe_tvm"
DEVICE = "cuda"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
# Up to this length the matrix of a head takes 256 MiB at most.
LONGEST_DENSE = 8192
# Up to this length calls are measured in a CUDA graph, too: there, launching may take longer than computing.
LONGEST_GRAPH = 8192
MODES = ("forward", "train")


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds of one length, also in a CUDA graph, relative RMS errors against float64 over sampled
    rows, bytes that a call takes at most beyond its inputs, and why peers are missing.

    `data_bytes`: of inputs and outputs, which every product has to read and write. `mode`: the product, or the product
    and the gradients of x and of the weights.
    """

    n: int
    mode: str
    data_bytes: int
    ms: Mapping[str, float]
    graph_ms: Mapping[str, float]
    errors: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def ratio(self, peer: str) -> float:
        """How many times faster than `peer` the operator is, by medians."""
        return self.ms[peer] / self.ms[OPERATOR]

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, the ratios included."""
        return {**asdict(self), "ratios": {peer: self.ratio(peer) for peer in self.ms if peer != OPERATOR}}

    def __str__(self) -> str:
        def time(name: str) -> str:
            graph = f" ({self.graph_ms[name]:.3f} in a graph)" if name in self.graph_ms else ""
            ratio = "" if name == OPERATOR else f" {self.ratio(name):.1f}x"
            return f"{name} {self.ms[name]:.3f} ms{graph}{ratio}"

        errors = ", ".join(f"{error:.1e}" for error in self.errors.values())
        return f"{self.n:>7} {self.mode:<7}  {'; '.join(map(time, self.ms))}; errors {errors}"


def run(
    lengths: Sequence[int] = LENGTHS,
    heads: int = 8,
    head_dim: int = 64,
    seconds: float = 4.0,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check and time the product, and the product with its gradients, at each length.

    Parameters
    ----------
    lengths
        Sequence lengths, as many outputs as inputs; the batch is 1, and all is float32.
    heads, head_dim
        H and d.
    seconds
        Time budget for each row; every contestant runs at least three turns.
    on_row
        Called with each row as soon as it is there.

    Returns
    -------
    list of Row
        Two rows for each length.

    Raises
    ------
    WrongResultError
        If the operator's numbers are wrong, before or after the timing, or those of torch.fft that they are measured
        by. Other peers whose numbers are wrong are skipped.
    """
    bench_turns.check_sizes(lengths, 1, heads=heads, head_dim=head_dim)
    rows = []
    for n in lengths:
        for mode in MODES:
            rows.append(_row(n, mode, heads, head_dim, seconds))
            on_row(rows[-1])
    return rows


def _row(n: int, mode: str, heads: int, head_dim: int, seconds: float) -> Row:
    import torch

    from rpe_tvm import peers

    module = importlib.import_module("rpe_tvm.torch")
    generator = torch.Generator().manual_seed(n)
    weights = torch.randn(heads, 2 * n - 1, generator=generator).to(DEVICE)
    x, grad = (torch.randn(1, heads, n, head_dim, generator=generator).to(DEVICE) for _ in range(2))
    products: dict[str, Product] = {
        OPERATOR: module.toeplitz_matmul,
        "torch.fft": peers.torch_fft_toeplitz,
        "torch.fft contiguous": peers.torch_fft_toeplitz_contiguous,
    }
    positions = bench_turns.sample_rows(n)
    index = torch.from_numpy(np.arange(n) - positions[:, None] + n - 1).to(DEVICE)
    if mode == "forward":
        calls: dict[str, Call] = {
            name: functools.partial(_forward, each, weights, x) for name, each in products.items()
        }
        expected = _numpy(weights.double()[:, index] @ x.double())
        if n <= LONGEST_DENSE:
            matrix = _matrix(weights, n)
            calls["dense matrix"] = lambda: matrix @ x
        data = weights.nbytes + 2 * x.nbytes
        return _measure(n, mode, data, calls, lambda out: bench_turns.relative_error(out, positions, expected), seconds)

    calls = {name: functools.partial(_step, each, weights, x, grad) for name, each in products.items()}
    # the gradient of x is the product with the transposed matrix
    of_x = _numpy(weights.double()[:, 2 * n - 2 - index] @ grad.double())
    offsets = bench_turns.sample_rows(2 * n - 1)
    of_weights = _numpy(torch.stack([_weight_gradient(x, grad, int(offset) - (n - 1)) for offset in offsets], 1))

    def error_of(gradients: Output) -> float:
        found = _numpy(gradients[0][:, offsets.tolist()].double())
        # NaN where either is
        return float(
            np.max(
                [bench_turns.rms_error(found, of_weights), bench_turns.relative_error(gradients[1], positions, of_x)]
            )
        )

    return _measure(n, mode, 2 * weights.nbytes + 4 * x.nbytes, calls, error_of, seconds)


def _numpy(x: torch.Tensor) -> Any:
    return x.cpu().numpy()


def _weight_gradient(x: torch.Tensor, grad: torch.Tensor, t: int) -> torch.Tensor:
    """dw[t] = sum of g_i x_{i+t} of each head, in float64."""
    n = x.shape[2]
    return (grad[:, :, max(-t, 0) : n - max(t, 0)].double() * x[:, :, max(t, 0) : n + min(t, 0)]).sum((0, 2, 3))


def _forward(product: Product, weights: torch.Tensor, x: torch.Tensor) -> Output:
    import torch

    with torch.no_grad():
        return product(weights, x)


def _step(product: Product, weights: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> Output:
    """The gradients of weights and x, after the product."""
    import torch

    inputs = weights.detach().requires_grad_(), x.detach().requires_grad_()
    return torch.autograd.grad(product(*inputs), inputs, grad)


def _matrix(weights: torch.Tensor, n: int) -> torch.Tensor:
    """The dense matrices ``[H, n, n]``, made beforehand: row i is the window of weights that starts at n - 1 - i."""
    return weights.unfold(1, n, 1).flip(1).contiguous()


def _measure(
    n: int,
    mode: str,
    data_bytes: int,
    contestants: Mapping[str, Call],
    error_of: Callable[[Output], float],
    seconds: float,
) -> Row:
    """Check the contestants, let them take turns, check the operator again."""
    place = f"n={n}, {mode}"
    errors: dict[str, float] = {}
    probes: dict[str, bench_cuda_clock.Probe] = {}
    skipped: dict[str, str] = {}

    def check(name: str, call: Call) -> bench_cuda_clock.Probe:
        errors[name] = error_of(call())
        if name != OPERATOR:
            bench_turns.check_peer(name, place, errors[name])
        return bench_cuda_clock.probe(call)

    for name, call in contestants.items():
        if name in (OPERATOR, "torch.fft"):  # the yardstick has to be there
            probes[name] = check(name, call)
            continue
        found = bench_cuda_clock.attempt(functools.partial(check, name, call))
        if isinstance(found, Failure):
            skipped[name] = found.reason
        else:
            probes[name] = found
    bench_turns.check_operator(place, errors[OPERATOR], errors["torch.fft"])

    calls = {name: contestants[name] for name in probes}
    graphs: dict[str, float] = {}
    if n <= LONGEST_GRAPH:
        for name, call in calls.items():
            replayed = bench_cuda_clock.attempt(functools.partial(bench_cuda_clock.graph_seconds, call))
            if isinstance(replayed, Failure):
                skipped[f"{name} in a graph"] = replayed.reason
                continue
            graphs[name] = 1e3 * replayed[0]
            if name == OPERATOR:
                bench_turns.check_operator(f"{place} in a CUDA graph", error_of(replayed[1]), errors["torch.fft"])
    turns = bench_cuda_clock.take_turns(calls, {name: each.seconds for name, each in probes.items()}, seconds)
    # Once more: a race between threads or a reused buffer need not show at the first call.
    bench_turns.check_operator(place, error_of(turns.output), errors["torch.fft"])
    skipped |= turns.failures
    return Row(
        n,
        mode,
        data_bytes,
        {name: 1e3 * statistics.median(each) for name, each in turns.times.items() if name not in turns.failures},
        graphs,
        errors,
        {name: each.peak_bytes for name, each in probes.items()},
        skipped,
    )


def main(args: argparse.Namespace) -> int:
    """Run `bench --op toeplitz --target cuda`: rows on stdout; exit code 1 for a wrong result or without a GPU.

    The JSON file is written again after each row, so that a run that ends early leaves what it has.
    """
    problem = bench_cuda_machine.obstacle(with_plot=False)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1

    import torch

    print(f"{bench_cuda_machine.gpu_name()}; float32, {args.heads} heads, d={args.head_dim}; medians of turns\n")
    settings = {"heads": args.heads, "head_dim": args.head_dim, "dtype": "float32"}
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        for name, reason in row.skipped.items():
            print(f"        {name} skipped: {reason}", flush=True)
        if args.json is not None:
            machine = bench_cuda_machine.environment()
            bench_output.write_json(args.json, "toeplitz-cuda", rows, settings, threads=None, gpu=machine)

    try:
        run(args.lengths, heads=args.heads, head_dim=args.head_dim, seconds=args.seconds, on_row=on_row)
    except (RpeTvmError, ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        print(f"measurement: {args.json}")
    return 0
