"""Configs of attention by tiles in float32: which tile is taken, what it needs, and what is refused."""

import pytest

from rpe_tvm.plan import gpu_wisdom
from rpe_tvm.plan.gpu_tiles import AMPERE_SHARED_BYTES, TileConfig, choose


def test_a_config_survives_json():
    config = choose(1000, 32, 64)
    assert TileConfig.from_json(config.to_json()) == config == gpu_wisdom.config_from_json(config.to_json())
    assert (config.name, config.op) == ("attention-m32-d64-n1024-float32", "attention")
    assert config.description == f"direct {config.tile_q}x{config.tile_k}"


@pytest.mark.parametrize("m", [1, 11, 32, 64, 128])
@pytest.mark.parametrize("d", [1, 37, 64, 128, 256])
@pytest.mark.parametrize("n", [1, 64, 200, 512, 1024, 2048])
def test_default_tiles_fit_and_divide_their_length(m, d, n):
    limits = [99 * 1024] if m + d < 384 else []
    for limit in (*limits, 163 * 1024, 227 * 1024):
        config = choose(n, m, d, limit)
        assert config.shared_bytes <= min(limit, AMPERE_SHARED_BYTES) and config.registers <= 200
        assert config.length >= n and config.length % config.tile_q == config.length % config.tile_k == 0


def test_sizes_of_a_block():
    config = TileConfig(24, 40, 512, row_pieces=2, key_pieces=1, warps_q=2, warps_k=4)
    assert (config.tile_q, config.tile_k, config.threads) == (64, 128, 256)
    # 24 features and 64 channels, 40 of them used, of 128 keys; weights; 24 features of 64 queries; scores of 8 warps
    assert config.stage_bytes == 4 * (24 * 128 + 64 * 128 + 192)
    assert config.shared_bytes == 2 * config.stage_bytes + 4 * 24 * 64 + 8 * 4 * 32 * 40
    assert config.table_shape(3, 65, 100) == (3, 128 + 128)
    # all warps hand over 64 numerators and 8 denominators of each lane
    assert config.partial_bytes == 4 * 256 * 8 * 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_features": 0}, "num_features: expected a positive number, got 0"),
        ({"dtype": "bfloat16"}, "dtype: expected 'float32'"),
        ({"stages": 1}, "stages: expected at least 2"),
        ({"blocks": -1}, "blocks: expected 0 or more"),
        ({"length": 96}, "length: expected a multiple of the tile 64 x 128, got 96"),
        ({"warps_k": 3, "length": 1536}, "warps_k: expected a divisor of the 8 rows of a lane"),
        ({"warps_q": 16, "warps_k": 4}, "expected at most 32 in a block, got 64"),
        ({"head_dim": 256}, "expected sums of at most 200 registers, got 336"),
        ({"num_features": 200}, "shared memory: expected at most 232448 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TileConfig(**{**dict(num_features=32, head_dim=64, length=1024), **fields})


@pytest.mark.parametrize(("m", "d", "kib"), [(2000, 64, 227), (32, 300, 227), (128, 256, 99)])
def test_no_tile_holds_very_many_features_or_channels(m, d, kib):
    with pytest.raises(ValueError, match=f"No tile of {d} channels and {m} features .* use the fft algorithm"):
        choose(1000, m, d, kib * 1024)
