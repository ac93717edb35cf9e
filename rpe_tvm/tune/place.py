"""Where candidates run: on this machine, or on boards (`tune.boards`)."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rpe_tvm.tune.measure import Contestant, Timing, measure


class Place(Protocol):
    """Where candidates are checked and timed."""

    @property
    def jobs(self) -> int:
        """How many calls of `measure` run at once, each on a machine of its own."""

    @property
    def device(self) -> Mapping[str, Any]:
        """The name as ``device``, and `plan.wisdom.EMULATED` where times mean nothing; goes to manifests."""

    def measure(self, contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float) -> list[Timing]:
        """Check and time contestants in turns, as `tune.measure.measure` does."""


class ThisMachine:
    """The machine that tunes, one candidate at a time."""

    jobs = 1

    @functools.cached_property
    def device(self) -> Mapping[str, Any]:
        """The CPU's name."""
        return {"device": _cpu_name()}

    def measure(self, contestants: Sequence[Contestant], threads: int, seconds: float, timeout: float) -> list[Timing]:
        """Check and time contestants in a process of their own."""
        return measure(contestants, threads, seconds, timeout)


def _cpu_name() -> str:
    """The CPU's name as the kernel gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
