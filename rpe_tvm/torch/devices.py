"""Which device the tensors of a call may be on."""

from __future__ import annotations

from torch import Tensor


def check_cpu(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless x is on the CPU, for operators that run nowhere else."""
    if not x.is_cpu:
        raise ValueError(
            f"Invalid device of {name}: expected a CPU tensor, got one on {x.device}. This operator runs on x86 CPUs "
            "so far: move it with .cpu()."
        )


def check_device(name: str, x: Tensor, first: Tensor) -> None:
    """Raise ``ValueError`` unless x is on the CPU or an NVIDIA GPU, and where the first tensor of the call is."""
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
