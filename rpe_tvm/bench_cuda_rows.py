"""The results of the benchmark on GPUs: rows, their table and their plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpe_tvm import bench_output
from rpe_tvm.bench_peers import GPU_PEERS

OPERATOR = "rpe_tvm"


@dataclass(frozen=True)
class Result:
    """What was measured of one contestant: medians in milliseconds, the relative RMS error against float64 over sampled
    rows, and the memory that a call takes at most beyond its inputs; None where it was not run, and why.
    """

    name: str
    ms: float | None = None
    graph_ms: float | None = None
    error: float | None = None
    peak_bytes: int | None = None
    skipped: str | None = None
    graph_skipped: str | None = None


@dataclass(frozen=True)
class Row:
    """The results at one length and dtype. `data_bytes`: of query, key, value, bias, projection and output."""

    n: int
    dtype: str
    algorithm: str
    data_bytes: int
    output_bytes: int
    torch_fft_error: float
    operator: Result
    peers: tuple[Result, ...]

    def ratio(self, peer: str) -> float | None:
        """How many times faster than `peer` the operator is."""
        of_peer = {each.name: each.ms for each in self.peers}[peer]
        return None if of_peer is None or self.operator.ms is None else of_peer / self.operator.ms

    def memory(self, result: Result) -> float | None:
        """Peak memory with inputs and output, over the bytes of these alone."""
        if result.peak_bytes is None:
            return None
        return (self.data_bytes - self.output_bytes + result.peak_bytes) / self.data_bytes

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, ratios and memory included."""

        def values(result: Result) -> dict[str, Any]:
            return {
                "ms": result.ms,
                "graph_ms": result.graph_ms,
                "error": result.error,
                "peak_bytes": result.peak_bytes,
                "memory": self.memory(result),
                "skipped": result.skipped,
                "graph_skipped": result.graph_skipped,
            }

        return {
            "n": self.n,
            "dtype": self.dtype,
            "algorithm": self.algorithm,
            "data_bytes": self.data_bytes,
            "torch_fft_error": self.torch_fft_error,
            **values(self.operator),
            "peers": {each.name: {"ratio": self.ratio(each.name), **values(each)} for each in self.peers},
        }


_HEADINGS = (
    *("n", "dtype", "algorithm", "ms", "graph ms"),
    *(f"{title} ms (ratio)" for title in GPU_PEERS.values()),
    *(f"{GPU_PEERS[name]} graph ms" for name in ("sdpa", "sdpa_bias")),
    *("memory", "error", "torch.fft error"),
)


def table_header() -> str:
    """The two heading lines of the table."""
    return bench_output.table_header(_HEADINGS)


def table_line(row: Row) -> str:
    """One line of the table; a ratio says how many times faster than the peer the operator is, `memory` how many times
    the bytes of its inputs and output the operator takes at most.
    """
    peers = {each.name: each for each in row.peers}
    memory = row.memory(row.operator)
    cells = [
        *(str(row.n), row.dtype, row.algorithm),
        *(bench_output.number(ms) for ms in (row.operator.ms, row.operator.graph_ms)),
    ]
    for name, peer in peers.items():
        ratio = row.ratio(name)
        cells.append(bench_output.number(peer.ms) + ("" if ratio is None else f" ({ratio:.1f}x)"))
    cells += [bench_output.number(peers[name].graph_ms) for name in ("sdpa", "sdpa_bias")]
    cells += ["-" if memory is None else f"{memory:.1f}x"]
    return bench_output.table_line(_HEADINGS, [*cells, f"{row.operator.error:.1e}", f"{row.torch_fft_error:.1e}"])


def notes(rows: Sequence[Row]) -> list[str]:
    """Why numbers are missing, one line for each."""
    titles = {OPERATOR: OPERATOR, **GPU_PEERS}
    lines = []
    for row in rows:
        for each in (row.operator, *row.peers):
            place = f"n={row.n}, {row.dtype}: {titles[each.name]}"
            if each.skipped is not None:
                lines.append(f"{place} skipped: {each.skipped}")
            if each.graph_skipped is not None:
                lines.append(f"{place} not in a CUDA graph: {each.graph_skipped}")
    return lines


def plot(rows: Sequence[Row], path: str | Path, title: str) -> None:
    """Draw time over length, one panel for each dtype, one line for the operator and each peer."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        lines = panels.setdefault(row.dtype, {label: [] for label in (OPERATOR, *GPU_PEERS.values())})
        for label, result in zip(lines, (row.operator, *row.peers), strict=True):
            if result.ms is not None:
                lines[label].append((row.n, result.ms))
    bench_output.plot_panels(panels, path, title, "time of one call, ms (median)")
