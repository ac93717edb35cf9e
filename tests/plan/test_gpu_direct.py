"""Config and shapes of attention on tensor cores."""

import pytest

from rpe_tvm.plan.gpu_direct import (
    MAX_SHARED_BYTES,
    TensorCoreConfig,
    choose,
    clustered,
    features_shape,
    fused,
    is_clustered,
    is_fused,
    is_readable,
    table_shape,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 1024, 1025, 2048, 5000, 131072])
@pytest.mark.parametrize(("m", "d"), [(32, 64), (16, 40), (24, 80), (64, 128), (128, 256), (600, 16)])
def test_every_choice_is_a_config(n, m, d, dtype):
    config = choose(n, m, d, dtype)
    assert config.length >= n
    assert TensorCoreConfig.from_json(config.to_json()) == config
    assert config.shared_bytes <= 163 * 1024  # sm_80


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_few_short_sequences_are_one_launch(dtype):
    config = choose(1024, 32, 64, dtype)
    one_kernel = fused(config)
    assert one_kernel.fused and one_kernel.shared_bytes <= 163 * 1024  # sm_80
    assert fused(one_kernel) is None
    assert fused(choose(1025, 32, 64, dtype)) is None
    assert fused(choose(1024, 32, 40, dtype)) is None
    assert is_fused(config, 1, 8, 1000)
    assert not is_fused(config, 2, 8, 1000)
    assert is_fused(config, 2, 8, 300)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "d"), [(32, 64), (16, 64), (24, 48), (3, 16)])
def test_blocks_of_a_head_share_features(m, d, dtype):
    for n in (1, 100, 300, 512):
        assert clustered(choose(n, m, d, dtype)) is None
    for n in (513, 1000):
        assert clustered(choose(n, m, d, dtype)).shared_bytes <= MAX_SHARED_BYTES
    config = choose(1024, m, d, dtype)
    assert clustered(clustered(config)) is None
    assert clustered(choose(1025, m, d, dtype)) is None
    assert is_clustered(config, 1, 8, 1000)
    assert not is_clustered(config, 1, 8, 1025)
    assert is_clustered(config, 4, 8, 200)
    assert not is_clustered(config, 4, 8, 300)  # 5 blocks of queries, 6 in clusters


def test_rows_lie_in_different_banks():
    for m in (1, 16, 24, 32, 48, 64, 128):
        config = TensorCoreConfig(m, 8 * m, 64, "bfloat16", row_blocks=1, warps_q=1, tile_k=16, stages=2)
        for row_bytes, row in ((config.key_row_bytes, m), (config.value_row_bytes, 8 * m)):
            assert row_bytes >= 2 * row
            assert len({row_bytes * i // 16 % 8 for i in range(8)}) == 8


def test_shapes_are_whole_tiles():
    config = TensorCoreConfig(24, 40, 1024, "bfloat16", row_blocks=2, warps_q=4, tile_k=64)
    assert (config.tile_q, config.threads) == (128, 128)
    assert features_shape(config, 2, 3, 129, config.tile_q) == (2, 3, 256, 32)
    assert features_shape(config, 2, 3, 129, config.tile_k) == (2, 3, 192, 32)
    assert table_shape(config, 3, 129, 65) == (3, 256 + 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_features=0), "num_features: expected a positive number, got 0"),
        (dict(head_dim=36), "head_dim: expected a multiple of 8, got 36"),
        (dict(dtype="float32"), "expected 'bfloat16' or 'float16', got 'float32'"),
        (dict(dtype="float16"), "matrix_sums: expected True for float16"),
        (dict(stages=1), "stages: expected at least 2, got 1"),
        (dict(warps_k=3), "tile_k: expected a multiple of 48 for 3 warps along the keys, got 64"),
        (dict(warps_q=33), "at most 32 in a block, got 33"),
        (dict(stages=40), "Too much shared memory: expected at most 232448 bytes"),
        (dict(fused=True, head_dim=40), "head_dim: expected a multiple of 16 for fused, got 40"),
        (dict(fused=True, stages=2), "stages: expected at least 3 for fused, got 2"),
        (dict(fused=True, tile_k=32), "tile_k: expected a multiple of 64 for 4 warps that make features, got 32"),
        (dict(cluster=2), "cluster: expected 1 where fused is False, got 2"),
        (dict(fused=True, cluster=3), "cluster: expected 1, 2, 4 or 8 blocks, got 3"),
        (dict(fused=True, cluster=4, num_features=33), "num_features: expected at most 32 for clusters, got 33"),
        (dict(fused=True, cluster=4, warps_k=2, tile_k=96, stages=5), "tile_k: expected a divisor of 512, .* got 96"),
        (
            dict(fused=True, cluster=8, length=64, warps_k=4, head_dim=16, row_blocks=4, stages=5),
            "stages: expected 20 or more of 64 keys, where the sums of 4 warps lie last, got 5",
        ),
        (dict(blocks=-1), "blocks: expected 0 or more, got -1"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TensorCoreConfig(**{**dict(num_features=32, head_dim=64, length=1024, dtype="bfloat16"), **fields})


def test_a_head_that_no_thread_can_hold_is_refused():
    with pytest.raises(ValueError, match="use the fft algorithm"):
        choose(1024, 32, 512, "bfloat16")


def test_what_can_be_read_in_place():
    assert is_readable(32, (64 * 8, 64, 8 * 64, 1))
    assert is_readable(32, (0, 0, 72, 1))
    assert not is_readable(34, (64 * 8, 64, 8 * 64, 1))
    assert not is_readable(32, (64, 64, 65, 1))
    assert not is_readable(32, (64, 64, 64, 2))
