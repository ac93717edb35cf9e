"""From the machine of a CPU target to its schedules."""

from __future__ import annotations

from rpe_tvm.schedules import arm, x86
from rpe_tvm.schedules.cpu_schedules import CpuSchedules

_SCHEDULES = {"x86_64": x86.SCHEDULES, "aarch64": arm.AARCH64, "armv7": arm.ARMV7}


def schedules_of(machine: str) -> CpuSchedules:
    """Return the schedules for a machine, as of `TargetSpec.machine`."""
    return _SCHEDULES[machine]
