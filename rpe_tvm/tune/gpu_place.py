"""Where candidates for GPUs are raced: on this machine, or behind TVM's RPC tracker (`tune.gpu_remote`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rpe_tvm import bench_cuda_machine
from rpe_tvm.tune import gpu_amd, gpu_measure
from rpe_tvm.tune.gpu_candidates import Size
from rpe_tvm.tune.gpu_measure import Timing


@dataclass(frozen=True)
class Gpu:
    """The GPU of a machine, or what stands in the way of a race there.

    Parameters
    ----------
    arch : str
        Such as ``gfx942`` or ``sm_90``.
    machine : mapping
        What `bench_cuda_machine.environment` says.
    obstacle : str
        "" if nothing stands in the way; else there is nothing else.
    """

    arch: str
    machine: Mapping[str, Any]
    obstacle: str = ""


class GpuPlace(Protocol):
    """A machine that races candidates."""

    def gpu(self, kind: str) -> Gpu:
        """Say what GPU of TVM's kind `kind` is there."""

    def measure(self, size: Size, artefacts: Mapping[str, Path], seconds: float) -> dict[str, Timing]:
        """Check and time candidates, as `gpu_measure.measure` does."""


class ThisGpu:
    """The GPU of this machine."""

    def gpu(self, kind: str) -> Gpu:
        """Ask PyTorch."""
        is_amd = kind == "rocm"
        obstacle = gpu_amd.obstacle() if is_amd else bench_cuda_machine.obstacle(with_plot=False)
        if obstacle is not None:
            return Gpu("", {}, obstacle)
        machine = bench_cuda_machine.environment()
        arch = gpu_amd.architecture() if is_amd else "sm_" + machine["compute_capability"].replace(".", "")
        return Gpu(arch, machine)

    def measure(self, size: Size, artefacts: Mapping[str, Path], seconds: float) -> dict[str, Timing]:
        """Check and time candidates in this process."""
        return gpu_measure.measure(size, artefacts, seconds)
