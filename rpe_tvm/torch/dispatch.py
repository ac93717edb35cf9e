"""Which compiled operator serves a call: from a directory of artefacts, else the cache, else compiled now."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import warnings
from pathlib import Path

from rpe_tvm.errors import ArtefactError, BuildError, CompilerNotFoundError
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.runtime import Instance, load

ARTEFACTS_VARIABLE = "RPE_TVM_ARTEFACTS"

# AttentionConfig.name
_NAME = re.compile(r"attention-m(\d+)-d(\d+)-n(\d+)")

_lock = threading.Lock()
_loaded: dict[tuple[int, int, int], Instance] = {}  # (bucket, m, d) -> operator
_warned: set[str] = set()
_artefacts: Path | None = None


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
        _loaded.clear()


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
    bucket = bucket_length(n)
    key = (bucket, num_features, head_dim)
    found = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                found = _from_artefacts(*key) or _compiled(*key)
                _loaded[key] = found
    return found


_backwards = {}


def get_backward(n: int, num_features: int, head_dim: int) -> Instance:
    """The compiled gradients for n positions; compiles them if it has to."""
    import tvm_ffi

    from rpe_tvm import targets
    from rpe_tvm.build import compile as build
    from rpe_tvm.build import lower_backward
    from rpe_tvm.plan import wisdom

    target = targets.detect()
    bucket = bucket_length(n)
    key = (bucket, num_features, head_dim)
    if key not in _backwards:
        config = wisdom.fft_config(num_features, head_dim, bucket, wisdom.fft_lanes(target.id, target.lanes))
        lowered = lower_backward.lower(config)
        path = build.compile_module(
            lowered.mod, f"backward-{config.name}", config.to_json(), target, op="attention_backward"
        )
        module = tvm_ffi.load_module(str(path / "lib.so"))
        names = ("features_prf", "features_nprf", "weights", "backward", "denominator_backward")
        _backwards[key] = Instance.of(config, {name: module[name] for name in names})
    return _backwards[key]


def describe(n: int, num_features: int, head_dim: int) -> str:
    """The algorithm that runs for n positions, such as ``fft 8.8x8.8``; compiles it if it has to."""
    return get_operator(n, num_features, head_dim).config.description


def _from_artefacts(bucket: int, num_features: int, head_dim: int) -> Instance | None:
    directory = _artefact_directory()
    if directory is None:
        return None
    fitting = [
        (length, name)
        for (m, d, length), name in _artefact_names(directory).items()
        if (m, d) == (num_features, head_dim) and length >= bucket
    ]
    if not fitting:
        return None
    length, name = min(fitting)
    return load(directory / name).instance(length)


def _artefact_directory() -> Path | None:
    named = os.environ.get(ARTEFACTS_VARIABLE)
    return _artefacts or (Path(named) if named else None)


def _artefact_names(directory: Path) -> dict[tuple[int, int, int], str]:
    """The artefacts in `directory`, (m, d, length) -> name of the subdirectory."""
    try:
        names = [each.name for each in directory.iterdir() if each.is_dir()]
    except OSError as error:
        raise ArtefactError(
            f"Cannot read the directory of compiled operators {directory} (from use_artefacts or "
            f"{ARTEFACTS_VARIABLE}): {error.strerror}."
        ) from error
    matches = {name: _NAME.fullmatch(name) for name in names}
    found = {(int(m[1]), int(m[2]), int(m[3])): name for name, m in matches.items() if m is not None}
    if not found:
        raise ArtefactError(
            f"No compiled operator in {directory} (from use_artefacts or {ARTEFACTS_VARIABLE}): expected "
            "directories such as attention-m32-d64-n4096. Give the directory that was --out of "
            "python -m rpe_tvm compile."
        )
    return found


def _compiled(bucket: int, num_features: int, head_dim: int) -> Instance:
    # Here and not at the top: compiling needs TVM, which takes seconds to import and need not be installed.
    try:
        from rpe_tvm import build, targets
    except (BuildError, ImportError) as error:
        directory = _artefact_directory()
        where = f"in {directory}" if directory else f"(no {ARTEFACTS_VARIABLE} is set)"
        raise ArtefactError(
            f"No compiled operator for {bucket} positions, num_features={num_features}, head_dim={head_dim} "
            f"{where}, and none can be compiled here: {error}\nOr compile it elsewhere: "
            f"python -m rpe_tvm compile --op attention --features {num_features} --head-dim {head_dim} "
            f"--lengths {bucket} --out DIR"
        ) from error
    from rpe_tvm.build import shortcut
    from rpe_tvm.plan import wisdom

    key = shortcut.key_of_call(bucket, num_features, head_dim)
    known = shortcut.look_up(key)
    if known is not None:
        with contextlib.suppress(ArtefactError):  # damaged: the cache builds it again
            return _from_cache(known, bucket, num_features, head_dim)
    target = targets.detect()
    config = wisdom.choose(target.id, bucket, num_features, head_dim, target.lanes)
    try:
        path = build.compile_attention(config, target)
    except CompilerNotFoundError as error:
        _warn_once(
            "no compiler",
            f"{error} Until then, kernels are compiled in memory, again in every process.",
        )
        return Instance.of(config, build.in_memory(config, target))
    shortcut.remember(key, path)
    return _from_cache(path, bucket, num_features, head_dim)


def _from_cache(path: Path, bucket: int, num_features: int, head_dim: int) -> Instance:
    instance = load(path).instance(bucket)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if manifest["schedule"]["source"] == "default":
        _warn_once(
            "not tuned",
            f"No tuned record for {manifest['target']['id']} with num_features={num_features} and "
            f"head_dim={head_dim}: running on the default schedule, which is right and may be slower. To tune for "
            "this CPU: python scripts/tune_x86.py",
        )
    return instance


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
