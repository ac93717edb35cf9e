"""A config checks itself and survives JSON."""

import json
from dataclasses import replace

import pytest

from rpe_tvm.plan.config import AttentionConfig

FFT = AttentionConfig(32, 64, 4096, "fft", (8, 8), (8, 8), lanes=8)
DIRECT = AttentionConfig(16, 40, 1000, "direct", tile=(64, 128))


@pytest.mark.parametrize("config", [FFT, DIRECT])
def test_json_round_trip(config):
    assert AttentionConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("d", "panel"), [(3, 1), (16, 2), (24, 3), (40, 5), (48, 3), (56, 4), (64, 4), (72, 3), (80, 5), (104, 5), (256, 4)]
)
def test_panels_fill_registers_with_few_zeros(d, panel):
    config = AttentionConfig(16, d, 1000, "direct", tile=(48, 64), lanes=8)
    assert config.panel == panel
    assert replace(config, lanes=16).panel == replace(config, lanes=4).panel == 0


def test_names_tell_what_it_is():
    assert FFT.name == "attention-m32-d64-n4096"
    assert (FFT.description, DIRECT.description) == ("fft 8.8x8.8", "direct 64x128")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(algorithm="fft", outer=(8, 8), inner=(8, 4)), "radices whose product is 4096"),
        (dict(algorithm="fft", outer=(4096,), inner=()), "radices whose product is 4096"),
        (dict(algorithm="fft", outer=(64,), inner=(64,)), "expected radices of"),
        (dict(algorithm="direct"), "Invalid tile"),
        (dict(algorithm="winograd"), "expected 'direct' or 'fft', got 'winograd'"),
        (dict(algorithm="direct", tile=(64, 64), lanes=0), "Invalid lanes: expected a positive number"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(32, 64, 4096, **fields)
