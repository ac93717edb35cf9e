"""Finds and loads the two libraries of TVM that GPU libraries need: kernels are launched by TVM's runtime.

Loading them is all: TVM itself is never imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from importlib import metadata
from pathlib import Path

import tvm_ffi

from rpe_tvm.errors import ArtefactError

VARIABLE = "RPE_TVM_RUNTIME"
LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_cuda.so")
PACKED = "tvm_runtime"  # directory beside artefacts that `python -m rpe_tvm compile` copies them to

# Functions that each library registers.
_REGISTERED = ("runtime.NumThreads", "ffi.Module.load_from_bytes.cuda")

_lock = threading.Lock()


def load_cuda(artefacts: Path, version: str) -> None:
    """Load TVM's runtime for CUDA into this process, unless it is there.

    Call it after torch was imported: ``libtvm_runtime_cuda.so`` needs ``libcudart.so.13``, which torch brings along
    and loads.

    Parameters
    ----------
    artefacts
        A directory of artefacts, which may hold a directory `PACKED`.
    version
        The version of apache-tvm that compiled them.

    Raises
    ------
    ArtefactError
        If a library is missing, is of another version, or does not load; it says why.
    """
    with _lock:
        missing = [
            name
            for name, function in zip(LIBRARIES, _REGISTERED, strict=True)
            if tvm_ffi.get_global_func(function, allow_missing=True) is None
        ]
        if not missing:
            return
        directory = find(artefacts, version)
        for name in missing:
            try:
                ctypes.CDLL(str(directory / name))
            except OSError as error:
                raise ArtefactError(f"Could not load {name} from {directory}:", [f"{error}{_hint(error)}"]) from error


def find(artefacts: Path, version: str) -> Path:
    """The directory of `LIBRARIES`: of the installed package apache-tvm, else the one that `VARIABLE` names,
    else `PACKED` in the directory of artefacts.

    Raises
    ------
    ArtefactError
        If they are at none of these places.
    """
    # The package first, before the user's word: where TVM is imported later and meets a second copy of its runtime, it
    # ends the process.
    places: dict[str, Path | None] = {"in the package apache-tvm": installed()}
    named = os.environ.get(VARIABLE)
    if named:
        places[f"{VARIABLE}={named}"] = Path(named)
    else:
        places["beside the artefacts"] = artefacts / PACKED
    reasons = []
    for place, directory in places.items():
        if directory is None:
            reasons.append(f"{place}: it is not installed")
            continue
        lacking = [name for name in LIBRARIES if not (directory / name).is_file()]
        found = metadata.version("apache-tvm") if directory == installed() else version
        if lacking:
            reasons.append(f"{place} ({directory}): no {' and no '.join(lacking)}")
        elif found.split(".")[:2] != version.split(".")[:2]:
            reasons.append(f"{place} ({directory}): version {found}, compiled with {version}")
        else:
            return directory.absolute()
    raise ArtefactError(
        f"Compiled operators for GPUs need {' and '.join(LIBRARIES)} of apache-tvm {version}. Compile with --out, "
        f"which copies them, install apache-tvm, or name their directory in {VARIABLE}:",
        reasons,
    )


def installed() -> Path | None:
    """The directory of the libraries of the installed package apache-tvm, without importing it."""
    try:
        metadata.version("apache-tvm")
        spec = importlib.util.find_spec("tvm")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"


def _hint(error: OSError) -> str:
    if "libcudart" in str(error):
        return ". Import a torch that is built for CUDA 13 first (torch.version.cuda says what it is built for)."
    if "libcuda.so" in str(error):
        return ". Install NVIDIA's driver, release 580 or later."
    return ""
