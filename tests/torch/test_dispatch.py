"""Which operator serves a call. Compiling and loading are replaced; what matters here is when they happen."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from pathlib import Path

import pytest

from rpe_tvm import build, targets
from rpe_tvm.errors import ArtefactError, BuildError, CompilerNotFoundError
from rpe_tvm.plan import wisdom
from rpe_tvm.plan.buckets import bucket_length
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.runtime import Attention, Instance
from rpe_tvm.torch import describe, dispatch, get_operator, use_artefacts

TARGET = targets.TargetSpec("x86_64-test", "llvm", "test", 16, ())


class Machine:
    """Remembers what was compiled and loaded."""

    def __init__(self, tmp_path: Path) -> None:
        self.cache = tmp_path / "cache"
        self.planned: list[tuple[str, int, int, int]] = []
        self.compiled: list[AttentionConfig] = []
        self.in_memory: list[AttentionConfig] = []
        self.loaded: list[Path] = []
        self.source = "tuned"
        self.error: Exception | None = None

    def choose(self, target_id, n, m, d, lanes):
        self.planned.append((target_id, n, m, d))
        return AttentionConfig(m, d, n, "direct", tile=(32, 64), lanes=lanes)

    def compile_operator(self, config, target, **_):
        self.compiled.append(config)
        if self.error is not None:
            raise self.error
        path = self.cache / config.name
        write_artefact(path, config, self.source)
        return path

    def compile_in_memory(self, config, target):
        self.in_memory.append(config)
        return {}

    def load(self, path):
        self.loaded.append(path)
        manifests = sorted(Path(path).rglob("manifest.json"))
        configs = [AttentionConfig.from_json(json.loads(each.read_text())["config"]) for each in manifests]
        return Attention([Instance.of(config, {}) for config in configs])


def write_artefact(path, config, source="tuned"):
    path.mkdir(parents=True, exist_ok=True)
    manifest = {"config": config.to_json(), "schedule": {"source": source}, "target": {"id": TARGET.id}}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    made = Machine(tmp_path)
    monkeypatch.setattr(build, "compile_operator", made.compile_operator)
    monkeypatch.setattr(build, "in_memory", made.compile_in_memory)
    monkeypatch.setattr(targets, "detect", lambda: TARGET)
    monkeypatch.setattr(wisdom, "choose", made.choose)
    monkeypatch.setattr(dispatch, "load", made.load)
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_artefacts", None)
    monkeypatch.delenv("RPE_TVM_ARTEFACTS", raising=False)
    monkeypatch.setenv("RPE_TVM_CACHE", str(made.cache))
    return made


@pytest.fixture
def shipped(tmp_path):
    """A directory as `python -m rpe_tvm compile` writes it."""
    top = tmp_path / "shipped"
    for m, length in ((32, 256), (32, 1024), (16, 512)):
        config = AttentionConfig(m, 64, length, "direct", tile=(16, 16))
        write_artefact(top / config.name / "x86_64-test", config)
    (top / "notes").mkdir()
    return top


def test_one_operator_per_bucket_is_compiled_and_kept(machine):
    first = get_operator(1000, 32, 64)
    assert first.config.length == bucket_length(1000) == 1024
    assert get_operator(1024, 32, 64) is first and get_operator(900, 32, 64) is first
    assert get_operator(1025, 32, 64) is not first
    assert get_operator(1000, 16, 64) is not first
    assert machine.planned == [
        (TARGET.id, 1024, 32, 64),
        (TARGET.id, 1152, 32, 64),
        (TARGET.id, 1024, 16, 64),
    ]
    assert len(machine.compiled) == 3


def test_threads_that_miss_at_once_compile_once(machine):
    gate = threading.Barrier(8)

    def call():
        gate.wait()
        get_operator(100, 32, 64)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.compiled) == 1


def test_a_new_process_takes_the_shortcut(machine, monkeypatch):
    get_operator(1000, 32, 64)
    monkeypatch.setattr(dispatch, "_loaded", {})  # as in a new process
    assert get_operator(900, 32, 64).config.length == 1024
    assert len(machine.planned) == len(machine.compiled) == 1


def test_a_damaged_artefact_of_the_cache_is_compiled_again(machine, monkeypatch):
    get_operator(1000, 32, 64)
    monkeypatch.setattr(dispatch, "_loaded", {})
    refusals = [ArtefactError("damaged")]

    def load(path):
        if refusals:
            raise refusals.pop()
        return machine.load(path)

    monkeypatch.setattr(dispatch, "load", load)
    assert get_operator(1000, 32, 64).config.length == 1024
    assert len(machine.compiled) == 2


def test_a_failed_compilation_is_not_kept(machine):
    machine.error = BuildError("no luck")
    with pytest.raises(BuildError, match="no luck"):
        get_operator(100, 32, 64)
    machine.error = None
    assert get_operator(100, 32, 64).config.length == 128


def test_describe(machine):
    assert describe(100, 32, 64) == "direct 32x64"


def test_no_record_gives_one_warning_that_names_the_command(machine):
    machine.source = "default"
    with pytest.warns(RuntimeWarning, match=r"x86_64-test.*python scripts/tune_x86\.py"):
        get_operator(100, 32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_operator(1000, 32, 64)


def test_a_tuned_operator_gives_no_warning(machine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_operator(100, 32, 64)


def test_without_a_compiler_kernels_are_compiled_in_memory(machine):
    machine.error = CompilerNotFoundError("No C++ compiler: install one.")
    with pytest.warns(RuntimeWarning, match=r"No C\+\+ compiler: install one.*compiled in memory"):
        assert get_operator(100, 32, 64).config.length == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_operator(1000, 32, 64)
    assert [config.length for config in machine.in_memory] == [128, 1024]
    assert machine.loaded == []


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_directory_of_artefacts_is_used_first(machine, shipped, monkeypatch, how):
    if how == "argument":
        use_artefacts(shipped)
    else:
        monkeypatch.setenv("RPE_TVM_ARTEFACTS", str(shipped))
    assert get_operator(250, 32, 64).config.length == 256
    assert get_operator(300, 32, 64).config.length == 1024
    assert get_operator(10, 16, 64).config.length == 512
    assert machine.compiled == [] and machine.planned == []
    assert describe(300, 32, 64) == "direct 16x16"


def test_what_the_directory_lacks_is_compiled(machine, shipped):
    use_artefacts(shipped)
    assert get_operator(1025, 32, 64).config.length == 1152
    assert get_operator(10, 32, 40).config.length == 64
    assert len(machine.compiled) == 2


def test_another_directory_takes_effect_at_once(machine, shipped):
    assert describe(250, 32, 64) == "direct 32x64"
    use_artefacts(shipped)
    assert describe(250, 32, 64) == "direct 16x16"
    use_artefacts(None)
    assert describe(250, 32, 64) == "direct 32x64"


def test_a_directory_without_artefacts_is_refused(machine, shipped, tmp_path, monkeypatch):
    with pytest.raises(ArtefactError, match="No such file or directory"):
        use_artefacts(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"expected directories such as attention-m32-d64-n4096.*--out"):
        use_artefacts(shipped / "notes")
    monkeypatch.setenv("RPE_TVM_ARTEFACTS", str(tmp_path / "nowhere"))
    with pytest.raises(ArtefactError, match="RPE_TVM_ARTEFACTS"):
        get_operator(10, 32, 64)


def test_an_artefact_that_cannot_run_here_is_an_error(machine, shipped, monkeypatch):
    def refuse(path):
        raise ArtefactError("Refused", ["compiled for another CPU"])

    monkeypatch.setattr(dispatch, "load", refuse)
    use_artefacts(shipped)
    with pytest.raises(ArtefactError, match="compiled for another CPU"):
        get_operator(250, 32, 64)
    assert machine.compiled == []


@pytest.mark.parametrize("with_directory", [False, True])
def test_without_tvm_the_error_says_what_to_do(machine, shipped, monkeypatch, with_directory):
    if with_directory:
        use_artefacts(shipped)
        assert get_operator(250, 32, 64).config.length == 256
    monkeypatch.delattr("rpe_tvm.build")
    monkeypatch.setitem(sys.modules, "rpe_tvm.build", None)
    where = str(shipped) if with_directory else "no RPE_TVM_ARTEFACTS is set"
    with pytest.raises(ArtefactError, match=r"--head-dim 64 --lengths 2048 --out DIR") as caught:
        get_operator(2000, 32, 64)
    assert where in str(caught.value)
