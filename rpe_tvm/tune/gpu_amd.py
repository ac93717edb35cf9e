"""What tuning does differently on AMD GPUs: whether it can run, and how candidates are loaded."""

from __future__ import annotations

from pathlib import Path

from rpe_tvm.runtime import GpuInstance, load_hip
from rpe_tvm.tune import store


def obstacle() -> str | None:
    """What stands in the way of a race, None if nothing does."""
    import torch

    from rpe_tvm.torch import hip

    if hip.is_hip() and torch.cuda.is_available():
        return None
    return (
        f"it takes an AMD GPU that PyTorch can use, and PyTorch {torch.__version__} finds none. Race on a machine with "
        "one and a PyTorch that is built for ROCm; --build-only needs neither"
    )


def architecture() -> str:
    """The architecture of this machine's first GPU, such as ``gfx942``."""
    from rpe_tvm.torch import hip

    return hip.architecture(0)


def is_amd(artefact: Path) -> bool:
    """Whether an artefact is for AMD GPUs."""
    manifest = store.read_json(artefact / "manifest.json") or {}
    return bool(manifest.get("target", {}).get("kind") == "rocm")


def load(artefact: Path) -> GpuInstance:
    """Load a candidate for this machine's first GPU."""
    from rpe_tvm.torch import hip

    return load_hip(artefact, hip.architecture(0), hip.stream)
