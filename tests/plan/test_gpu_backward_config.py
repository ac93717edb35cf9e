from __future__ import annotations

from dataclasses import replace

import pytest

from rpe_tvm.plan import gpu_backward
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig


@pytest.mark.parametrize("n", [1, 64, 65, 1000, 4096])
def test_every_bucket_has_a_config_that_survives_json(n: int) -> None:
    config = gpu_backward.choose(n, 32, 65)
    assert config.length >= n and config.threads * config.radices[0] == config.length
    assert GpuBackwardConfig.from_json(config.to_json()) == config
    assert config.name == f"backward-m32-d65-n{config.length}-float32"


def test_errors() -> None:
    with pytest.raises(ValueError, match="expected at most 4096 positions for gradients on a GPU, got 4097"):
        gpu_backward.choose(4097, 32, 64)
    config = gpu_backward.choose(1024, 32, 64)
    for wrong, says in (
        ({"threads": 32}, r"expected 1024 / 16 .* got 32"),
        ({"radices": (8, 8, 16), "threads": 128}, "a first radix that the others divide"),
        ({"folds": 2, "radices": (8, 8, 8)}, "expected folds 1"),
        ({"columns": 2, "radices": (8, 8, 8)}, "expected folds 1, columns 1"),
        ({"dtype": "bfloat16"}, "and float32, got 1, 1 and bfloat16"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(config, **wrong)  # type: ignore[arg-type]
