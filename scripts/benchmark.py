"""Runs all benchmarks of a target one after the other and writes their JSON files and plots.

    python scripts/benchmark.py --threads 2       # x86.json, x86-train.json, x86-toeplitz.json and two plots
    python scripts/benchmark.py --target cuda     # cuda.json and its plot, cuda-toeplitz.json

Close other programs first. Each benchmark is a command of its own, printed in front of its table. One that fails, for a
wrong result perhaps, does not stop the others; its files stay as they were.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def gpu_commands(out: Path) -> list[list[str]]:
    """The arguments of ``python -m rpe_tvm`` for each benchmark on an NVIDIA GPU."""
    common = ["--target", "cuda", "--heads", "8", "--head-dim", "64"]
    lengths = "1024,2048,4096,16384,65536,262144"
    return [
        ["bench", *common, "--features", "32", "--lengths", lengths, *_files(out / "cuda", with_plot=True)],
        ["bench", "--op", "toeplitz", *common, *_files(out / "cuda-toeplitz", with_plot=False)],
    ]


def commands(out: Path, threads: int) -> list[list[str]]:
    """The arguments of ``python -m rpe_tvm`` for each benchmark on x86 CPUs."""
    lengths, training_lengths = "512,1024,2048,4096,8192,16384", "1024,2048,4096,8192"
    attention = ["--target", "x86", "--heads", "4", "--features", "32", "--head-dim", "64"]
    common = ["--threads", str(threads)]
    return [
        ["bench", *attention, "--lengths", lengths, *common, *_files(out / "x86", with_plot=True)],
        [
            *("bench", "--mode", "train", *attention, "--lengths", training_lengths),
            *("--memory-lengths", f"{training_lengths},16384", *common, *_files(out / "x86-train", with_plot=True)),
        ],
        [
            *("bench", "--op", "toeplitz", "--heads", "4", "--head-dim", "64", "--lengths", lengths),
            *(*common, *_files(out / "x86-toeplitz", with_plot=False)),
        ],
    ]


def _files(stem: Path, with_plot: bool) -> list[str]:
    return ["--json", f"{stem}.json", *(["--plot", f"{stem}.png"] if with_plot else [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=["x86", "cuda"], default="x86", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", metavar="DIR", help="where to write")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads: expected a positive number, got {args.threads}")
    failed = []
    for arguments in gpu_commands(args.out) if args.target == "cuda" else commands(args.out, args.threads):
        shown = shlex.join(["python", "-m", "rpe_tvm", *arguments])
        print(f"\n$ {shown}", flush=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "rpe_tvm", *arguments], env={**os.environ, "PYTHONPATH": path}, check=False
        )
        if done.returncode != 0:
            failed.append(shown)
    for each in failed:
        print(f"failed: {each}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
