"""What NVIDIA GPUs offer to a block of threads."""

from __future__ import annotations

PREFIX = "cuda-"  # of target ids

# Architecture -> KiB of shared memory that one block may have (CUDA C++ Programming Guide, table of technical
# specifications by compute capability).
SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_103": 227,
    "sm_120": 99,
    "sm_121": 99,
}


def shared_bytes(target_id: str) -> int:
    """Return how much shared memory one block may have on a target, such as ``cuda-sm_90``."""
    return SHARED_KIB[target_id.removeprefix(PREFIX)] * 1024
