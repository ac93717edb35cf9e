"""What this machine's CPU can do, from /proc/cpuinfo."""

from __future__ import annotations

import functools
from pathlib import Path

from rpe_tvm.machine import ARM, this_machine
from rpe_tvm.runtime.hwcap import arm_flags

CPUINFO = Path("/proc/cpuinfo")


@functools.lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The flags of this machine's CPU as /proc/cpuinfo lists them; empty where there is none (other than Linux)."""
    here = this_machine()
    flags = parse_flags(_cpuinfo(), "Features" if here in ARM else "flags")
    return arm_flags(here) if here in ARM and not flags else flags


def cpu_identity() -> list[str]:
    """What tells this machine's CPU from others in /proc/cpuinfo: vendor, family, model and flags."""
    names = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part", "CPU variant")
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    found = {f"{name.strip()}: {value.strip()}" for name, _, value in lines if name.strip() in names}
    return [*sorted(found), *sorted(cpu_flags())]


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def parse_flags(text: str, key: str = "flags") -> frozenset[str]:
    """The flags that every processor in `text`, the content of /proc/cpuinfo, has; `key` is their line's name."""
    processors = [
        frozenset(value.split())
        for name, _, value in (line.partition(":") for line in text.splitlines())
        if name.strip() == key
    ]
    return frozenset.intersection(*processors) if processors else frozenset()
