"""The package that pip builds is complete, and the files that name versions agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rpe_tvm

ROOT = Path(__file__).resolve().parents[1]


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([\w.-]+)==([^;\s]+)", line) for line in lines]
    return {match[1].lower(): match[2] for match in found if match}


def test_a_wheel_holds_everything(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "a copy"  # pip builds in the source directory
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("rpe_tvm", "schedules", "tuning_logs", "deploy"):
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
        + [str(tmp_path), str(source)],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("rpe_tvm-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(source).as_posix()
        for folder, pattern in (
            ("rpe_tvm", "**/*.py"),
            ("schedules", "*.py"),
            ("tuning_logs", "**/*.json"),
            ("deploy", "**/*"),
        )
        for path in (source / folder).glob(pattern)
        if path.is_file()
    }
    wanted = {path if path.startswith("rpe_tvm/") else f"rpe_tvm/{path}" for path in wanted}
    wanted |= {"rpe_tvm/py.typed", "rpe_tvm/build/addon.cc", "rpe_tvm/tune/board.cc"}
    assert wanted <= packed
    assert "rpe_tvm/schedules/cpu.py" in packed
    assert not [path for path in packed if path.startswith(("tests/", "scripts/", "schedules/"))]


def test_versions_agree():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == rpe_tvm.__version__
    exact = pins("requirements.txt") | pins("requirements-test.txt")
    extras = sum(project["optional-dependencies"].values(), [])
    for requirement in [*project["dependencies"], *extras]:
        name, _, version = requirement.partition("==")
        name = re.split(r"[<>=]", name)[0].lower()
        assert name in exact, f"{name} has no pin in the requirements files"
        assert version in ("", exact[name])


def test_schedules_are_part_of_the_package():
    import rpe_tvm.schedules

    assert Path(rpe_tvm.schedules.__file__).resolve().parent == ROOT / "schedules"
