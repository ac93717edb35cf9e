"""Which device the tensors of a call may be on."""

from __future__ import annotations

import torch
from torch import Tensor

from rpe_tvm.torch import hip


def check_nvidia(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` if x is on an AMD GPU, for operators that have no kernels there."""
    if x.is_cuda and hip.is_hip():
        raise ValueError(
            f"Invalid device of {name}: expected a CPU tensor or one on an NVIDIA GPU, got one on {x.device}, an AMD "
            "GPU. There this operator has no kernels yet: move it with .cpu()."
        )


def check_device(name: str, x: Tensor, first: Tensor) -> None:
    """Raise ``ValueError`` unless x is dense, on the CPU or an NVIDIA GPU, and where the first tensor is."""
    if x.layout is not torch.strided:
        raise ValueError(
            f"Invalid layout of {name}: expected torch.strided, got {x.layout}. Convert it with .to_dense()."
        )
    if not x.is_cpu and not x.is_cuda:
        raise ValueError(
            f"Invalid device of {name}: expected a CPU tensor or one on an NVIDIA GPU, got one on {x.device}. Move it "
            "with .cpu() or .cuda()."
        )
    if x.device != first.device:
        raise ValueError(
            f"Invalid device of {name}: expected {first.device}, where the tensors before it are, got {x.device}. Move "
            f"it with .to({str(first.device)!r})."
        )
