"""Operators that are cross-compiled for ARM are right: they run under emulation."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpe_tvm import build, reference, targets
from rpe_tvm.build import manifest
from rpe_tvm.plan import backward, toeplitz
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.runtime import Attention, Instance, ToeplitzInstance

sys.path.append(str(Path(__file__).resolve().parents[1]))
import emulated  # noqa: E402

pytestmark = pytest.mark.compile

TARGETS = [
    pytest.param("cortex-a72", marks=emulated.needs("aarch64")),
    pytest.param("armv7", marks=emulated.needs("armv7")),
]
# the CPU that qemu pretends to be, so that an instruction that the target lacks ends the program
CPUS = {"cortex-a72": "cortex-a72", "cortex-a76": "cortex-a76", "armv7": "cortex-a7"}
DIRECT = AttentionConfig(5, 40, 128, "direct", tile=(64, 64), lanes=4)
FFT = AttentionConfig(5, 40, 32, "fft", (8,), (4,), lanes=4)  # the last group of channels is not full


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles a config for a target and returns its functions, which run under emulation."""

    @cache
    def machine(name: str) -> emulated.EmulatedMachine:
        return emulated.EmulatedMachine.make(name, tmp_path_factory.mktemp("emulated"))

    @cache
    def compiled(config: Any, name: str) -> Any:
        target = targets.preset(name)
        artefact = build.compile_operator(config, target)
        names = tuple(manifest.read(artefact)["functions"])
        return machine(target.machine).functions(artefact / manifest.LIBRARY, names, CPUS[name])

    return compiled


@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize("config", [DIRECT, FFT], ids=lambda config: config.algorithm)
@pytest.mark.parametrize("target", TARGETS)
def test_attention(functions: Any, target: str, config: AttentionConfig, feature_map: str) -> None:
    operator = Attention([Instance.of(config, functions(config, target))])
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape).astype("f4")

    n_q, n_k = config.length - 1, config.length // 2 + 1
    query, key, value = normal(1, 2, n_q, 40), normal(1, 2, n_k, 40), normal(1, 2, n_k, 40)
    bias = normal(2, n_q + n_k - 1)
    # mild weights: by FFT the first rows of causal attention lose the digits by which their denominators are smaller
    arrays = 0.5 * query, 0.5 * key, value, 0.1 * bias, normal(5, 40)
    for is_causal in (False, True):
        out = np.full((1, 2, n_q, 40), np.nan, "f4")
        operator(*arrays, feature_map=feature_map, is_causal=is_causal, out=out)
        expected = reference.attention(*arrays, feature_map=feature_map, is_causal=is_causal)[2]
        tolerance = 1e-5 if is_causal and config.algorithm == "fft" else 1e-6
        assert np.linalg.norm(out - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("algorithm", ["direct", "fft"])
@pytest.mark.parametrize("target", TARGETS[:1])
def test_gradients(functions: Any, target: str, algorithm: str) -> None:
    pytest.importorskip("torch")
    from gradient_check import check_gradients

    if algorithm == "direct":
        config = backward.direct_config(targets.preset(target).id, 5, 7, 4)
    else:
        config = backward.BackwardConfig(5, 7, 16, "fft", (4,), (4,), lanes=4)
    check_gradients(Instance.of(config, functions(config, target)), 15, 16, is_causal=True)


@pytest.mark.parametrize("target", TARGETS[:1])
def test_toeplitz(functions: Any, target: str) -> None:
    config = toeplitz.ToeplitzConfig(5, 16, (4,), (4,), 4)
    operator = ToeplitzInstance.of(config, functions(config, target))
    random = np.random.default_rng(0)
    weights, x = (random.standard_normal(shape).astype("f4") for shape in ((3, 13 + 16 - 1), (2, 3, 16, 5)))
    out = np.full((2, 3, 13, 5), np.nan, "f4")
    operator.matmul(weights, x, out)
    expected = reference.toeplitz_dense(weights, x, 13)
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)
