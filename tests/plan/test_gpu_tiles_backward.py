"""Configs of gradients by tiles in float32: which tile is taken, what it needs, and what is refused."""

from __future__ import annotations

import math

import pytest

from rpe_tvm.plan import gpu_backward, gpu_backward_choice, gpu_choice, gpu_workspace
from rpe_tvm.plan.gpu_tiles import AMPERE_SHARED_BYTES
from rpe_tvm.plan.gpu_tiles_backward import COLUMNS, ROWS, TileBackwardConfig, choose, in_fours


def test_a_config_survives_json():
    config = choose(1000, 32, 64)
    assert config == gpu_backward_choice.config_from_json(config.to_json())
    assert (config.name, config.op) == ("backward-m32-d64-n1024-float32", "backward")
    assert config.description == "direct 64x128"


@pytest.mark.parametrize(("m", "d"), [(1, 1), (11, 37), (32, 64), (64, 64), (32, 128), (64, 128)])
@pytest.mark.parametrize("n", [1, 64, 200, 1024, 2048])
def test_default_tiles_run_on_ampere_and_divide_their_length(m, d, n):
    config = choose(n, m, d)
    assert config.shared_bytes <= AMPERE_SHARED_BYTES and config.registers <= 200
    assert config.length >= n and config.length % config.rows == config.length % config.tile == 0
    assert gpu_backward_choice.choose(n, m, d) == config


def test_a_choice_fits_into_the_shared_memory_that_there_is():
    assert choose(1024, 32, 64, 99 * 1024).shared_bytes <= 99 * 1024
    with pytest.raises(
        ValueError, match="Too large for tiles: .* got head_dim 64 and num_features 32; gradients by FFT"
    ):
        choose(1024, 32, 64, 20 * 1024)


def test_long_sequences_and_many_features_are_left_to_the_fft():
    longest = gpu_choice.LONGEST_TILES
    assert isinstance(gpu_backward_choice.choose(longest, 32, 64), TileBackwardConfig)
    for n, m, d in ((longest + 1, 32, 64), (1000, 256, 64), (1000, 32, 256)):
        assert gpu_backward_choice.choose(n, m, d) == gpu_backward.choose(n, m, d)


@pytest.mark.parametrize(("rows", "tile"), [(32, 32), (32, 64), (64, 32), (64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("columns", [4, 20, 32, 64, 100])
def test_threads_share_all_sums(rows, tile, columns):
    config = TileBackwardConfig(8, 8, 1024, rows, tile, 1)
    share = config.share(columns)
    threads = 32 * share.warps * share.groups
    assert threads <= config.threads and tile % (4 * share.groups) == 0
    assert share.warps * 32 * share.panels * ROWS * COLUMNS >= rows * columns
    assert 4 * share.partial_floats <= config.places[0] or columns > 8


def test_rows_in_fours_meet_no_bank_twice():
    for width in (8, 20, 32, 36, 64, 128):
        starts = {in_fours(4 * number, width) % 32 for number in range(8)}
        assert starts == {4 * bank for bank in range(8)}


def test_buffers_begin_where_they_may():
    config = TileBackwardConfig(3, 5, 64, 32, 32, 1)
    found, size = gpu_workspace.places(config, 3, 1, 40, 64)
    ends = {place.offset + 4 * math.prod(place.shape) for place in found.values()}
    assert {place.offset for place in found.values()} | {size} == ends | {0}
    assert all(place.offset % gpu_workspace.ALIGNMENT == 0 for place in found.values())
    assert found["diagonals"].shape == (3, 1, 2, 96)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_features": 0}, "num_features: expected a positive number, got 0"),
        ({"blocks": 0}, "blocks: expected a positive number, got 0"),
        ({"rows": 48}, "rows: expected 32, 64 or 128, got 48"),
        ({"tile": 256}, "tile: expected 32, 64 or 128, got 256"),
        ({"length": 96}, "length: expected a power of two of at least 64, got 96"),
        ({"head_dim": 300}, "registers: expected at most 200 for sums and pairs of a thread, got"),
        ({"blocks": 8}, "registers: expected at most 64 for sums and pairs of a thread, got 108"),
        ({"num_features": 64, "rows": 128, "tile": 128}, "shared memory: expected at most 232448 bytes, got 271616"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TileBackwardConfig(**{**dict(num_features=32, head_dim=64, length=1024, blocks=1), **fields})
