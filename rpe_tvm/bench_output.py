"""What the benchmarks write: numbers in tables, JSON files, plots."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rpe_tvm import bench_machine


class Row(Protocol):
    """A row of any benchmark."""

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""


def number(ms: float | None) -> str:
    """Milliseconds to three digits, "-" where there are none."""
    if ms is None:
        return "-"
    return f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"


def table_header(headings: Sequence[str]) -> str:
    """The two heading lines of a table; Markdown, and aligned for the eye."""
    rule = "|".join("-" * (width + 1) + ":" for width in _widths(headings))
    return f"{table_line(headings, headings)}\n|{rule}|"


def table_line(headings: Sequence[str], cells: Sequence[str]) -> str:
    """One line of the table under `headings`."""
    padded = (f" {cell:>{width}} " for cell, width in zip(cells, _widths(headings), strict=True))
    return f"|{'|'.join(padded)}|"


def _widths(headings: Sequence[str]) -> list[int]:
    wide = {"algorithm": 16, "algorithms": 28, "dtype": 8}
    return [wide.get(heading, max(len(heading), 7)) for heading in headings]


def write_json(
    path: str | Path,
    benchmark: str,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    threads: int | None,
    **more: Any,
) -> None:
    """Write the measurement with its settings and environment; a file is complete or is not there."""
    document = {
        "format": 1,
        "benchmark": benchmark,
        **bench_machine.environment(threads),
        "settings": dict(settings),
        "rows": [row.to_json() for row in rows],
        **more,
    }
    text = json.dumps(document, indent=2) + "\n"
    write_and_rename(Path(path), lambda staged: staged.write_text(text, encoding="utf-8"))


def plot(series: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, title: str, ylabel: str) -> None:
    """Draw milliseconds over length, both logarithmic; of up to seven series by label, the operator's is the first."""
    plot_panels({"": series}, path, title, ylabel)


def plot_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: str | Path, title: str, ylabel: str
) -> None:
    """As `plot`, with several panels by title, side by side on the same scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 7 * len(panels), 5), layout="constrained")
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, series) in zip(drawn, panels.items(), strict=True):
        _draw(axes, series)
        axes.set_title(name)
    drawn[0].set_ylabel(ylabel)
    figure.suptitle(title)
    write_and_rename(Path(path), lambda staged: figure.savefig(staged, dpi=150))


def _draw(axes: Any, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    colours = ("#0072b2", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
    styles = list(zip("osD^vPX", colours, strict=True))
    for (label, points), (marker, colour) in zip(series.items(), styles[: len(series)], strict=True):
        if points:
            lengths, milliseconds = zip(*points, strict=True)
            width = 2.5 if label == "rpe_tvm" else 1.5
            axes.plot(lengths, milliseconds, marker=marker, color=colour, linewidth=width, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({n for points in series.values() for n, _ in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sequence length n")
    axes.grid(True, which="major", color="#dddddd")
    axes.legend(frameon=False)


def write_and_rename(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as staging:
        staged = Path(staging) / path.name
        write(staged)
        os.replace(staged, path)


def attention_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of a benchmark of attention, for its JSON file."""
    return {
        "target": args.target,
        "lengths": list(args.lengths),
        "heads": args.heads,
        "features": args.features,
        "head_dim": args.head_dim,
        "seconds": args.seconds,
        "causal": args.causal,
        "feature_map": "nprf",
        "dtype": ", ".join(args.dtypes),
    }


def setting_of(args: argparse.Namespace, threads: int | None) -> str:
    """The same in a line of text, for the head of a table; on a GPU without threads."""
    shape = f"{args.heads} heads, m={args.features}, d={args.head_dim}{', causal' if args.causal else ''}"
    on = "" if threads is None else f", {threads} {'thread' if threads == 1 else 'threads'}"
    return f"{', '.join(args.dtypes)}, {shape}{on}"
