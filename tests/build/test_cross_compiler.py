"""Which C++ compiler links for which machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpe_tvm.build import link
from rpe_tvm.errors import CompilerNotFoundError


def _compiler(directory: Path, name: str, machine: str) -> str:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho {machine}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def _only_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_a_missing_cross_compiler_names_its_package() -> None:
    with pytest.raises(CompilerNotFoundError, match="aarch64-linux-gnu-g.. on PATH.*apt install g..-aarch64-linux"):
        link.find_compiler("aarch64")
    with pytest.raises(CompilerNotFoundError, match="apt install g..-arm-linux-gnueabihf"):
        link.find_compiler("armv7")


def test_cross_compilers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = _compiler(tmp_path, "g++", "x86_64-linux-gnu")
    cross = _compiler(tmp_path, "aarch64-linux-gnu-g++", "aarch64-linux-gnu")
    assert link.find_compiler() == link.find_compiler("x86_64") == [native]
    assert link.find_compiler("aarch64") == [cross]
    monkeypatch.setenv("CXX", native)  # of this machine: no use for the other one
    assert link.find_compiler("aarch64") == [cross]
    other = _compiler(tmp_path, "my-g++", "aarch64-unknown-linux-gnu")
    monkeypatch.setenv("CXX", f"{other} --flag")
    assert link.find_compiler("aarch64") == [other, "--flag"]


def test_an_arm_machine_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    native = _compiler(tmp_path, "g++", "aarch64-linux-gnu")
    assert link.find_compiler("aarch64") == [native]
