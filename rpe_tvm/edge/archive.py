"""Writes archives; reads the files of a bundle, an archive or a directory, and checks them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from rpe_tvm.edge import contents
from rpe_tvm.errors import ArtefactError, BuildError

_TIME = 315532800  # of every file: 1980, the oldest that zip tools know, too


def pack(path: Path, top: str, files: Mapping[str, bytes]) -> Path:
    """Write files below the directory `top` to the archive `path`, in order and with a fixed date; returns `path`.

    A file that is there is replaced when the new one is whole.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            staging.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped,
            tarfile.open(mode="w", fileobj=zipped, format=tarfile.USTAR_FORMAT) as archive,
        ):
            for name, content in sorted(files.items()):
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mtime, entry.mode = len(content), _TIME, 0o644
                archive.addfile(entry, io.BytesIO(content))
        os.replace(staging, path)
    except OSError as error:
        raise BuildError(f"Could not write {path}: {error}. Give another place.") from error
    finally:
        staging.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, bytes]:
    """Path -> content of the files that the bundle at `path` lists, checked against its ``SHA256SUMS``.

    Raises
    ------
    ArtefactError
        If `path` is no bundle, or a file of it is missing, altered or truncated; `reasons` has a line for each file.
    """
    files = _unpacked(path) if path.is_dir() else _packed(path)
    if contents.SUMS not in files:
        raise ArtefactError(
            f"No bundle of rpe_tvm: {path} has no {contents.SUMS}. Make one with: python -m rpe_tvm package"
        )
    expected = contents.read_sums(files[contents.SUMS].decode(errors="replace"))
    if contents.FILE not in expected:
        raise ArtefactError(
            f"No bundle of an operator: {path} has no {contents.FILE}. A whole model is checked by its own program, "
            "run_model."
        )
    wrong = []
    for name, sha256 in sorted(expected.items()):
        if name not in files:
            wrong.append(f"{name} is missing")
        elif hashlib.sha256(files[name]).hexdigest() != sha256:
            found = hashlib.sha256(files[name]).hexdigest()
            wrong.append(
                f"{name} was altered or truncated: expected SHA-256 {sha256[:12]}..., got {found[:12]}... "
                f"({len(files[name])} bytes)"
            )
    if wrong:
        raise ArtefactError(f"The bundle {path} is damaged. Copy it again, or package it again:", wrong)
    return {name: files[name] for name in expected}


def write(files: dict[str, bytes], directory: Path) -> None:
    """Write files as the archive has them; their paths come from `read`."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def _packed(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    files[member.name.partition("/")[2]] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ArtefactError(
            f"Cannot read the bundle {path}: {error}. Expected the archive that python -m rpe_tvm package wrote, "
            "whole, or the directory that it was unpacked to."
        ) from error
    return files


def _unpacked(path: Path) -> dict[str, bytes]:
    try:
        sums = (path / contents.SUMS).read_bytes()
        listed = contents.read_sums(sums.decode(errors="replace"))
        found = {name: (path / name).read_bytes() for name in listed if (path / name).is_file()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ArtefactError(f"Cannot read the bundle in {path}: {error}") from error
    return {**found, contents.SUMS: sums}
