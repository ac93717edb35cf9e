"""The manifest of a compiled library: what it is, where it runs, and the versions that made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rpe_tvm import __version__
from rpe_tvm.errors import BuildError
from rpe_tvm.targets import AnyTarget

FORMAT = 1  # of what `make` returns; rpe_tvm.runtime.load reads this format and no other
FILE = "manifest.json"
LIBRARY = "lib.so"

_TVM, _FFI = "apache-tvm", "apache-tvm-ffi"
_TESTED = {_TVM: "0.27.0.post1", _FFI: "0.1.14.post1"}
# Prefixes of the versions that work together.
_WORKING = {_TVM: "0.27.", _FFI: "0.1.14"}


def versions() -> dict[str, str]:
    """Versions of the packages that a compiled library depends on."""
    return {_TVM: metadata.version(_TVM), _FFI: metadata.version(_FFI), "rpe_tvm": __version__}


def check_versions() -> None:
    """Raise `BuildError` unless TVM and tvm-ffi are installed in versions that work together.

    With other pairs TVM 0.27 crashes the process when it saves a module (apache/tvm#20094), so this does not
    import it.
    """
    found: dict[str, str] = {}
    for package in _WORKING:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if all(found[package].startswith(prefix) for package, prefix in _WORKING.items()):
        return
    wanted = " ".join(f'"{package}=={version}"' for package, version in _TESTED.items())
    raise BuildError(
        f"Compiling needs {_TVM} {_WORKING[_TVM]}* and {_FFI} {_WORKING[_FFI]}* (other pairs crash), found "
        f"{_TVM} {found[_TVM]} and {_FFI} {found[_FFI]}. Install them with: pip install {wanted}"
    )


def make(
    *,
    op: str,
    config: Mapping[str, Any],
    target: AnyTarget,
    schedule: Mapping[str, Any],
    functions: Iterable[str],
    library: Path,
    device: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of the library at `library`.

    Parameters
    ----------
    op
        Name of the operator.
    config
        Its config, as JSON values.
    target
        What it was compiled for.
    schedule
        Where its schedule comes from; ``source`` is ``"tuned"`` or ``"default"``.
    functions
        Names of its functions.
    library
        The compiled library; the manifest stands beside it.
    device
        Of a library for GPUs, what `rpe_tvm.build.cuda.build` says of its device code.
    """
    return {
        "format": FORMAT,
        "op": op,
        "config": dict(config),
        "target": target.to_json(),
        "versions": versions(),
        "schedule": dict(schedule),
        "library": {"file": library.name, "sha256": sha256(library), "bytes": library.stat().st_size},
        "functions": sorted(functions),
        **({} if device is None else {"device": dict(device)}),
    }


def write(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of the library in `directory`."""
    (directory / FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read(directory: Path) -> dict[str, Any]:
    """Read the manifest in `directory`; OSError or ValueError if there is no readable one."""
    manifest = json.loads((directory / FILE).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError(f"{directory / FILE} holds no JSON object")
    return manifest


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
