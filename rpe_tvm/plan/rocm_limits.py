"""What AMD GPUs offer to a block of threads."""

from __future__ import annotations

PREFIX = "rocm-"  # of target ids

# Architecture -> threads that execute together.
WAVES: dict[str, int] = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}
# Threads of a block: TVM's generator declares no more in code objects, and the driver refuses what is not declared.
MAX_THREADS = 256
# Local memory of a block ("LDS", what CUDA calls shared memory).
SHARED_BYTES = 64 * 1024


def is_rocm(target_id: str) -> bool:
    """Return whether a target id is that of an AMD GPU, such as ``rocm-gfx942``."""
    return target_id.startswith(PREFIX)


def wave(target_id: str) -> int:
    """Return how many threads execute together on a target."""
    return WAVES[target_id.removeprefix(PREFIX)]
