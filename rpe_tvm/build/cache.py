"""The cache of compiled libraries on disk.

It stands at ``$RPE_TVM_CACHE``, else ``$XDG_CACHE_HOME/rpe_tvm``, else ``~/.cache/rpe_tvm``:

- ``artefacts/<config name>/<target id>/<key>/{lib.so, manifest.json}``
- ``objects/<key>/``: compiled backend hooks
- ``shortcuts/<key>.json``: which artefact serves a call, see `rpe_tvm.build.shortcut`
- ``staging/``, ``locks/``: entries being built; one lock for each key

An entry is built in staging under its lock and renamed into place, so that two processes can build at once
and one that is killed leaves nothing half done. An entry that is found damaged is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from rpe_tvm.errors import BuildError

VARIABLE = "RPE_TVM_CACHE"

_KEY = re.compile(r"[0-9a-f]{40}")
_LOCK_SECONDS = 1800.0  # far more than any build takes


@dataclass(frozen=True)
class Entry:
    """A compiled library in the cache."""

    name: str
    target: str
    path: Path
    bytes: int
    modified: float


def root() -> Path:
    """The cache's directory; it need not exist."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and os.path.isabs(shared):
        return Path(shared) / "rpe_tvm"
    try:
        return Path.home() / ".cache" / "rpe_tvm"
    except RuntimeError as error:
        raise BuildError(f"No home directory for the cache: set {VARIABLE} to a directory. ({error})") from error


def key_of(content: Mapping[str, object]) -> str:
    """Hash of `content`, which must be JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def entry(relative: Path, is_whole: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """The directory `relative` of the cache, built first if it is missing or damaged.

    Parameters
    ----------
    relative
        Its place under `root`; the last part is its key.
    is_whole
        Whether a directory holds a complete entry; may raise OSError or ValueError for one that does not.
    build
        Fills an empty directory.

    Raises
    ------
    BuildError
        If the cache cannot be written to. What `build` raises goes through.
    """
    try:
        top = root()
        final = top / relative
        if _is_whole(final, is_whole):
            return final
        with _lock(top, relative.name, _LOCK_SECONDS):
            if _is_whole(final, is_whole):  # another process was faster
                return final
            staging = top / "staging" / relative.name
            shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
            staging.mkdir(parents=True)
            try:
                build(staging)
                _remove(top, final)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging, final)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return final
    except OSError as error:
        raise BuildError(
            f"Could not use the cache at {root()}: {error}. Set {VARIABLE} to a writable directory."
        ) from error


def entries() -> list[Entry]:
    """All compiled libraries in the cache, by name and target."""
    found = []
    for path in sorted(root().glob("artefacts/*/*/*")):
        try:
            files = [file.stat() for file in path.iterdir()]
        except OSError:  # no directory, or removed meanwhile
            continue
        if files and _KEY.fullmatch(path.name):
            size, modified = sum(file.st_size for file in files), max(file.st_mtime for file in files)
            found.append(Entry(path.parent.parent.name, path.parent.name, path, size, modified))
    return found


def clear() -> int:
    """Remove everything from the cache that is not being built now; returns the number of libraries
    removed."""
    top = root()
    removed = 0
    for pattern in ("artefacts/*/*/*", "objects/*", "staging/*"):
        for path in sorted(top.glob(pattern)):
            if not _KEY.fullmatch(path.name):  # not ours
                continue
            try:
                with _lock(top, path.name, 0):
                    _remove(top, path)
            except BuildError:  # in use
                continue
            except OSError as error:
                raise BuildError(f"Could not remove {path}: {error}") from error
            removed += pattern.startswith("artefacts")
    for path in top.glob("shortcuts/*"):
        path.unlink(missing_ok=True)
    for path in [*top.glob("artefacts/*/*"), *top.glob("artefacts/*")]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return removed


def _is_whole(directory: Path, is_whole: Callable[[Path], bool]) -> bool:
    try:
        return is_whole(directory)
    except (OSError, ValueError):
        return False


def _remove(top: Path, directory: Path) -> None:
    """Remove a directory so that nobody ever sees it half removed. The caller holds the lock of its key."""
    doomed = top / "staging" / f"{directory.name}-removed"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(directory, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _lock(top: Path, key: str, seconds: float) -> Iterator[None]:
    # The lock goes with its process, so a killed one blocks nobody; the empty file stays.
    path = top / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except filelock.Timeout as error:
        raise BuildError(
            f"Another process has held {path} for {seconds:.0f} seconds. End it, or set {VARIABLE} to "
            f"another directory."
        ) from error
    try:
        yield
    finally:
        lock.release()
