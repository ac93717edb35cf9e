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
from rpe_tvm.errors import ArtefactError, GpuNotFoundError
from rpe_tvm.machine import X86, this_machine
from rpe_tvm.plan import gpu_backward_choice
from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.plan.gpu_wisdom import config_from_json
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.runtime import hip, toeplitz, tvm_runtime
from rpe_tvm.runtime.cpu import cpu_flags
from rpe_tvm.runtime.gpu import gpus
from rpe_tvm.runtime.gpu_operator import GpuInstance, function_names, kernel_functions
from rpe_tvm.runtime.operator import FUNCTIONS, Attention, Functions, Instance, backward_functions

FORMAT = 1
MANIFEST = "manifest.json"

# Operator and TVM's kind of target -> how its config is read, and the functions of one.
_OPERATORS: dict[tuple[str, str], tuple[Callable[[dict[str, Any]], Any], Callable[[Any], tuple[str, ...]]]] = {
    ("attention", "llvm"): (AttentionConfig.from_json, lambda config: FUNCTIONS),
    ("backward", "llvm"): (BackwardConfig.from_json, backward_functions),
    ("toeplitz", "llvm"): (ToeplitzConfig.from_json, lambda config: toeplitz.FUNCTIONS),
    ("attention", "cuda"): (config_from_json, function_names),
    ("backward", "cuda"): (gpu_backward_choice.config_from_json, function_names),
    ("toeplitz", "cuda"): (GpuToeplitzConfig.from_json, function_names),
    ("attention", "rocm"): (config_from_json, kernel_functions),
}


class _Broken(Exception):
    """The artefact is damaged or incomplete."""


class _Unfit(Exception):
    """The artefact is whole and cannot run here."""


@dataclass(frozen=True)
class _Wanted:
    """Which operator is looked for, and of a GPU operator for which GPU."""

    op: str
    kind: str = "llvm"
    gpu_index: int = 0
    arch: str = ""  # of an AMD GPU


@dataclass(frozen=True)
class _Candidate:
    """A library that can run here; of several for one config, that with the highest `fit` is taken."""

    config: Any
    library: Path
    functions: tuple[str, ...]
    fit: int
    tvm_version: str


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
    chosen = _candidates(Path(path), _Wanted("attention"))
    kinds = sorted({(c.config.num_features, c.config.head_dim) for c in chosen})
    if len(kinds) > 1:
        raise ArtefactError(
            f"Compiled operators of several kinds under {path}: expected one num_features m and head_dim d, "
            f"got {', '.join(f'm={m} d={d}' for m, d in kinds)}. Keep each kind in a directory of its own."
        )
    return Attention([Instance.of(candidate.config, _open(candidate)) for candidate in chosen])


def load_backward(path: str | os.PathLike[str]) -> Instance:
    """Load the compiled gradients of attention of one length under `path`; as `load`."""
    chosen = _only(path, _Wanted("backward"))
    return Instance.of(chosen.config, _open(chosen))


def load_toeplitz(path: str | os.PathLike[str]) -> toeplitz.ToeplitzInstance:
    """Load the compiled Toeplitz product of one length under `path`; as `load`."""
    chosen = _only(path, _Wanted("toeplitz"))
    return toeplitz.ToeplitzInstance.of(chosen.config, _open(chosen))


def load_gpu(path: str | os.PathLike[str], gpu_index: int = 0) -> GpuInstance:
    """Load the compiled attention of one length for an NVIDIA GPU under `path`; as `load`.

    The library is checked against the GPU's architecture and shared memory. TVM's runtime for CUDA is loaded with the
    first one, see `rpe_tvm.runtime.tvm_runtime`; torch, if it is used, has to be imported before.

    Parameters
    ----------
    path
        An artefact, or a directory of artefacts that holds one length.
    gpu_index
        Which GPU it has to run on, as torch counts them. What is loaded runs on all GPUs of the same architecture.
    """
    return _load_gpu("attention", path, gpu_index)


def load_gpu_backward(path: str | os.PathLike[str], gpu_index: int = 0) -> GpuInstance:
    """Load the compiled gradients of attention of one length for an NVIDIA GPU under `path`; as `load_gpu`."""
    return _load_gpu("backward", path, gpu_index)


def load_gpu_toeplitz(path: str | os.PathLike[str], gpu_index: int = 0) -> GpuInstance:
    """Load the compiled Toeplitz product of one length for an NVIDIA GPU under `path`; as `load_gpu`."""
    return _load_gpu("toeplitz", path, gpu_index)


def _load_gpu(op: str, path: str | os.PathLike[str], gpu_index: int) -> GpuInstance:
    chosen = _only(path, _Wanted(op, "cuda", gpu_index))
    tvm_runtime.load_cuda(chosen.library.absolute().parents[2], chosen.tvm_version)
    return GpuInstance(chosen.config, _open(chosen))


def load_hip(path: str | os.PathLike[str], arch: str, stream: hip.Stream, library: str | None = None) -> GpuInstance:
    """Load the compiled attention of one length for an AMD GPU under `path`; as `load`.

    Parameters
    ----------
    path
        An artefact, or a directory of artefacts that holds one length.
    arch
        The architecture of the GPU, such as ``gfx942``. What is loaded runs on all GPUs of that architecture.
    stream
        Called for each launch: the stream that it goes to, such as torch's current one.
    library
        HIP's library; None: the one that this process has loaded, else the one that the system finds.

    Raises
    ------
    GpuNotFoundError
        If HIP's library cannot be loaded.
    """
    chosen = _only(path, _Wanted("attention", "rocm", arch=arch))
    rules = json.loads((chosen.library.parent / MANIFEST).read_text(encoding="utf-8"))["device"]["functions"]
    return GpuInstance(chosen.config, hip.functions_of(hip.Hip(library), chosen.library, rules, stream))


def _only(path: str | os.PathLike[str], wanted: _Wanted) -> _Candidate:
    chosen = _candidates(Path(path), wanted)
    if len(chosen) > 1:
        names = ", ".join(candidate.config.name for candidate in chosen)
        raise ArtefactError(f"Several operators under {path}: expected the directory of one, got {names}.")
    return chosen[0]


def _candidates(top: Path, wanted: _Wanted) -> list[_Candidate]:
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
            candidate = _check(directory, wanted)
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
        where = "" if wanted.kind == "llvm" else f" for {wanted.kind}"
        raise ArtefactError(f"No compiled operator {wanted.op!r}{where} under {top}: only others are there.")
    best: dict[str, _Candidate] = {}
    for each in accepted:
        rival = best.setdefault(each.config.name, each)
        if each.fit > rival.fit:
            best[each.config.name] = each
    return list(best.values())


def _check(directory: Path, wanted: _Wanted) -> _Candidate | None:
    """Return what the directory holds, None if it is another operator than `wanted`."""
    try:
        fields = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _Broken(f"cannot read {MANIFEST}: {error}") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise _Broken(f"{MANIFEST} is no manifest of rpe_tvm")
    if fields["format"] != FORMAT:
        raise _Unfit(f"format {fields['format']!r}, this rpe_tvm {__version__} reads format {FORMAT}")
    try:
        op, target = str(fields["op"]), dict(fields["target"])
        kind = str(target["kind"])
    except (KeyError, TypeError, ValueError) as error:
        raise _Broken(f"{MANIFEST} is incomplete: {error!r}") from error
    if (op, kind) not in _OPERATORS:
        known = ", ".join(f"{op!r} for {kind}" for op, kind in _OPERATORS)
        raise _Unfit(f"operator {op!r} for {kind}, this rpe_tvm {__version__} knows {known}")
    if (op, kind) != (wanted.op, wanted.kind):
        return None
    read_config, names_of = _OPERATORS[op, kind]
    try:
        library = directory / Path(str(fields["library"]["file"])).name
        sha256 = str(fields["library"]["sha256"])
        versions = {str(name): str(version) for name, version in fields["versions"].items()}
        functions = set(fields["functions"])
        config_fields = dict(fields["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Broken(f"{MANIFEST} is incomplete: {error!r}") from error
    _check_file(library, sha256)
    for package, installed in (("apache-tvm-ffi", tvm_ffi.__version__), ("rpe_tvm", __version__)):
        built = versions.get(package, "unknown")
        if _minor(built) != _minor(installed):
            raise _Unfit(f"built with {package} {built}, installed is {installed} (both must be {_minor(installed)}.*)")
    try:
        if kind == "rocm":
            fit = _fit_of_amd(target, fields["device"], functions, wanted.arch)
        else:
            fit = _fit_of_cpu(target) if kind == "llvm" else _fit_of_gpu(target, fields["device"], wanted.gpu_index)
    except (KeyError, TypeError, ValueError) as error:
        raise _Broken(f"{MANIFEST} is incomplete: {error!r}") from error
    try:
        config = read_config(config_fields)
    except (TypeError, ValueError) as error:
        raise _Broken(f"{MANIFEST} has no usable config: {error}") from error
    names = names_of(config)
    missing = [name for name in names if name not in functions]
    if missing:
        raise _Broken(f"the library has no function {', '.join(missing)}")
    return _Candidate(config, library, names, fit, versions.get("apache-tvm", "unknown"))


def _fit_of_cpu(target: dict[str, Any]) -> int:
    """How many of this CPU's features a library uses; raises `_Unfit` if it needs others."""
    machine, here = str(target.get("machine", X86)), this_machine()
    if machine != here:
        raise _Unfit(f"compiled for {target['id']}, an {machine} CPU, and this machine is {here}")
    needed, have = frozenset(map(str, target["cpu_features"])), cpu_flags()
    if not needed <= have:
        lacking = ", ".join(sorted(needed - have)) if have else "flags in /proc/cpuinfo, which cannot be read"
        raise _Unfit(f"compiled for {target['id']}, and this CPU lacks {lacking}")
    return len(needed)


def _fit_of_gpu(target: dict[str, Any], device: dict[str, Any], gpu_index: int) -> int:
    """The architecture that a library was tuned for, if a GPU of this machine can run it; else raises `_Unfit`."""
    architectures = [str(arch) for arch in device["architectures"]]
    ptx, shared_bytes, tuned_for = str(device["ptx"]), int(device["shared_bytes"]), _capability(str(target["arch"]))
    try:
        found = gpus()
    except GpuNotFoundError as error:
        raise _Unfit(f"compiled for GPUs ({', '.join(architectures)}). {error}") from error
    if not 0 <= gpu_index < len(found):
        raise _Unfit(f"compiled for GPUs, and this process has no GPU {gpu_index}: it has {len(found)}")
    gpu = found[gpu_index]
    here = _capability(gpu.arch)
    # Machine code runs on its own and on later minor versions of its major version, PTX on everything later.
    if not any(arch // 10 == here // 10 and arch <= here for arch in map(_capability, architectures)) and not (
        _capability(ptx) <= here
    ):
        raise _Unfit(f"compiled for {', '.join(architectures)} and later, GPU {gpu_index} ({gpu.name}) is {gpu.arch}")
    if shared_bytes > gpu.shared_bytes:
        raise _Unfit(
            f"needs {shared_bytes} bytes of shared memory for each block, GPU {gpu_index} ({gpu.name}) has "
            f"{gpu.shared_bytes}"
        )
    return tuned_for if tuned_for <= here else -tuned_for


def _fit_of_amd(target: dict[str, Any], device: dict[str, Any], functions: set[str], arch: str) -> int:
    """1 if a code object runs on an architecture, which no other one's does; else raises `_Unfit`."""
    if not functions <= set(device["functions"]):
        raise ValueError("device.functions lacks some of the functions")
    if target["arch"] != arch:
        raise _Unfit(f"compiled for {target['arch']}, and the GPU is {arch}")
    return 1


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


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
    library, names = candidate.library.resolve(), candidate.functions
    try:
        module = tvm_ffi.load_module(str(library))
        return {name: module[name] for name in names}
    except (RuntimeError, OSError, AttributeError, KeyError) as error:
        hint = ""
        if "libgomp" in str(error):
            hint = " Install the OpenMP runtime (Debian and Ubuntu: apt install libgomp1)."
        raise ArtefactError(f"Could not open the compiled operator {library.parent}:", [f"{error}{hint}"]) from error
