"""Config and shapes of the gradients on tensor cores, and what they serve."""

from __future__ import annotations

import math

import pytest

from rpe_tvm.plan import gpu_backward, gpu_backward_choice, gpu_workspace
from rpe_tvm.plan.gpu_direct_backward import BLOCKS, TensorCoreBackwardConfig, choose, diagonals_shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 1024, 1025, 2048, 5000, 131072])
@pytest.mark.parametrize(("m", "d"), [(32, 64), (16, 40), (24, 80), (64, 128), (128, 64)])
def test_every_choice_is_a_config(n, m, d, dtype):
    config = choose(n, m, d, dtype)
    assert config.length >= n
    assert TensorCoreBackwardConfig.from_json(config.to_json()) == config
    assert gpu_backward_choice.config_from_json(config.to_json()) == config
    assert config.query_shared_bytes <= config.shared_bytes <= 163 * 1024  # sm_80
    assert gpu_backward_choice.choose(n, m, d, dtype) == config


def test_what_serves_which_dtype():
    assert gpu_backward_choice.is_direct(32, 64, "bfloat16")
    assert not gpu_backward_choice.is_direct(32, 64, "float32")
    assert not gpu_backward_choice.is_direct(32, 256, "float16")
    assert not gpu_backward_choice.is_direct(32, 63, "float16")
    config = gpu_backward_choice.choose(5000, 32, 64)
    assert config == gpu_backward.choose(5000, 32, 64)
    assert gpu_backward_choice.config_from_json(config.to_json()) == config


def test_sums_along_diagonals_lie_in_different_banks():
    for row_blocks, shares, tile in ((1, 1, 64), (2, 1, 64), (2, 2, 64), (1, 2, 128)):
        config = TensorCoreBackwardConfig(32, 64, 1024, "bfloat16", row_blocks, 4, shares, tile)
        stride = config.diagonal_stride
        assert stride >= 8 * config.diagonals + 16
        assert len({(2 * pair * stride + group) % 32 for pair in range(4) for group in range(8)}) == 32


@pytest.mark.parametrize(
    ("batch", "heads", "n_key"), [(1, 1, 1), (1, 8, 4096), (1, 8, 16384), (8, 8, 1024), (2, 3, 700)]
)
def test_slots_take_all_keys_and_run_at_once(batch, heads, n_key):
    config = choose(4096, 32, 64, "bfloat16")
    shape = diagonals_shape(config, batch, heads, 100, n_key)
    blocks = -(-n_key // config.rows)
    assert shape[:2] == (batch, heads) and shape[3] % config.positions == 0 and shape[3] >= 100 + n_key
    assert 1 <= shape[2] <= blocks
    assert math.prod(shape[:3]) <= BLOCKS


def test_buffers_begin_where_they_may():
    config = TensorCoreBackwardConfig(6, 8, 64, "bfloat16", 1, 1, 2, 64)
    found, size = gpu_workspace.places(config, 3, 1, 64, 128)
    ends = {place.offset + math.prod(place.shape) * (2 if place.dtype == "bfloat16" else 4) for place in found.values()}
    assert {place.offset for place in found.values()} | {size} == ends | {0}
    assert all(place.offset % gpu_workspace.ALIGNMENT == 0 for place in found.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_features=0), "num_features: expected a positive number, got 0"),
        (dict(dtype="float32"), "dtype: expected 'bfloat16' or 'float16', got 'float32'"),
        (dict(head_dim=60), "head_dim: expected a multiple of 8, got 60"),
        (dict(blocks=-1), "blocks: expected 0 or more, got -1"),
        (dict(stages=1), "stages: expected at least 2, got 1"),
        (dict(tile=40), "tile: expected a multiple of 16 for 1 shares, got 40"),
        (dict(tile=96), "tile: expected a multiple or a divisor of 128 rows, got 96"),
        (dict(warps=1, tile=32), "tile: expected 32 rows or it to be a multiple of 64, got 32"),
        (dict(warps=32, shares=2, tile=1024), "warps: expected at most 32 in a block, got 64"),
        (dict(stages=20), "shared memory: expected at most 232448 bytes"),
    ],
)
def test_what_a_config_refuses(fields, message):
    given = dict(num_features=32, head_dim=64, length=1024, dtype="bfloat16") | fields
    with pytest.raises(ValueError, match=message):
        TensorCoreBackwardConfig(**given)


def test_too_large_for_registers():
    with pytest.raises(ValueError, match="expected 3 / 4 num_features \\+ head_dim <= 180, got head_dim 256"):
        choose(1024, 32, 256, "bfloat16")
