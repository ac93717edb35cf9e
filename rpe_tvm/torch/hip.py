"""PyTorch on AMD GPUs: its tensors say ``cuda``, and so do its streams and devices."""

from __future__ import annotations

import torch


def is_hip() -> bool:
    """Whether this PyTorch is built for ROCm."""
    return torch.version.hip is not None


def architecture(gpu_index: int) -> str:
    """The architecture of a GPU, such as ``gfx942``."""
    name: str = torch.cuda.get_device_properties(gpu_index).gcnArchName  # as gfx942:sramecc+:xnack-
    return name.partition(":")[0]


def stream() -> int:
    """The current stream of the current GPU, a hipStream_t."""
    return int(torch.cuda.current_stream().cuda_stream)
