"""Tables are what the stages expect, and digit order is a permutation that radices define."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig

RADICES = [(8,), (8, 4), (2, 3, 5), (4, 8, 5), (3, 3), (2, 2, 2, 2)]


def forward(x, radices):
    """Decimation in frequency in NumPy, stage by stage; the result is in digit order."""
    if len(x) == 1:
        return x
    radix, rest = radices[0], len(x) // radices[0]
    parts = x.reshape(radix, rest)
    out = []
    for t in range(radix):
        part = np.exp(-2j * np.pi * np.arange(radix) * t / radix) @ parts
        out.append(forward(part * np.exp(-2j * np.pi * np.arange(rest) * t / len(x)), radices[1:]))
    return np.concatenate(out)


@pytest.mark.parametrize("radices", RADICES)
def test_digit_order_is_the_order_of_decimation_in_frequency(radices):
    x = np.random.default_rng(0).standard_normal(math.prod(radices)) + 0j
    np.testing.assert_allclose(forward(x, radices), np.fft.fft(x)[twiddles.digit_order(radices)], atol=1e-12)


@pytest.mark.parametrize(("outer", "inner"), [((8, 4), (8,)), ((3,), (5, 2)), ((4, 4), (4, 4))])
def test_tables_are_rounded_once_from_float64(outer, inner):
    length = math.prod(outer) * math.prod(inner)
    config = AttentionConfig(8, 8, length, "fft", outer, inner)
    where = twiddles.layout(config)
    flat = twiddles.tables(config).astype(np.float64)
    assert len(flat) == where.size
    pairs = flat[0::2] + 1j * flat[1::2]
    parity = pairs[where.parity // 2 :]
    np.testing.assert_allclose(parity, np.exp(-1j * np.pi * np.arange(length) / length), atol=6e-8)
    np.testing.assert_allclose(np.abs(pairs), 1.0, atol=1e-7)
    n1 = math.prod(outer)
    split = pairs[where.split // 2 : where.parity // 2].reshape(-1, n1)
    angle = np.outer(np.arange(length // n1), twiddles.digit_order(outer))
    np.testing.assert_allclose(split, np.exp(-2j * np.pi * angle / length), atol=6e-8)


def test_feature_positions():
    fft = AttentionConfig(32, 64, 96, "fft", (3, 4), (8,))
    found = twiddles.feature_positions(fft, 90, 96)
    n1, n2, s, q = 12, 8, 3, 4
    assert found.shape == (n2, n1) == twiddles.feature_shape(fft, 1, 1, 90, 96)[3:]
    assert all(found[j, b * s + a] == (a * q + b) * n2 + j for j in range(n2) for a in range(s) for b in range(q))
    direct = AttentionConfig(32, 64, 128, "direct", tile=(64, 64))
    assert (twiddles.feature_positions(direct, 100, 128) == np.arange(128).reshape(2, 64)).all()


def test_buffer_shapes():
    fft = AttentionConfig(32, 64, 4096, "fft", (8, 8), (8, 8))
    assert twiddles.feature_shape(fft, 2, 3, 100, 4000) == (2, 3, 32, 64, 64)
    assert twiddles.weight_table_shape(fft, 3, 100, 4000) == (3, 2, 4096, 2)
    direct = AttentionConfig(32, 64, 1024, "direct", tile=(64, 128))
    assert twiddles.feature_shape(direct, 2, 3, 100, 129) == (2, 3, 32, 4, 64)
    assert twiddles.weight_table_shape(direct, 3, 1, 1) == (3, 256)


@pytest.mark.parametrize("tile", [(48, 64), (54, 64), (60, 32), (128, 64), (48, 96), (64, 128)])
def test_padding_is_whole_tiles_and_no_more_than_needed(tile):
    config = AttentionConfig(32, 64, 2048, "direct", tile=tile)
    for n in (0, 1, 63, 64, 65, 512, 1000, 1024, 1025, 2048):
        padded = twiddles.padded_length(config, n, 1)
        assert padded % 64 == 0
        assert all(-(-n // side) * side <= padded for side in tile)
        if 64 % tile[1] == 0:
            assert padded < max(n, 1) + tile[0] + 64
    assert twiddles.padded_length(replace(config, tile=(54, 64)), 1024, 1024) == 1088
