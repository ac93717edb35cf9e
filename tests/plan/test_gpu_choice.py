"""Which algorithm and config serves a call on a GPU."""

import json
import math
from dataclasses import replace

import pytest

from rpe_tvm.plan import gpu, gpu_choice, gpu_direct, gpu_tiles, gpu_wisdom, wisdom


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """An empty directory of tuning logs; returns a function that writes the table of a target."""

    def write(target_id, *entries):
        directory = wisdom.directory(target_id, "attention")
        directory.mkdir(parents=True)
        rows = [
            {"dtype": dtype, "length": n, "config": config.to_json(), "ms": 1.0, "default_ms": 2.0}
            for dtype, n, config in entries
        ]
        (directory / "wisdom.json").write_text(json.dumps({"format": 1, "entries": rows}))
        forget()

    def forget():
        gpu_wisdom.records.cache_clear()
        gpu_wisdom.nearest.cache_clear()

    monkeypatch.setattr(wisdom, "LOGS", tmp_path)
    forget()
    yield write
    forget()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_by_rule_tensor_cores_take_sixteen_bits(logs, dtype):
    config = gpu_choice.choose(1000, 32, 64, dtype)
    assert config == gpu_direct.choose(1000, 32, 64, dtype) and config.dtype == dtype
    assert gpu_choice.bucket(1100, dtype) == 1152
    for n, m, d in ((gpu_choice.LONGEST_DIRECT + 1, 32, 64), (1000, 32, 60), (1000, 32, 320), (1000, 1000, 64)):
        assert not gpu_choice.is_direct(n, m, d, dtype)
        assert gpu_choice.rule(n, m, d, dtype) == gpu.choose(n, m, d)
        with pytest.raises(ValueError, match=f"No kernel for {dtype}: expected .*got n = {n}.*Use float32"):
            gpu_choice.choose(n, m, d, dtype)


def test_by_rule_tiles_take_short_float32_and_the_fft_the_rest(logs):
    assert not gpu_choice.is_direct(1000, 32, 64, "float32")
    border = gpu_choice.LONGEST_TILES
    for n, expected in ((1000, gpu_tiles.choose), (border, gpu_tiles.choose), (border + 1, gpu.choose)):
        assert gpu_choice.choose(n, 32, 64) == gpu_choice.rule(n, 32, 64) == expected(n, 32, 64)
    assert gpu_choice.choose(1000, 32, 64, target_id="cuda-sm_89") == gpu_tiles.choose(1000, 32, 64, 99 * 1024)
    # no tile holds so many features, or so many channels
    for m, d in ((2000, 64), (32, 1000)):
        assert gpu_choice.choose(1000, m, d) == gpu.choose(1000, m, d)
    assert gpu_choice.bucket(1100, "float32") == 2048
    with pytest.raises(ValueError, match="positions on a GPU so far"):
        gpu_choice.choose(gpu.LONGEST + 1, 32, 64)


def test_a_measured_bucket_is_taken_as_it_is(logs):
    odd = gpu.GpuAttentionConfig(32, 64, 1024, (32, 32), 32)
    logs("cuda-sm_90", ("float32", 1024, odd))
    assert gpu_choice.choose(1000, 32, 64) == gpu_choice.choose(1024, 32, 64) == odd
    for n, m, d in ((512, 32, 64), (1025, 32, 64), (1000, 16, 64), (1000, 32, 128)):
        assert gpu_choice.choose(n, m, d) == gpu_tiles.choose(n, m, d)
    assert gpu_choice.choose(1000, 32, 64, target_id="cuda-sm_80") == gpu_tiles.choose(1000, 32, 64)


def test_what_is_shipped_in_float32_was_measured_against_tiles_or_is_longer():
    shipped = [each for each in gpu_wisdom.records("cuda-sm_90") if each.dtype == "float32"]
    assert shipped
    for each in shipped:
        assert each.length > gpu_choice.LONGEST_TILES or isinstance(each.config, gpu_tiles.TileConfig)


def test_tiles_are_those_of_the_nearest_measured_length(logs):
    short = replace(gpu_direct.choose(1024, 32, 64, "bfloat16"), warps_q=1)
    long = replace(gpu_direct.choose(8192, 32, 64, "bfloat16"), stages=2)
    logs("cuda-sm_90", ("bfloat16", 1024, short), ("bfloat16", 8192, long))
    assert gpu_choice.choose(1024, 32, 64, "bfloat16") == short
    assert gpu_choice.choose(60, 32, 64, "bfloat16") == replace(short, length=64)
    assert gpu_choice.choose(1500, 32, 64, "bfloat16") == replace(short, length=1536)
    assert gpu_choice.choose(5000, 32, 64, "bfloat16") == replace(long, length=5120)
    # longer than was measured, and another dtype: the rule
    assert gpu_choice.choose(9000, 32, 64, "bfloat16") == gpu_direct.choose(9000, 32, 64, "bfloat16")
    assert gpu_choice.choose(1024, 32, 64, "float16") == gpu_direct.choose(1024, 32, 64, "float16")


def test_the_table_moves_the_border_between_the_algorithms(logs):
    tiles = gpu_direct.choose(8192, 32, 64, "bfloat16")
    logs("cuda-sm_90", ("bfloat16", 8192, tiles), ("bfloat16", 16384, gpu.choose(16384, 32, 64)))
    assert gpu_choice.is_direct(8192, 32, 64, "bfloat16") and gpu_choice.is_direct(9000, 32, 64, "bfloat16")
    assert not gpu_choice.is_direct(16384, 32, 64, "bfloat16")
    with pytest.raises(ValueError, match="Use float32"):
        gpu_choice.choose(16384, 32, 64, "bfloat16")
    # every length that is_direct grants has a config, on every GPU
    for n in range(1, 20000, 37):
        for target_id in ("cuda-sm_90", "cuda-sm_80"):
            if gpu_choice.is_direct(n, 32, 64, "bfloat16"):
                config = gpu_choice.choose(n, 32, 64, "bfloat16", target_id)
                assert config.dtype == "bfloat16" and config.length >= n


def test_more_can_be_direct_than_the_rule_says(logs):
    n = 2 * gpu_choice.LONGEST_DIRECT
    logs("cuda-sm_90", ("bfloat16", n, gpu_direct.choose(n, 32, 64, "bfloat16")))
    assert gpu_choice.is_direct(n, 32, 64, "bfloat16") and not gpu_choice.is_direct(n + 1, 32, 64, "bfloat16")


@pytest.mark.parametrize(("radices", "threads"), [((10, 16, 8), 96), ((12, 16, 16), 192)])
def test_threads_that_would_wait_at_different_barriers_are_refused(radices: tuple[int, ...], threads: int) -> None:
    with pytest.raises(ValueError, match="Invalid threads: expected a divisor"):
        gpu.GpuAttentionConfig(32, 64, math.prod(radices), radices, threads)
