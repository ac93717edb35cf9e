"""What tests of tuning share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def processes_without_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """PYTHONPATH of processes that start sooner: tvm_ffi imports torch where it is there."""
    sys.path.append(str(ROOT / "tests"))
    import rpc_servers

    path = f"{rpc_servers.hide_torch(tmp_path_factory.mktemp('without_torch'))}:{ROOT}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        yield path
