"""The plan takes what was measured and has a rule for everything else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpe_tvm.plan import backward, wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Logs of an invented target: fft at 1024, direct at 4096, which no rule would say."""
    monkeypatch.setattr(wisdom, "LOGS", tmp_path)
    wisdom.records.cache_clear()
    odd = AttentionConfig(32, 64, 1024, "fft", (4, 8), (8, 4), lanes=16)
    long = AttentionConfig(32, 64, 4096, "direct", tile=(32, 64))
    entries = [{"config": config.to_json(), "ms": 1.0, "default_ms": 2.0} for config in (odd, long)]
    directory = tmp_path / "x86_64-invented" / "attention"
    directory.mkdir(parents=True)
    (directory / "wisdom.json").write_text(json.dumps({"format": 1, "entries": entries}))
    yield odd, long
    wisdom.records.cache_clear()


def test_a_measured_bucket_is_taken_as_it_is(logs):
    odd, long = logs
    assert wisdom.choose("x86_64-invented", 1000, 32, 64, 16) == odd
    assert wisdom.choose("x86_64-invented", 4096, 32, 64, 16) == long


def test_other_lengths_take_the_nearest_algorithm(logs):
    assert wisdom.choose("x86_64-invented", 1200, 32, 64, 16).algorithm == "fft"
    far = wisdom.choose("x86_64-invented", 8192, 32, 64, 16)
    assert (far.algorithm, far.length, far.tile) == ("direct", 8192, (32, 64))


def test_tiles_that_were_measured_are_not_those_of_much_shorter_lengths(monkeypatch):
    measured = [wisdom.Wisdom(AttentionConfig(32, 64, 512, "direct", tile=(96, 64), lanes=8), 1.0, 2.0)]
    monkeypatch.setattr(wisdom, "records", lambda target_id: measured)
    tiles = [wisdom.choose("x86_64-invented", n, 32, 64, 8).tile for n in (64, 192, 256, 512, 640)]
    assert tiles == [(32, 64), (48, 64), (96, 64), (96, 64), (96, 64)]


def test_rows_fit_the_length_where_the_measured_tile_is_that_of_the_rule(monkeypatch):
    measured = [wisdom.Wisdom(wisdom.direct_config(32, 64, 1024, 8), 1.0, 2.0)]
    monkeypatch.setattr(wisdom, "records", lambda target_id: measured)
    tiles = [wisdom.choose("x86_64-invented", n, 32, 64, 8).tile for n in (512, 768, 1024, 1536)]
    assert tiles == [(48, 64), (48, 64), (54, 64), (48, 64)]


def test_other_features_follow_the_rule(logs):
    assert wisdom.choose("x86_64-invented", 4096, 16, 64, 16).algorithm == "fft"
    assert wisdom.choose("x86_64-invented", 256, 16, 64, 16).algorithm == "direct"


@given(
    st.integers(0, 300_000),
    st.sampled_from([1, 8, 24, 64]),
    st.sampled_from([1, 40, 64, 80]),
    st.sampled_from([4, 8, 16]),
)
def test_there_is_a_valid_config_for_everything(n, m, d, lanes):
    config = wisdom.choose("x86_64-nobody-measured", n, m, d, lanes)
    assert config.length == bucket_length(n)
    assert (config.num_features, config.head_dim) == (m, d)


@given(st.integers(1, 10**6))
def test_every_bucket_has_a_factorisation(n):
    assert wisdom.factorisations(bucket_length(n))


def test_radices_fit_the_registers_of_32_bit_arm():
    for n in (1000, 2000, 5000):
        small, large = (
            wisdom.rule(target, bucket_length(n), 1, 64, 4) for target in ("armv7-cortex-a7", "aarch64-any")
        )
        assert max(small.outer + small.inner) <= 5 and max(large.outer + large.inner) == 8
    assert wisdom.factorisations(2048, 1, 5) == [((4, 4, 2), (4, 4, 4))]
    assert wisdom.factorisations(2304, 1, 5) == [((4, 3, 4), (4, 3, 4))]
    assert wisdom.greedy_radices(72, 5) == (4, 3, 3, 2) and wisdom.greedy_radices(72) == (8, 3, 3)


@pytest.mark.parametrize("n", [32769, 65536, 100_000, 262_144])
def test_a_long_product_of_avx2_has_parts_of_an_eighth(n):
    config = wisdom.choose("x86_64-nobody-measured", n, 32, 64, 8)
    assert config.outer[0] == 8 and max(config.outer[1:] + config.inner) <= 5
    for other in (wisdom.choose("x86_64-nobody-measured", 32768, 32, 64, 8), backward.choose("x86_64-x", n, 32, 64, 8)):
        assert max(other.outer + other.inner) <= 5
