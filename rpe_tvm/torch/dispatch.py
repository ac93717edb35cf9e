"""Which compiled operator serves a call: from a directory of artefacts, else the cache, else compiled now."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rpe_tvm.errors import ArtefactError, BuildError, CompilerNotFoundError
from rpe_tvm.plan import backward, gpu, gpu_backward_choice, gpu_choice, gpu_toeplitz, toeplitz, wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.runtime import (
    GpuInstance,
    Instance,
    ToeplitzInstance,
    load,
    load_backward,
    load_gpu,
    load_gpu_backward,
    load_gpu_toeplitz,
    load_hip,
    load_toeplitz,
)
from rpe_tvm.runtime.gpu import gpus
from rpe_tvm.runtime.operator import Functions
from rpe_tvm.torch import hip

ARTEFACTS_VARIABLE = "RPE_TVM_ARTEFACTS"

# The name of a config: its kind, such as attention-m32-d64 or toeplitz-d64, its length, and on GPUs its dtype.
_NAME = re.compile(r"((?:attention|backward)-m\d+-d\d+|toeplitz-d\d+)-n(\d+)(-(?:float32|bfloat16|float16))?")

T = TypeVar("T")

_lock = threading.Lock()
_loaded: dict[tuple[str, str, int], Any] = {}  # (kind, target, bucket) -> operator
# What `_loaded` holds, by the numbers of a call: to make the names above takes as long as a launch.
_gpu_calls: dict[tuple[int, int, int, int, str], GpuInstance] = {}
_gpu_backward_calls: dict[tuple[int, int, int, int, str], GpuInstance] = {}
_gpu_toeplitz_calls: dict[tuple[int, int, int], GpuInstance] = {}
# A captured CUDA graph calls kernels without holding their library: what was loaded for a GPU stays.
_kept: list[Any] = []
# What others keep of `_loaded`: called when it is forgotten.
_when_forgotten: list[Callable[[], None]] = []
_warned: set[str] = set()
_artefacts: Path | None = None


@dataclass(frozen=True)
class _Kind(Generic[T]):
    """How one kind of operator is found and made.

    Parameters
    ----------
    name : str
        Its configs' names without the length.
    target : str
        For `rpe_tvm.targets.preset`.
    options : str
        Of ``python -m rpe_tvm compile``, without lengths.
    load : callable
        Path of an artefact and its length -> operator.
    choose : callable
        Target and bucket -> config.
    wrap : callable or None
        Config and functions compiled in memory -> operator. None where libraries cannot be compiled in memory.
    """

    name: str
    options: str
    load: Callable[[Path, int], T]
    choose: Callable[[Any, int], Any]
    wrap: Callable[[Any, Functions], T] | None
    target: str = "cpu"


def use_artefacts(directory: str | os.PathLike[str] | None) -> None:
    """Take compiled operators from this directory, before the cache, from the next call on.

    Nothing that the directory holds is ever compiled, and a process that finds all of its operators there
    needs neither TVM nor a compiler.

    Parameters
    ----------
    directory : path or None
        What ``python -m rpe_tvm compile --out DIR`` wrote. None: the one that the environment variable
        ``RPE_TVM_ARTEFACTS`` names, if any.

    Raises
    ------
    ArtefactError
        If the directory holds no compiled operator.
    """
    global _artefacts
    chosen = None if directory is None else Path(directory).resolve()
    if chosen is not None:
        _artefact_names(chosen)
    with _lock:
        _artefacts = chosen
        _kept.extend(operator for operator in _loaded.values() if isinstance(operator, GpuInstance))
        _loaded.clear()
        _gpu_calls.clear()
        _gpu_backward_calls.clear()
        _gpu_toeplitz_calls.clear()
        for forget in _when_forgotten:
            forget()


def when_forgotten(forget: Callable[[], None]) -> None:
    """Call `forget` when operators that were found before are found anew."""
    _when_forgotten.append(forget)


def get_operator(n: int, num_features: int, head_dim: int) -> Instance:
    """The compiled operator for n positions, for `rpe_tvm.runtime.run`; compiles it if it has to.

    Parameters
    ----------
    n : int
        The larger of the numbers of queries and keys.
    num_features, head_dim : int
        m and d.

    Raises
    ------
    ArtefactError
        If the directory of `use_artefacts` holds a library for this call that cannot run here, or if nothing
        is there and TVM is not installed.
    BuildError
        If compiling fails.
    """
    return _get(_attention(num_features, head_dim), bucket_length(n))


@functools.cache
def _attention(num_features: int, head_dim: int) -> _Kind[Instance]:
    return _Kind(
        name=f"attention-m{num_features}-d{head_dim}",
        options=f"--op attention --features {num_features} --head-dim {head_dim}",
        load=lambda path, length: load(path).instance(length),
        choose=lambda target, bucket: wisdom.choose(target.id, bucket, num_features, head_dim, target.lanes),
        wrap=Instance.of,
    )


def get_backward(n: int, num_features: int, head_dim: int) -> Instance:
    """The compiled gradients for n positions; as `get_operator`."""
    return _get(_backward(num_features, head_dim), bucket_length(n))


@functools.cache
def _backward(num_features: int, head_dim: int) -> _Kind[Instance]:
    return _Kind(
        name=f"backward-m{num_features}-d{head_dim}",
        options=f"--op backward --features {num_features} --head-dim {head_dim}",
        load=lambda path, length: load_backward(path),
        choose=lambda target, bucket: backward.choose(target.id, bucket, num_features, head_dim, target.lanes),
        wrap=Instance.of,
    )


def get_toeplitz(n: int, head_dim: int) -> ToeplitzInstance:
    """The compiled Toeplitz product for n positions, the larger of inputs and outputs; as `get_operator`."""
    return _get(
        _Kind(
            name=f"toeplitz-d{head_dim}",
            options=f"--op toeplitz --head-dim {head_dim}",
            load=lambda path, length: load_toeplitz(path),
            choose=lambda target, bucket: toeplitz.choose(target.id, bucket, head_dim, target.lanes),
            wrap=ToeplitzInstance.of,
        ),
        bucket_length(n),
    )


def get_gpu_operator(gpu_index: int, n: int, num_features: int, head_dim: int, dtype: str = "float32") -> GpuInstance:
    """The compiled attention for n positions on a GPU; as `get_operator`.

    Parameters
    ----------
    gpu_index : int
        The GPU, as torch counts them.
    n, num_features, head_dim : int
        As of `get_operator`.
    dtype : str
        Of query, key, value and the output.
    """
    bucket = gpu_choice.bucket(n, dtype)
    call = gpu_index, bucket, num_features, head_dim, dtype
    found: GpuInstance | None = _gpu_calls.get(call)
    if found is None:
        found = _gpu_calls[call] = _find_gpu_operator(*call)
    return found


def _find_gpu_operator(gpu_index: int, bucket: int, num_features: int, head_dim: int, dtype: str) -> GpuInstance:
    arch = hip.architecture(gpu_index) if hip.is_hip() else gpus()[gpu_index].arch

    def load_here(path: Path, length: int) -> GpuInstance:
        return load_hip(path, arch, hip.stream) if hip.is_hip() else load_gpu(path, gpu_index)

    return _get(
        _Kind(
            name=f"attention-m{num_features}-d{head_dim}-{dtype}",
            options=f"--op attention --features {num_features} --head-dim {head_dim} --target {arch} --dtype {dtype}",
            load=load_here,
            choose=lambda target, bucket: gpu_choice.choose(bucket, num_features, head_dim, dtype, target.id),
            wrap=None,
            target=arch,
        ),
        bucket,
    )


def get_gpu_backward(gpu_index: int, n: int, num_features: int, head_dim: int, dtype: str = "float32") -> GpuInstance:
    """The compiled gradients for n positions on a GPU; as `get_gpu_operator`."""
    bucket = gpu_backward_choice.bucket(n, dtype)
    call = gpu_index, bucket, num_features, head_dim, dtype
    found: GpuInstance | None = _gpu_backward_calls.get(call)
    if found is None:
        found = _gpu_backward_calls[call] = _find_gpu_backward(*call)
    return found


def _find_gpu_backward(gpu_index: int, bucket: int, num_features: int, head_dim: int, dtype: str) -> GpuInstance:
    return _get(
        _Kind(
            name=f"backward-m{num_features}-d{head_dim}-{dtype}",
            options=f"--op backward --features {num_features} --head-dim {head_dim} --target cuda --dtype {dtype}",
            load=lambda path, length: load_gpu_backward(path, gpu_index),
            choose=lambda target, bucket: gpu_backward_choice.choose(
                bucket, num_features, head_dim, dtype, target.shared_bytes
            ),
            wrap=None,
            target=gpus()[gpu_index].arch,
        ),
        bucket,
    )


def get_gpu_toeplitz(gpu_index: int, n: int, head_dim: int) -> GpuInstance:
    """The compiled Toeplitz product for n positions on a GPU; as `get_gpu_operator`."""
    call = gpu_index, gpu.gpu_bucket(n), head_dim
    found: GpuInstance | None = _gpu_toeplitz_calls.get(call)
    if found is None:
        found = _gpu_toeplitz_calls[call] = _find_gpu_toeplitz(*call)
    return found


def _find_gpu_toeplitz(gpu_index: int, bucket: int, head_dim: int) -> GpuInstance:
    return _get(
        _Kind(
            name=f"toeplitz-d{head_dim}-float32",
            options=f"--op toeplitz --head-dim {head_dim} --target cuda",
            load=lambda path, length: load_gpu_toeplitz(path, gpu_index),
            choose=lambda target, bucket: gpu_toeplitz.choose(bucket, head_dim, target.shared_bytes),
            wrap=None,
            target=gpus()[gpu_index].arch,
        ),
        bucket,
    )


def _get(kind: _Kind[T], bucket: int) -> T:
    key = (kind.name, kind.target, bucket)
    found: T | None = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                found = _from_artefacts(kind, bucket) or _compiled(kind, bucket)
                _loaded[key] = found
    return found


def describe(n: int, num_features: int, head_dim: int) -> str:
    """The algorithm that runs for n positions, such as ``fft 8.8x8.8``; compiles it if it has to."""
    return get_operator(n, num_features, head_dim).config.description


def _from_artefacts(kind: _Kind[T], bucket: int) -> T | None:
    directory = _artefact_directory()
    if directory is None:
        return None
    found = [
        (length, path) for name, length, path in _artefact_names(directory) if name == kind.name and length >= bucket
    ]
    if not found:
        return None
    length, path = min(found)
    return kind.load(path, length)


def _artefact_directory() -> Path | None:
    named = os.environ.get(ARTEFACTS_VARIABLE)
    return _artefacts or (Path(named) if named else None)


def _artefact_names(directory: Path) -> list[tuple[str, int, Path]]:
    """The artefacts in `directory` as (kind, length, path), read from the names of its subdirectories."""
    try:
        paths = [each for each in directory.iterdir() if each.is_dir()]
    except OSError as error:
        raise ArtefactError(
            f"Cannot read the directory of compiled operators {directory} (from use_artefacts or "
            f"{ARTEFACTS_VARIABLE}): {error.strerror}."
        ) from error
    named = [(_NAME.fullmatch(path.name), path) for path in paths]
    found = [(match[1] + (match[3] or ""), int(match[2]), path) for match, path in named if match is not None]
    if not found:
        raise ArtefactError(
            f"No compiled operator in {directory} (from use_artefacts or {ARTEFACTS_VARIABLE}): expected "
            "directories such as attention-m32-d64-n4096. Give the directory that was --out of "
            "python -m rpe_tvm compile."
        )
    return found


def _compiled(kind: _Kind[T], bucket: int) -> T:
    # Here and not at the top: compiling needs TVM, which takes seconds to import and need not be installed.
    try:
        from rpe_tvm import build, targets
    except (BuildError, ImportError) as error:
        directory = _artefact_directory()
        where = f"in {directory}" if directory else f"(no {ARTEFACTS_VARIABLE} is set)"
        raise ArtefactError(
            f"No compiled operator {kind.name} for {bucket} positions {where}, and none can be compiled here: "
            f"{error}\nOr compile it elsewhere: python -m rpe_tvm compile {kind.options} --lengths {bucket} --out DIR"
        ) from error
    from rpe_tvm.build import shortcut

    key = shortcut.key_of_call(kind.name if kind.target == "cpu" else f"{kind.name} {kind.target}", bucket)
    known = shortcut.look_up(key)
    if known is not None:
        with contextlib.suppress(ArtefactError):  # damaged: the cache builds it again
            return _from_cache(kind, known, bucket)
    target = targets.preset(kind.target)
    config = kind.choose(target, bucket)
    try:
        path = build.compile_operator(config, target)
    except CompilerNotFoundError as error:
        if kind.wrap is None:
            raise
        _warn_once(
            "no compiler",
            f"{error} Until then, kernels are compiled in memory, again in every process.",
        )
        return kind.wrap(config, build.in_memory(config, targets.detect()))
    shortcut.remember(key, path)
    return _from_cache(kind, path, bucket)


def _from_cache(kind: _Kind[T], path: Path, bucket: int) -> T:
    operator = kind.load(path, bucket)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    # on GPUs the config is tuned, not its schedule
    if manifest["schedule"]["source"] == "default" and kind.target == "cpu":
        _warn_once(
            "not tuned",
            f"No tuned record for {manifest['target']['id']} and {kind.name}: running on the default schedule, which "
            "is right and may be slower. To tune for this CPU: python scripts/tune_x86.py",
        )
    return operator


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
