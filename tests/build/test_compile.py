"""From a TVM module to a library on disk: the cache, the linker, what happens when something is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from rpe_tvm.build import cache, check_versions, link, manifest
from rpe_tvm.build import compile as build
from rpe_tvm.errors import BuildError, CompilerNotFoundError
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.runtime import Attention, Instance, load
from rpe_tvm.targets import TargetSpec

Run = Callable[..., subprocess.CompletedProcess[str]]

# y = factor * x, parallel over rows of symbolic number.
_SCALE = """
@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def scale(x_: T.handle, y_: T.handle):
        T.func_attr({"global_symbol": "scale", "tirx.noalias": True})
        n = T.int64()
        x = T.match_buffer(x_, (n, 64), "float32", align=4)
        y = T.match_buffer(y_, (n, 64), "float32", align=4)
        for i in T.parallel(n):
            for j in T.vectorized(64):
                with T.sblock("y"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    y[vi, vj] = x[vi, vj] * T.float32(FACTOR)
"""

# The same in another process; prints the artefact and whether it was compiled there.
_OTHER_PROCESS = f"""
import os, signal, sys, time
import tvm
from rpe_tvm import targets
from rpe_tvm.build import compile as build, link
compiled = []
inner = build._compile
build._compile = lambda *arguments: compiled.append(1) or inner(*arguments)
def test(prepare=lambda: None):
    module = tvm.script.from_source('''{_SCALE}'''.replace("FACTOR", sys.argv[1]))
    target = targets.preset("haswell")
    prepare()
    print(build.compile_module(module, "scale", {{"factor": sys.argv[1]}}, target, op="scale"), len(compiled))
"""


@pytest.fixture(scope="module")
def target() -> TargetSpec:
    from rpe_tvm import targets

    return targets.preset("haswell")


def _module(factor: float) -> Any:
    import tvm

    return tvm.script.from_source(_SCALE.replace("FACTOR", str(factor)))


def _compile(factor: float, target: TargetSpec) -> Path:
    return build.compile_module(_module(factor), "scale", {"factor": str(factor)}, target, op="scale")


def _check(artefact: Path, factor: float) -> None:
    scale = tvm_ffi.load_module(str(artefact / "lib.so"))["scale"]
    x = np.arange(5 * 64 + 1, dtype=np.float32)[1:].reshape(5, 64)  # not aligned for vector loads
    y = np.empty(5 * 64 + 3, np.float32)[3:].reshape(5, 64)
    scale(x, y)
    assert np.array_equal(y, factor * x)


def test_compiles_once_and_then_finds_it(cache_dir: Path, target: TargetSpec) -> None:
    first = _compile(2.0, target)
    assert first.is_relative_to(cache_dir / "artefacts" / "scale" / "x86_64-haswell")
    assert sorted(file.name for file in first.iterdir()) == ["lib.so", "manifest.json"]
    _check(first, 2.0)
    inode = (first / "lib.so").stat().st_ino
    assert _compile(2.0, target) == first
    assert (first / "lib.so").stat().st_ino == inode
    other = _compile(3.0, target)
    assert other != first
    _check(other, 3.0)
    assert len(list((cache_dir / "objects").iterdir())) == 1
    assert not any((cache_dir / "staging").iterdir())


def test_key_depends_on_target_config_and_versions(
    cache_dir: Path, target: TargetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpe_tvm import targets

    paths: list[Path] = []
    monkeypatch.setattr(cache, "entry", lambda relative, is_whole, build: paths.append(relative))
    _compile(2.0, target)
    _compile(2.0, targets.preset("skylake-avx512"))
    build.compile_module(_module(2.0), "scale", {"factor": "two"}, target, op="scale")
    monkeypatch.setattr(manifest, "versions", lambda: {"rpe_tvm": "9.9"})
    _compile(2.0, target)
    monkeypatch.setattr(link, "ADDON_FLAGS", ("-O0",))
    _compile(2.0, target)
    assert len({path.name for path in paths}) == 5


def test_manifest_says_what_it_is(cache_dir: Path, target: TargetSpec) -> None:
    from rpe_tvm.runtime.load import FORMAT, MANIFEST

    assert (manifest.FORMAT, manifest.FILE) == (FORMAT, MANIFEST)
    artefact = _compile(2.0, target)
    contents = manifest.read(artefact)
    assert contents["format"] == FORMAT
    assert (contents["op"], contents["config"]) == ("scale", {"factor": "2.0"})
    assert contents["target"]["id"] == "x86_64-haswell"
    assert {"avx2", "fma", "bmi2"} <= set(contents["target"]["cpu_features"])
    assert contents["versions"] == manifest.versions()
    assert contents["schedule"] == {"source": "default"}
    assert contents["functions"] == ["scale"]
    assert contents["library"] == {
        "file": "lib.so",
        "sha256": manifest.sha256(artefact / "lib.so"),
        "bytes": (artefact / "lib.so").stat().st_size,
    }


def _replace(file: Path, content: bytes) -> None:
    file.unlink()  # a library that is loaded is mapped: cut in place, it would end this process with SIGBUS
    file.write_bytes(content)


def _truncate(artefact: Path) -> None:
    library = artefact / "lib.so"
    _replace(library, library.read_bytes()[:1000])


def _alter_a_byte(artefact: Path) -> None:
    content = bytearray((artefact / "lib.so").read_bytes())
    content[len(content) // 2] ^= 1
    _replace(artefact / "lib.so", content)


def _alter_the_manifest(artefact: Path) -> None:
    text = (artefact / "manifest.json").read_text()
    (artefact / "manifest.json").write_text(text.replace("x86_64-haswell", "x86_64-znver4"))


def _truncate_the_manifest(artefact: Path) -> None:
    (artefact / "manifest.json").write_text((artefact / "manifest.json").read_text()[:40])


def _remove_the_library(artefact: Path) -> None:
    (artefact / "lib.so").unlink()


def _put_a_file_there(artefact: Path) -> None:
    shutil.rmtree(artefact)
    artefact.write_text("not a directory")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _alter_a_byte,
        _alter_the_manifest,
        _truncate_the_manifest,
        _remove_the_library,
        _put_a_file_there,
    ],
)
def test_a_damaged_entry_is_built_again(cache_dir: Path, target: TargetSpec, damage: Callable[[Path], None]) -> None:
    artefact = _compile(2.0, target)
    damage(artefact)
    for hooks in (cache_dir / "objects").glob("*/addon.o"):
        hooks.write_bytes(hooks.read_bytes()[:100])
    assert _compile(2.0, target) == artefact
    _check(artefact, 2.0)


def test_two_processes_build_one_library(cache_dir: Path, target: TargetSpec) -> None:
    code = _OTHER_PROCESS + (
        "def wait():\n"
        "    open(sys.argv[2], 'w').close()\n"
        "    while not os.path.exists(sys.argv[3]): time.sleep(0.001)\n"
        "test(wait)"
    )
    cache_dir.mkdir()
    flags = [str(cache_dir / name) for name in ("one", "two")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, "2.0", *order],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for order in (flags, flags[::-1])
    ]
    results = [process.communicate(timeout=100)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert results[0][0] == results[1][0]
    assert sorted(count for _, count in results) == ["0", "1"]
    assert _compile(2.0, target) == Path(results[0][0])  # and a third one finds it by the same key
    _check(Path(results[0][0]), 2.0)


def test_a_killed_build_leaves_no_entry(cache_dir: Path, target: TargetSpec, run_python: Run) -> None:
    code = _OTHER_PROCESS + (
        "def killed(code, library, machine, threads):\n"
        "    library.write_bytes(code.read_bytes()[:500])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "link.link = killed\n"
        "test()"
    )
    done = run_python(code, "2.0", check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((cache_dir / "staging").glob("*/lib.so"))) == 1
    assert cache.entries() == []
    _check(_compile(2.0, target), 2.0)
    assert not any((cache_dir / "staging").iterdir())


def test_without_a_compiler(
    cache_dir: Path, target: TargetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artefact = _compile(2.0, target)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilerNotFoundError, match=r"needs g\+\+, .* apt install g\+\+.*in_memory"):
        _compile(3.0, target)
    assert _compile(2.0, target) == artefact  # what is there needs none
    scale = build.load_module(_module(3.0), target)["scale"]
    x = np.ones((3, 64), np.float32)
    y = np.empty_like(x)
    scale(x, y)
    assert (y == 3).all()
    assert os.environ["TVM_BIND_THREADS"] == "0"


def test_in_memory_uses_all_cpus_and_pins_nothing(run_python: Run) -> None:
    code = _OTHER_PROCESS + (
        "import numpy as np, tvm_ffi\n"
        "before = os.sched_getaffinity(0)\n"
        "module = tvm.script.from_source('''" + _SCALE + "'''.replace('FACTOR', '2.0'))\n"
        "scale = build.load_module(module, targets.preset('haswell'))['scale']\n"
        "scale(np.ones((8, 64), 'float32'), np.empty((8, 64), 'float32'))\n"
        "print(tvm_ffi.get_global_func('runtime.NumThreads')() == len(before))\n"
        "print(os.sched_getaffinity(0) == before)"
    )
    unset = ["OMP_NUM_THREADS", "TVM_NUM_THREADS", "TVM_BIND_THREADS"]
    assert run_python(f"import os\nfor name in {unset}: os.environ.pop(name, None)\n{code}").stdout.split() == [
        "True",
        "True",
    ]


def test_the_variable_cxx_names_the_compiler(
    cache_dir: Path, target: TargetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script = tmp_path / "my c++"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nshift\nexec {shutil.which("g++")} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{script}' --first")
    _check(_compile(2.0, target), 2.0)
    calls = log.read_text().splitlines()
    assert len(calls) == 2 and all(call.startswith("--first ") for call in calls)
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    with pytest.raises(CompilerNotFoundError, match="CXX names 'no-such-compiler'"):
        _compile(3.0, target)


def test_a_failing_compiler_is_quoted(
    cache_dir: Path, target: TargetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'cannot find -lgomp' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match=r"status 3: .*broken.*\n.*cannot find -lgomp"):
        _compile(2.0, target)
    assert cache.entries() == []


def test_code_that_needs_more_of_tvm_is_refused(cache_dir: Path, tmp_path: Path) -> None:
    code = tmp_path / "code.o"
    code.write_bytes(b"\0__TVMBackendAllocWorkspace\0__TVMBackendGetFuncFromEnv\0")
    with pytest.raises(BuildError, match="calls __TVMBackendGetFuncFromEnv of libtvm_runtime"):
        link.link(code, tmp_path / "lib.so")


def test_what_tvm_cannot_compile(cache_dir: Path, target: TargetSpec) -> None:
    import tvm

    nested = _SCALE.replace("FACTOR", "2.0").replace("T.vectorized", "T.parallel")
    with pytest.raises(BuildError, match="TVM could not compile scale for .*haswell"):
        build.compile_module(tvm.script.from_source(nested), "scale", {}, target)
    assert cache.entries() == []


def test_a_cache_that_cannot_be_written(target: TargetSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RPE_TVM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="Could not use the cache at .*Set RPE_TVM_CACHE"):
        _compile(2.0, target)


@pytest.mark.parametrize(
    ("tvm_version", "ffi_version", "fine"),
    [
        ("0.27.0.post1", "0.1.14.post1", True),
        ("0.27.0", "0.1.14.post0", True),
        ("0.27.0.post1", "0.1.15.post2", False),
        ("0.26.0", "0.1.14.post1", False),
        (None, None, False),
    ],
)
def test_versions_that_crash_are_refused(
    monkeypatch: pytest.MonkeyPatch, tvm_version: str | None, ffi_version: str | None, fine: bool
) -> None:
    def version(package: str) -> str:
        found = {"apache-tvm": tvm_version, "apache-tvm-ffi": ffi_version}[package]
        if found is None:
            raise manifest.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(manifest.metadata, "version", version)
    if fine:
        check_versions()
        return
    with pytest.raises(BuildError, match='pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"'):
        check_versions()


def test_export_and_in_memory_of_the_operator(
    cache_dir: Path,
    target: TargetSpec,
    naive: tuple[AttentionConfig, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config, module = naive
    lowered = SimpleNamespace(mod=module, schedule={"source": "tuned", "trials": 7})
    monkeypatch.setattr(build, "_lower", lambda config, target: lowered)
    path = build.export(config, target, tmp_path / "out")
    assert path == tmp_path / "out" / "attention-m3-d8-n64" / "x86_64-haswell"
    assert sorted(file.name for file in path.iterdir()) == ["lib.so", "manifest.json"]
    assert manifest.read(path)["schedule"] == {"source": "tuned", "trials": 7}
    assert build.export(config, target, tmp_path / "out") == path  # over what is there
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 2, 20, 8), np.float32)
    arguments = (query, query, query, np.zeros((2, 39), np.float32), np.ones((3, 8), np.float32))
    exported = load(tmp_path / "out")(*arguments)
    in_memory = Attention([Instance.of(config, build.in_memory(config, target))])(*arguments)
    assert np.isfinite(exported).all()
    np.testing.assert_allclose(exported, in_memory, rtol=1e-5)
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="Could not write the compiled library"):
        build.export(config, target, tmp_path / "file")
