"""Writes files so that none is ever half there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rpe_tvm.errors import BuildError


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a staging file beside its place and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(staging, path)


def copy_files(source: Path, names: Iterable[str], destination: Path) -> Path:
    """Copy files of one directory to another, under temporary names until all are there; returns `destination`.

    Raises
    ------
    BuildError
        If `destination` cannot be written to.
    """
    names = list(names)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination, prefix=".copy-") as staging:
            for name in names:
                shutil.copyfile(source / name, Path(staging) / name)
            for name in names:
                os.replace(Path(staging) / name, destination / name)
    except OSError as error:
        raise BuildError(f"Could not write the compiled library to {destination}: {error}") from error
    return destination
