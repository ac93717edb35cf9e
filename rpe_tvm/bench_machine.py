"""What a benchmark has to know of the machine: whether it can run there, free memory, and what a reader asks about."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

# Share of the free memory that one contestant may take.
MEMORY_SHARE = 0.8


def obstacle(target: str, with_plot: bool) -> str | None:
    """What stands in the way of a measurement, found before minutes are spent on it."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"target {target} needs an x86-64 CPU, got {machine}; run the benchmark on such a machine"
    return missing_package(with_plot)


def missing_package(with_plot: bool) -> str | None:
    """Which package a measurement lacks, and how to install it."""
    if importlib.util.find_spec("torch") is None:
        return "the benchmark needs PyTorch, which is not installed; run: pip install torch"
    if with_plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib, which is not installed; run: pip install matplotlib"
    return None


def shortage(needed: int, free: int) -> str | None:
    """Why a contestant that needs so many bytes cannot run where `free` are free; None if it can."""
    if needed <= MEMORY_SHARE * free:
        return None
    return f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"


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


def environment(threads: int | None) -> dict[str, Any]:
    """What a reader needs to judge a measurement: CPU, threads (None on a GPU), versions, commit, date."""
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
