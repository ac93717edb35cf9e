"""What a benchmark on a GPU has to know of the machine: whether it can run there, and what a reader asks about."""

from __future__ import annotations

import subprocess
from typing import Any

from rpe_tvm import bench_machine

_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit")


def obstacle(with_plot: bool) -> str | None:
    """What stands in the way of a measurement, found before minutes are spent on it."""
    missing = bench_machine.missing_package(with_plot)
    if missing is not None:
        return missing
    import torch

    if not torch.cuda.is_available():
        return (
            f"target cuda needs an NVIDIA GPU that PyTorch can use; PyTorch {torch.__version__} finds none here. Run "
            "the benchmark on a machine with one, its driver, and a PyTorch build for CUDA"
        )
    return None


def gpu_name() -> str:
    """The GPU's own name, such as "NVIDIA H100 80GB HBM3"."""
    import torch

    return str(torch.cuda.get_device_name())


def environment() -> dict[str, Any]:
    """The GPU, its clocks and power as they are now, its driver, and torch's versions; None for what is not known."""
    import torch

    properties = torch.cuda.get_device_properties()
    cudnn: Any = torch.backends.cudnn  # torch has no types for it
    return {
        "name": gpu_name(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        **_driver_says(f"GPU-{properties.uuid}"),
    }


def _driver_says(gpu: str) -> dict[str, str | None]:
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_QUERY)
    values = [value.strip() for value in said.strip().split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else dict.fromkeys(_QUERY)
