"""Small compiled operators, so that build and runtime are tested apart from the real kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpe_tvm.plan.config import AttentionConfig

ROOT = Path(__file__).resolve().parents[1]
NUM_FEATURES, HEAD_DIM = 3, 8


def naive_config(length: int) -> AttentionConfig:
    """The config that goes with `naive_module`."""
    return AttentionConfig(NUM_FEATURES, HEAD_DIM, length, "direct", tile=(64, 64), lanes=8)


def naive_module() -> Any:
    """The four functions of the attention operator as a TVM module, any length."""
    import tvm

    text = (ROOT / "tests" / "naive_attention.txt").read_text()
    text = text.replace("NUM_FEATURES", str(NUM_FEATURES)).replace("HEAD_DIM", str(HEAD_DIM))
    return tvm.script.from_source(text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, end with those that take no time.

    At the end one process would wait for the other.
    """
    places = {"tune": 0, "plan": 2, "reference": 2}
    items.sort(key=lambda item: places.get(item.path.parent.name, 1))


@pytest.fixture
def naive() -> tuple[AttentionConfig, Any]:
    """A config of length 64 and the module that goes with it."""
    return naive_config(64), naive_module()


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("RPE_TVM_CACHE", str(directory))
    return directory


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Naive operators of lengths 64 and 96 for AVX2, laid out as ``python -m rpe_tvm compile`` does."""
    from rpe_tvm import targets
    from rpe_tvm.build import compile as build

    top = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        target = targets.preset("haswell")
        for length in (64, 96):
            config = naive_config(length)
            built = build.compile_module(naive_module(), config.name, config.to_json(), target)
            build.copy_artefact(built, top / config.name / target.id)
    yield top


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a fresh process, with the package on its path."""

    def run(code: str, *arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run
