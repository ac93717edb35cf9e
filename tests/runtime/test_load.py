"""Loading: what is refused, and why."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from rpe_tvm.errors import ArtefactError
from rpe_tvm.runtime import load
from rpe_tvm.runtime.operator import FUNCTIONS

NAME, TARGET = "attention-m3-d8-n64", "x86_64-haswell"


@pytest.fixture
def directory(artefacts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artefacts, tmp_path / "artefacts"))


def _edit(artefact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    change(manifest)
    (artefact / "manifest.json").write_text(json.dumps(manifest))


def _refusal(path: Path) -> ArtefactError:
    with pytest.raises(ArtefactError) as caught:
        load(path)
    for reason in caught.value.reasons:
        assert reason in str(caught.value)
    return caught.value


def test_loads_every_depth(directory: Path) -> None:
    assert load(directory).lengths == (64, 96)
    assert load(str(directory / NAME)).lengths == (64,)
    assert load(directory / NAME / TARGET).lengths == (64,)


def test_a_relative_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory / NAME / TARGET)
    assert load(".").lengths == (64,)


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    error = _refusal(tmp_path / name)
    assert "No compiled operator under" in str(error) and "python -m rpe_tvm compile" in str(error)


def _replace(file: Path, content: bytes) -> None:
    file.unlink()  # a library that is loaded is mapped: cut in place, it would end this process with SIGBUS
    file.write_bytes(content)


def _truncate_library(artefact: Path) -> None:
    library = artefact / "lib.so"
    _replace(library, library.read_bytes()[:5000])


def _alter_library(artefact: Path) -> None:
    content = bytearray((artefact / "lib.so").read_bytes())
    content[-1] ^= 255
    _replace(artefact / "lib.so", content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate_library, "lib.so was altered or truncated: expected SHA-256"),
        (_alter_library, "lib.so was altered or truncated"),
        (lambda a: (a / "lib.so").unlink(), "cannot read lib.so"),
        (lambda a: (a / "manifest.json").write_text('{"format"'), "cannot read manifest.json"),
        (lambda a: (a / "manifest.json").write_bytes(b"\xff\xfe"), "cannot read manifest.json"),
        (lambda a: (a / "manifest.json").write_text("[]"), "manifest.json is no manifest of rpe_tvm"),
        (lambda a: _edit(a, lambda m: m.pop("library")), "manifest.json is incomplete: KeyError('library')"),
        (lambda a: _edit(a, lambda m: m.update(versions=[])), "manifest.json is incomplete"),
        (lambda a: _edit(a, lambda m: m["functions"].remove("weights")), "no function weights"),
        (lambda a: _edit(a, lambda m: m["config"].update(length=-1)), "has no usable config"),
        (lambda a: _edit(a, lambda m: m["config"].update(unknown=1)), "has no usable config"),
        (lambda a: _edit(a, lambda m: m["library"].update(file="../../x.so")), "cannot read x.so"),
        (lambda a: _edit(a, lambda m: m.update(format=2)), "format 2, this rpe_tvm 0.1.0 reads format 1"),
        (lambda a: _edit(a, lambda m: m.update(op="convolution")), "operator 'convolution'"),
        (
            lambda a: _edit(a, lambda m: m["versions"].update({"apache-tvm-ffi": "0.2.0"})),
            "built with apache-tvm-ffi 0.2.0, installed is 0.1.",
        ),
        (
            lambda a: _edit(a, lambda m: m["versions"].update(rpe_tvm="0.9.1")),
            "built with rpe_tvm 0.9.1, installed is 0.1.0",
        ),
        (
            lambda a: _edit(a, lambda m: m["target"].update(id="x86_64-future", cpu_features=["avx9", "avx"])),
            "compiled for x86_64-future, and this CPU lacks avx9",
        ),
        (
            lambda a: _edit(a, lambda m: m["target"].update(id="aarch64-cortex-a72", machine="aarch64")),
            "compiled for aarch64-cortex-a72, an aarch64 CPU, and this machine is x86_64",
        ),
    ],
)
def test_refused(directory: Path, damage: Callable[[Path], Any], reason: str) -> None:
    artefact = directory / NAME / TARGET
    damage(artefact)
    error = _refusal(directory)
    assert len(error.reasons) == 1
    assert error.reasons[0].startswith(f"{artefact}: ") and reason in error.reasons[0]
    assert _refusal(artefact).reasons == error.reasons


def test_one_reason_for_each_candidate(directory: Path) -> None:
    shutil.copytree(directory / NAME / TARGET, directory / NAME / "x86_64-znver9")
    for target in (TARGET, "x86_64-znver9"):
        _edit(directory / NAME / target, lambda m: m["target"].update(cpu_features=["avx9"]))
    assert len(_refusal(directory).reasons) == 2


def test_another_cpu_beside_this_one_is_passed_over(directory: Path) -> None:
    other = directory / NAME / "x86_64-znver9"
    shutil.copytree(directory / NAME / TARGET, other)
    _edit(other, lambda m: m["target"].update(cpu_features=["avx9"]))
    assert load(directory).lengths == (64, 96)
    _truncate_library(directory / NAME / TARGET)  # damage is never passed over
    assert len(_refusal(directory).reasons) == 2


def test_the_target_that_uses_most_of_the_cpu(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = directory / NAME / "x86_64-plain"
    shutil.copytree(directory / NAME / TARGET, plain)
    _edit(plain, lambda m: m["target"].update(cpu_features=["avx"]))
    opened: list[str] = []
    inner = tvm_ffi.load_module
    monkeypatch.setattr(tvm_ffi, "load_module", lambda path: opened.append(path) or inner(path))
    load(directory / NAME)
    assert opened == [str((directory / NAME / TARGET / "lib.so").resolve())]


def test_several_kinds(directory: Path) -> None:
    _edit(directory / "attention-m3-d8-n96" / TARGET, lambda m: m["config"].update(head_dim=16))
    assert "expected one num_features m and head_dim d, got m=3 d=8, m=3 d=16" in str(_refusal(directory))


def test_cpu_that_cannot_be_checked(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["rpe_tvm.runtime.load"], "cpu_flags", frozenset)
    assert "flags in /proc/cpuinfo, which cannot be read" in _refusal(directory).reasons[0]


def test_a_library_that_does_not_open(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Any:
        raise RuntimeError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(tvm_ffi, "load_module", fail)
    assert "apt install libgomp1" in _refusal(directory).reasons[0]
    monkeypatch.setattr(tvm_ffi, "load_module", lambda path: {"weights": None})
    assert "Could not open the compiled operator" in str(_refusal(directory))


def test_replacing_a_loaded_library_is_harmless(directory: Path) -> None:
    from rpe_tvm.build.compile import copy_artefact

    operator = load(directory / NAME)
    x = np.ones((1, 1, 5, 8), np.float32)
    arguments = (x, x, x, np.zeros((1, 9), np.float32), np.ones((3, 8), np.float32))
    before = operator(*arguments)
    copy_artefact(directory / "attention-m3-d8-n96" / TARGET, directory / NAME / TARGET)
    assert np.array_equal(operator(*arguments), before)
    assert load(directory / NAME).lengths == (96,)


def test_function_names() -> None:
    assert set(FUNCTIONS) == {"features_prf", "features_nprf", "weights", "attention"}
