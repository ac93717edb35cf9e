"""Remembers which artefact of the cache serves a call, so that a new process finds it without TVM.

The cache's own keys are hashes of scheduled functions: to make one takes the import of TVM and their lowering, four
seconds. A shortcut is keyed by what these functions are made from.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from rpe_tvm.build import cache, manifest
from rpe_tvm.files import write_json
from rpe_tvm.plan import wisdom
from rpe_tvm.runtime.cpu import cpu_identity

DIRECTORY = "shortcuts"
_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = (".", "build", "plan", "te", "schedules")  # what a compiled library is made from


def key_of_call(kind: str, bucket: int) -> str:
    """Return the key of a call: its kind of operator (such as ``attention-m32-d64``) and bucket, and what it depends
    on: our sources and tuning logs, the versions and the CPU.
    """
    files = [file for name in _SOURCES for file in (_PACKAGE / name).glob("*.*")] + list(wisdom.LOGS.rglob("*.json"))
    stats = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return cache.key_of(
        {
            "call": [kind, bucket],
            "files": stats,
            "versions": manifest.versions(),
            "cpu": cpu_identity(),
        }
    )


def look_up(key: str) -> Path | None:
    """Return the artefact that was remembered, if it still stands in the cache."""
    try:
        relative = json.loads(_file(key).read_text(encoding="utf-8"))["artefact"]
        path = cache.root() / relative
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if (path / manifest.FILE).is_file() else None


def remember(key: str, artefact: Path) -> None:
    """Remember an artefact of the cache; where the cache cannot be written to, nothing is remembered."""
    with contextlib.suppress(OSError, ValueError):
        write_json(_file(key), {"artefact": str(artefact.relative_to(cache.root()))})


def _file(key: str) -> Path:
    return cache.root() / DIRECTORY / f"{key}.json"
