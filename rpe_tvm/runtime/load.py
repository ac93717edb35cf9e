"""Loads compiled operators after checking that this machine can run them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm_ffi

from rpe_tvm import __version__
from rpe_tvm.errors import ArtefactError
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.runtime import toeplitz
from rpe_tvm.runtime.cpu import cpu_flags
from rpe_tvm.runtime.operator import FUNCTIONS, Attention, Functions, Instance, backward_functions

FORMAT = 1
MANIFEST = "manifest.json"

# Operator -> its config, and the names of the functions for a config.
_OPERATORS: dict[str, tuple[Any, Callable[[Any], tuple[str, ...]]]] = {
    "attention": (AttentionConfig, lambda config: FUNCTIONS),
    "backward": (BackwardConfig, backward_functions),
    "toeplitz": (ToeplitzConfig, lambda config: toeplitz.FUNCTIONS),
}


class _Broken(Exception):
    """The artefact is damaged or incomplete."""


class _Unfit(Exception):
    """The artefact is whole and cannot run here."""


@dataclass(frozen=True)
class _Candidate:
    config: Any
    library: Path
    cpu_features: frozenset[str]


def load(path: str | os.PathLike[str]) -> Attention:
    """Load the compiled operators under `path`.

    Every library is checked against its manifest (format, SHA-256) and against this process (version of
    tvm-ffi and of rpe_tvm, CPU flags). Of several targets of one length, the one that uses most of this CPU
    is taken.

    Parameters
    ----------
    path
        One artefact (a directory with ``manifest.json``), or a directory of artefacts,
        ``<path>/<name>/<target>/manifest.json``.

    Returns
    -------
    Attention
        The operator, with all compiled lengths under `path`.

    Raises
    ------
    ArtefactError
        If nothing is there, something is damaged, or a length has no library that this machine can run;
        `reasons` has one line for each refused candidate.
    """
    chosen = _candidates(Path(path), "attention")
    kinds = sorted({(c.config.num_features, c.config.head_dim) for c in chosen})
    if len(kinds) > 1:
        raise ArtefactError(
            f"Compiled operators of several kinds under {path}: expected one num_features m and head_dim d, "
            f"got {', '.join(f'm={m} d={d}' for m, d in kinds)}. Keep each kind in a directory of its own."
        )
    return Attention([Instance.of(candidate.config, _open(candidate)) for candidate in chosen])


def load_backward(path: str | os.PathLike[str]) -> Instance:
    """Load the compiled gradients of attention of one length under `path`; as `load`."""
    chosen = _only(path, "backward")
    return Instance.of(chosen.config, _open(chosen))


def load_toeplitz(path: str | os.PathLike[str]) -> toeplitz.ToeplitzInstance:
    """Load the compiled Toeplitz product of one length under `path`; as `load`."""
    chosen = _only(path, "toeplitz")
    return toeplitz.ToeplitzInstance.of(chosen.config, _open(chosen))


def _only(path: str | os.PathLike[str], op: str) -> _Candidate:
    chosen = _candidates(Path(path), op)
    if len(chosen) > 1:
        names = ", ".join(candidate.config.name for candidate in chosen)
        raise ArtefactError(f"Several operators under {path}: expected the directory of one, got {names}.")
    return chosen[0]


def _candidates(top: Path, op: str) -> list[_Candidate]:
    """Return the best library of each length of an operator under `top`; other operators may lie beside it."""
    manifests = [found for depth in ("", "*/", "*/*/") for found in sorted(top.glob(depth + MANIFEST))]
    if not manifests:
        raise ArtefactError(
            f"No compiled operator under {top}: expected {MANIFEST} there or in <name>/<target>/. Make one "
            f"with: python -m rpe_tvm compile --op attention --features 32 --head-dim 64 --lengths 4096 "
            f"--out {top}"
        )
    accepted: list[_Candidate] = []
    broken: list[str] = []
    unfit: dict[Path, list[str]] = {}
    for manifest in manifests:
        directory = manifest.parent
        try:
            candidate = _check(directory, op)
            if candidate is not None:
                accepted.append(candidate)
        except _Broken as reason:
            broken.append(f"{directory}: {reason}")
        except _Unfit as reason:
            unfit.setdefault(directory.parent, []).append(f"{directory}: {reason}")
    # Libraries for other CPUs are no fault where one for this CPU stands beside them; damage always is.
    served = {candidate.library.parent.parent for candidate in accepted}
    refused = broken + [r for parent, reasons in unfit.items() if parent not in served for r in reasons]
    if refused:
        raise ArtefactError(
            f"Refused to load compiled operators under {top}. Compile them again, on or for this machine "
            f"(python -m rpe_tvm compile):",
            refused,
        )
    if not accepted:
        raise ArtefactError(f"No compiled operator {op!r} under {top}: only others are there.")
    best: dict[str, _Candidate] = {}
    for each in accepted:
        rival = best.setdefault(each.config.name, each)
        if len(each.cpu_features) > len(rival.cpu_features):
            best[each.config.name] = each
    return list(best.values())


def _check(directory: Path, op: str) -> _Candidate | None:
    """Return what the directory holds, None if it is another operator than `op`."""
    try:
        fields = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _Broken(f"cannot read {MANIFEST}: {error}") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise _Broken(f"{MANIFEST} is no manifest of rpe_tvm")
    if fields["format"] != FORMAT:
        raise _Unfit(f"format {fields['format']!r}, this rpe_tvm {__version__} reads format {FORMAT}")
    found = fields.get("op")
    if found not in _OPERATORS:
        raise _Unfit(f"operator {found!r}, this rpe_tvm {__version__} knows {', '.join(map(repr, _OPERATORS))}")
    if found != op:
        return None
    config_class, names_of = _OPERATORS[op]
    try:
        library = directory / Path(str(fields["library"]["file"])).name
        sha256 = str(fields["library"]["sha256"])
        versions = {str(name): str(version) for name, version in fields["versions"].items()}
        target = str(fields["target"]["id"])
        needed = frozenset(map(str, fields["target"]["cpu_features"]))
        functions = set(fields["functions"])
        config_fields = dict(fields["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Broken(f"{MANIFEST} is incomplete: {error!r}") from error
    _check_file(library, sha256)
    for package, installed in (("apache-tvm-ffi", tvm_ffi.__version__), ("rpe_tvm", __version__)):
        built = versions.get(package, "unknown")
        if _minor(built) != _minor(installed):
            raise _Unfit(f"built with {package} {built}, installed is {installed} (both must be {_minor(installed)}.*)")
    have = cpu_flags()
    if not needed <= have:
        lacking = ", ".join(sorted(needed - have)) if have else "flags in /proc/cpuinfo, which cannot be read"
        raise _Unfit(f"compiled for {target}, and this CPU lacks {lacking}")
    try:
        config = config_class.from_json(config_fields)
    except (TypeError, ValueError) as error:
        raise _Broken(f"{MANIFEST} has no usable config: {error}") from error
    missing = [name for name in names_of(config) if name not in functions]
    if missing:
        raise _Broken(f"the library has no function {', '.join(missing)}")
    return _Candidate(config, library, needed)


def _check_file(library: Path, sha256: str) -> None:
    try:
        content = library.read_bytes()
    except OSError as error:
        raise _Broken(f"cannot read {library.name}: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise _Broken(
            f"{library.name} was altered or truncated: expected SHA-256 {sha256[:12]}..., got {found[:12]}..."
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _open(candidate: _Candidate) -> Functions:
    library = candidate.library.resolve()
    _, names_of = _OPERATORS[candidate.config.op]
    try:
        module = tvm_ffi.load_module(str(library))
        return {name: module[name] for name in names_of(candidate.config)}
    except (RuntimeError, OSError, AttributeError, KeyError) as error:
        hint = ""
        if "libgomp" in str(error):
            hint = " Install the OpenMP runtime (Debian and Ubuntu: apt install libgomp1)."
        raise ArtefactError(f"Could not open the compiled operator {library.parent}:", [f"{error}{hint}"]) from error
