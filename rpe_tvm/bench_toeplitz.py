"""The benchmark of Toeplitz products: `toeplitz_matmul` against torch.fft, `grid_toeplitz_matmul` against the matrix.

As in `rpe_tvm.bench`, contestants are checked, then they take turns.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rpe_tvm import bench_machine, bench_output, bench_turns
from rpe_tvm.errors import RpeTvmError

if TYPE_CHECKING:
    import torch

GRID = (64, 64)

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """Medians and minima in milliseconds of one size, and relative RMS errors against float64 over sampled rows."""

    size: str
    ms: Mapping[str, float]
    min_ms: Mapping[str, float]
    errors: Mapping[str, float]
    rounds: int

    def ratio(self, peer: str) -> float:
        """How many times faster than `peer` the operator is, by medians."""
        return self.ms[peer] / self.ms["rpe_tvm"]

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, the ratios included."""
        return {**asdict(self), "ratios": {peer: self.ratio(peer) for peer in self.ms if peer != "rpe_tvm"}}

    def __str__(self) -> str:
        peers = "".join(
            f" {name} {ms:9.3f} ms ({self.ratio(name):.1f}x)," for name, ms in self.ms.items() if name != "rpe_tvm"
        )
        errors = ", ".join(f"{error:.1e}" for error in self.errors.values())
        return f"{self.size:>8}  rpe_tvm {self.ms['rpe_tvm']:8.3f} ms,{peers} errors {errors}"


def run(
    lengths: Sequence[int],
    heads: int = 4,
    head_dim: int = 64,
    threads: int | None = None,
    seconds: float = 8.0,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check and time the products at each length, and on a grid of 64 x 64.

    Parameters
    ----------
    lengths
        Sequence lengths, as many outputs as inputs; the batch is 1.
    heads, head_dim
        H and d.
    threads
        Threads of torch and of the operator; None: torch's present number.
    seconds
        Time budget for each row; every contestant runs at least three times.
    on_row
        Called with each row as soon as it is there.

    Returns
    -------
    list of Row
        One row for each length, and the grid's.

    Raises
    ------
    WrongResultError
        If a contestant's numbers are wrong, before or after the timing.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    rows = []
    try:
        with torch.no_grad():
            for n in lengths:
                rows.append(_line(n, heads, head_dim, seconds))
                on_row(rows[-1])
            rows.append(_grid(heads, head_dim, seconds))
            on_row(rows[-1])
    finally:
        torch.set_num_threads(before)
    return rows


def _line(n: int, heads: int, head_dim: int, seconds: float) -> Row:
    """One row: the product of n positions."""
    import torch

    from rpe_tvm import peers

    module = importlib.import_module("rpe_tvm.torch")
    generator = torch.Generator().manual_seed(n)
    weights = torch.randn(heads, 2 * n - 1, generator=generator)
    x = torch.randn(1, heads, n, head_dim, generator=generator)
    positions = bench_turns.sample_rows(n)
    index = np.arange(n) - positions[:, None] + n - 1
    expected = np.stack([w[index] @ v for w, v in zip(_float64(weights), _float64(x)[0], strict=True)])[None]
    contestants = {
        "rpe_tvm": lambda: module.toeplitz_matmul(weights, x),
        "torch.fft": lambda: peers.torch_fft_toeplitz(weights, x),
        "torch.fft contiguous": lambda: peers.torch_fft_toeplitz_contiguous(weights, x),
    }
    return _measure(str(n), contestants, positions, expected, seconds)


def _grid(heads: int, head_dim: int, seconds: float) -> Row:
    """One row: the product on a grid, against the matrix of all pairs of positions, which is made beforehand."""
    import torch

    module = importlib.import_module("rpe_tvm.torch")
    height, width = GRID
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(heads, 2 * height - 1, 2 * width - 1, generator=generator)
    x = torch.randn(1, heads, height, width, head_dim, generator=generator)
    row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
    offsets = row - row[:, None] + height - 1, column - column[:, None] + width - 1
    matrix = weights[:, offsets[0], offsets[1]]
    positions = bench_turns.sample_rows(height * width)
    expected = (_float64(matrix[:, positions.tolist()]) @ _float64(x.flatten(2, 3))[0])[None]
    contestants = {
        "rpe_tvm": lambda: module.grid_toeplitz_matmul(weights, x).flatten(2, 3),
        "dense matrix": lambda: matrix @ x.flatten(2, 3),
    }
    return _measure(f"{height}x{width}", contestants, positions, expected, seconds)


def _float64(x: torch.Tensor) -> Float64:
    return np.asarray(x.double().numpy())


def _measure(
    size: str,
    contestants: Mapping[str, Callable[[], torch.Tensor]],
    positions: npt.NDArray[np.int64],
    expected: Float64,
    seconds: float,
) -> Row:
    """Check the contestants, let them take turns, check the operator again."""
    errors = {name: bench_turns.relative_error(call(), positions, expected) for name, call in contestants.items()}
    _check(size, errors)
    times, output = bench_turns.take_turns(contestants, seconds, lambda count: None)
    # once more: a race between threads or a reused buffer need not show at the first call
    _check(size, {**errors, "rpe_tvm": bench_turns.relative_error(output, positions, expected)})
    return Row(
        size,
        {name: 1e3 * statistics.median(each) for name, each in times.items()},
        {name: 1e3 * min(each) for name, each in times.items()},
        errors,
        len(times["rpe_tvm"]),
    )


def _check(size: str, errors: Mapping[str, float]) -> None:
    """Raise WrongResultError unless the peers are right and the operator nearly as exact as the first of them."""
    own, *others = errors
    for name in others:  # the peers first: they are the operator's yardstick
        bench_turns.check_peer(name, size, errors[name])
    bench_turns.check_operator(size, errors[own], errors[others[0]])


def main(args: argparse.Namespace) -> int:
    """Run `bench --op toeplitz`: rows on stdout; exit code 1 for a wrong result."""
    import torch

    threads = args.threads or torch.get_num_threads()
    setting = f"float32, {args.heads} heads, d={args.head_dim}, {threads} threads"
    print(f"{bench_machine.cpu_name()}; {setting}; medians of turns\n")
    try:
        rows = run(
            args.lengths,
            heads=args.heads,
            head_dim=args.head_dim,
            threads=threads,
            seconds=args.seconds,
            on_row=lambda row: print(row, flush=True),
        )
    except RpeTvmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        settings = {"heads": args.heads, "head_dim": args.head_dim, "dtype": "float32"}
        bench_output.write_json(args.json, "toeplitz", rows, settings, threads)
        print(f"measurement: {args.json}")
    return 0
