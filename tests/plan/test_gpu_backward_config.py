from __future__ import annotations

from dataclasses import replace

import pytest

from rpe_tvm.plan import gpu_backward
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig


@pytest.mark.parametrize("shared_bytes", [166_912, 232_448])
@pytest.mark.parametrize("n", [1, 64, 65, 1000, 4096, 8192, 10_000, 65536, 262_144])
def test_every_bucket_has_a_config_that_survives_json(n: int, shared_bytes: int) -> None:
    config = gpu_backward.choose(n, 32, 65, shared_bytes)
    assert config.length >= n and config.threads * config.radices[0] == config.row
    assert (config.columns == 1) == (n <= (8192 if shared_bytes == 232_448 else 4096))
    assert config.folds == (2 if (n, shared_bytes) == (8192, 232_448) else 1)
    assert config.sides_together == (n in (4096, 8192) and shared_bytes == 232_448)
    assert (config.num_terms, config.grad_parts) == ((32, config.residues) if config.columns == 1 else (1, 1))
    assert GpuBackwardConfig.from_json(config.to_json()) == config
    assert config.name == f"backward-m32-d65-n{config.length}-float32"


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected at most 262144 positions for gradients on a GPU, got 262145"):
        gpu_backward.choose(262_145, 32, 64)
    config = gpu_backward.choose(1024, 32, 64)
    for wrong, says in (
        ({"threads": 32}, r"expected 1024 / 16 .* got 32"),
        ({"radices": (8, 8, 16), "threads": 128}, "a first radix that the others divide"),
        ({"folds": 2}, r"product is 1024 / \(columns \* folds\)"),
        ({"dtype": "bfloat16"}, "expected float32, got bfloat16"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(config, **wrong)  # type: ignore[arg-type]
