"""Configs of Toeplitz products on GPUs, and where their frequencies lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rpe_tvm.plan import gpu_toeplitz
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig


@pytest.mark.parametrize(("n", "hopper", "ampere"), [
    (1, (64, 1), (64, 1)),
    (5000, (8192, 1), (4096, 2)),
    (8193, (4096, 4), (4096, 4)),
    (65536, (4096, 16), (4096, 16)),
    (100_000, (8192, 16), (4096, 32)),
    (262_144, (8192, 32), (8192, 32)),
])  # fmt: skip
def test_choice(n: int, hopper: tuple[int, int], ampere: tuple[int, int]) -> None:
    for shared_bytes, wanted in ((gpu_toeplitz.HOPPER, hopper), (163 * 1024, ampere)):
        config = gpu_toeplitz.choose(n, 7, shared_bytes)
        assert (config.row, config.columns) == wanted and config.row * config.columns == config.length >= n
        assert (config.name, config.pairs) == (f"toeplitz-d7-n{config.length}-float32", 4)
        assert GpuToeplitzConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="at most 262144 positions on a GPU so far, got 262145"):
        gpu_toeplitz.choose(262_145, 7)


def test_buffers() -> None:
    config = gpu_toeplitz.choose(131_072, 64)
    assert gpu_toeplitz.between(config, 3) == (3, 32, 2, 16, 8192, 2)
    assert gpu_toeplitz.heads_at_once(config, 100) == 4 and gpu_toeplitz.heads_at_once(config, 3) == 3
    assert gpu_toeplitz.heads_at_once(gpu_toeplitz.choose(262_144, 512), 8) == 1
    assert gpu_toeplitz.correlation_shape(config) == (8, 2, 16, 8, 2, 512, 2)


@pytest.mark.parametrize(
    "config", [GpuToeplitzConfig(1, 3, 32, (8, 4), 4), GpuToeplitzConfig(1, 3, 64, (4, 4), 4, columns=4)]
)
def test_places(config: GpuToeplitzConfig) -> None:
    """The transform of a wave of each frequency, made as kernels make it, has its peak at that frequency's place."""
    places = gpu_toeplitz.places(config)
    assert sorted(places) == list(range(config.length))
    position = np.arange(config.length)
    for frequency in range(config.length):
        wave = np.exp(2j * np.pi * frequency * position / config.length)
        # columns
        by_column = np.fft.fft(wave.reshape(config.columns, config.row), axis=0)
        by_column *= np.exp(-2j * np.pi * np.outer(np.arange(config.columns), np.arange(config.row)) / config.length)
        blocks = by_column[:, None]
        for radix in config.radices:  # decimation in frequency: the digit that is made becomes an axis of blocks
            size = blocks.shape[-1]
            parts = np.fft.fft(blocks.reshape(*blocks.shape[:2], radix, size // radix), axis=2)
            parts *= np.exp(-2j * np.pi * np.outer(np.arange(radix), np.arange(size // radix)) / size)
            blocks = parts.reshape(config.columns, -1, size // radix)
        by_block = blocks.reshape(config.columns, -1, config.radices[-1])  # position block * R + t
        flat = by_block.swapaxes(1, 2).ravel()  # [columns, R, row / R]
        assert np.argmax(np.abs(flat)) == places[frequency]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, 64, (8, 8), 8), "num_features 1, folds 1 and float32, got 2"),
        ((1, 4, 64, (8, 8), 16), "threads of a Toeplitz product: expected 64 / 8"),
        ((1, 4, 32, (4, 8), 8), "a first radix that the last one divides"),
    ],
)
def test_errors(arguments: tuple[int, int, int, tuple[int, ...], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GpuToeplitzConfig(*arguments)
    assert math.prod(arguments[3]) == arguments[2]
