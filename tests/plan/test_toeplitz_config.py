import numpy as np
import pytest

from rpe_tvm.plan import toeplitz, twiddles
from rpe_tvm.plan.toeplitz import ToeplitzConfig


def test_json_round_trip_and_names():
    config = ToeplitzConfig(64, 4096, (8, 8), (8, 8), lanes=8)
    assert ToeplitzConfig.from_json(config.to_json()) == config
    assert (config.name, config.description) == ("toeplitz-d64-n4096", "fft 8.8x8.8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outer": (4,)}, "product is 64"),
        ({"outer": (), "inner": (8, 8)}, "product is 64"),
        ({"length": 49, "outer": (7,), "inner": (7,)}, "Invalid radix"),
        ({"head_dim": 0}, "Invalid head_dim: expected a positive number, got 0"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ToeplitzConfig(**{"head_dim": 4, "length": 64, "outer": (4, 2), "inner": (8,), "lanes": 8, **fields})


@pytest.mark.parametrize(("n", "head_dim", "lanes"), [(1, 64, 16), (1000, 7, 8), (4097, 40, 16), (65536, 64, 8)])
def test_choose(n, head_dim, lanes):
    config = toeplitz.choose("x86_64-znver4", n, head_dim, lanes)
    assert n <= config.length and config.lanes <= 8 and config.head_dim == head_dim


def test_frequencies_are_those_of_the_two_halves():
    config = ToeplitzConfig(2, 48, (4, 2), (3, 2), lanes=4)
    x = np.random.default_rng(0).standard_normal(48)
    columns = np.fft.fft(x.reshape(8, 6), axis=0)[twiddles.digit_order(config.outer)]
    turned = columns * np.exp(-2j * np.pi * np.outer(twiddles.digit_order(config.outer), np.arange(6)) / 48)
    spectrum = np.fft.fft(turned, axis=1)[:, twiddles.digit_order(config.inner)].ravel()
    np.testing.assert_allclose(spectrum, np.fft.fft(x)[twiddles.frequencies(config)], atol=1e-12)
