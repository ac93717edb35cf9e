"""A small bundle for AVX2 and for ARM, and the C and C++ programs that come with it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpe_tvm.edge import Packed

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bundles import TARGETS, compile_examples, make, unpack  # noqa: E402


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that all bundles share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def packed(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """A bundle for AVX2, and for ARM where it can be cross-compiled."""
    names = TARGETS if shutil.which("aarch64-linux-gnu-g++") else TARGETS[:1]
    return make(names, tmp_path_factory.mktemp("bundle") / "bundle.tar.gz")


@pytest.fixture(scope="session")
def unpacked(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the bundle was unpacked to; not to be changed."""
    return unpack(packed.path, tmp_path_factory.mktemp("unpacked"))


@pytest.fixture
def damaged(unpacked: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(unpacked, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def programs(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the compiled examples."""
    out = tmp_path_factory.mktemp("programs")
    compile_examples(unpacked, out)
    return out


@pytest.fixture(scope="session")
def arm_programs(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for aarch64."""
    out = tmp_path_factory.mktemp("arm_programs")
    compile_examples(unpacked, out, "aarch64-linux-gnu-")
    return out
