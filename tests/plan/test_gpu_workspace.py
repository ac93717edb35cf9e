"""The buffers of a call lie apart, and each holds what its shape says."""

from __future__ import annotations

import math

import pytest

from rpe_tvm.plan import gpu, gpu_backward, gpu_direct, gpu_tiles, gpu_workspace
from rpe_tvm.plan.gpu_choice import GpuConfig

BYTES = {"float32": 4, "bfloat16": 2}
CONFIGS = [
    gpu.choose(4096, 3, 5),
    gpu_direct.choose(1024, 6, 8, "bfloat16"),
    gpu_tiles.choose(1000, 3, 5),
    gpu_backward.choose(2000, 3, 5),
    gpu_backward.choose(20_000, 3, 5),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("batch", "heads", "n_q", "n_k"), [(1, 1, 1, 1), (2, 3, 100, 700)])
def test_places(config: GpuConfig, batch: int, heads: int, n_q: int, n_k: int) -> None:
    found, size = gpu_workspace.places(config, batch, heads, n_q, n_k)
    end = 0
    for place in sorted(found.values(), key=lambda place: int(place.offset)):
        assert place.offset >= end and place.offset % gpu_workspace.ALIGNMENT == 0
        end = place.offset + math.prod(place.shape) * BYTES[place.dtype]
    assert end <= size < end + gpu_workspace.ALIGNMENT
