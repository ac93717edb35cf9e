"""The cache on disk, apart from compiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rpe_tvm.build import cache, shortcut
from rpe_tvm.errors import BuildError
from rpe_tvm.plan import wisdom

KEY = "0" * 40


def _write(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "content").write_text(text) and None


def _is_whole(directory: Path) -> bool:
    return (directory / "content").read_text() != ""


def _entry(name: str = "attention", key: str = KEY) -> Path:
    return cache.entry(Path("artefacts") / name / "x86_64-haswell" / key, _is_whole, _write("whole"))


def test_where_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RPE_TVM_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.root() == tmp_path / ".cache" / "rpe_tvm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "rpe_tvm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the standard
    assert cache.root() == tmp_path / ".cache" / "rpe_tvm"
    monkeypatch.setenv("RPE_TVM_CACHE", "~/mine")
    assert cache.root() == tmp_path / "mine"


def test_a_failing_build_leaves_nothing(cache_dir: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "content").write_text("half")
        raise BuildError("did not work")

    for _ in range(2):
        with pytest.raises(BuildError, match="did not work"):
            cache.entry(Path("artefacts/a/b") / KEY, _is_whole, fail)
    assert cache.entries() == []
    assert not any((cache_dir / "staging").iterdir())


def test_list_and_clear(cache_dir: Path) -> None:
    assert cache.entries() == []
    assert cache.clear() == 0
    first, second = _entry(), _entry("other", "1" * 40)
    foreign = cache_dir / "artefacts" / "mine" / "and" / "precious"
    foreign.mkdir(parents=True)
    (foreign / "file").write_text("")
    found = cache.entries()
    assert [(entry.name, entry.target, entry.bytes) for entry in found] == [
        ("attention", "x86_64-haswell", 5),
        ("other", "x86_64-haswell", 5),
    ]
    assert cache.clear() == 2
    assert cache.entries() == []
    assert (foreign / "file").exists() and not first.parent.exists() and not second.exists()
    assert _entry() == first


def test_clear_leaves_what_is_being_built(cache_dir: Path) -> None:
    def build(directory: Path) -> None:
        (directory / "content").write_text("whole")
        assert cache.clear() == 1  # the other one
        assert (directory / "content").exists()

    _entry("other", "1" * 40)
    path = cache.entry(Path("artefacts/attention/x86_64-haswell") / KEY, _is_whole, build)
    assert (path / "content").read_text() == "whole"


def test_a_lock_that_stays_held(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.05)
    with cache._lock(cache_dir, KEY, 1), pytest.raises(BuildError, match="Another process has held"):
        _entry()


def test_shortcuts_lead_to_an_artefact_that_stands(cache_dir: Path) -> None:
    key = shortcut.key_of_call("attention-m32-d64", 1024)
    assert key == shortcut.key_of_call("attention-m32-d64", 1024) != shortcut.key_of_call("attention-m16-d64", 1024)
    assert shortcut.look_up(key) is None
    artefact = cache_dir / "artefacts" / "name" / "target" / ("0" * 40)
    shortcut.remember(key, artefact)
    assert shortcut.look_up(key) is None  # nothing stands there
    artefact.mkdir(parents=True)
    (artefact / "manifest.json").touch()
    assert shortcut.look_up(key) == artefact
    (cache_dir / "shortcuts" / f"{key}.json").write_text("{")
    assert shortcut.look_up(key) is None
    shortcut.remember(key, artefact)
    cache.clear()
    assert shortcut.look_up(key) is None and not list((cache_dir / "shortcuts").iterdir())


def test_a_shortcut_is_of_these_sources_and_logs(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wisdom, "LOGS", tmp_path)
    before = shortcut.key_of_call("attention-m8-d8", 64)
    (tmp_path / "wisdom.json").write_text("{}")
    assert shortcut.key_of_call("attention-m8-d8", 64) != before
    monkeypatch.setattr(shortcut, "_PACKAGE", tmp_path)
    assert shortcut.key_of_call("attention-m8-d8", 64) != before


def test_a_cache_that_cannot_be_written_to_remembers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    shortcut.remember("key", tmp_path / "artefact")
    assert shortcut.look_up("key") is None
