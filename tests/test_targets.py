"""Targets and the detection of this machine's CPU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpe_tvm import llvm, targets
from rpe_tvm.errors import BuildError, GpuNotFoundError
from rpe_tvm.runtime import cpu, gpu, hwcap


@pytest.fixture(autouse=True)
def _fresh_detection() -> Iterator[None]:
    targets.detect.cache_clear()
    yield
    targets.detect.cache_clear()


def test_presets() -> None:
    haswell = targets.preset("haswell")
    assert (haswell.id, haswell.kind, haswell.mcpu) == ("x86_64-haswell", "llvm", "haswell")
    assert haswell.lanes == 8
    assert {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"} <= set(haswell.features)
    assert not [flag for flag in haswell.features if flag.startswith("avx512")]
    skylake = targets.preset("skylake-avx512")
    assert skylake.lanes == 16
    assert {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(skylake.features)
    assert {"avx512_bf16", "avx512_vnni"} <= set(targets.preset("znver4").features)


@pytest.mark.parametrize("name", ["haswel", "", "x86_64", "cortex-a77"])
def test_unknown_preset(name: str) -> None:
    with pytest.raises(BuildError, match=f"Unknown target {name!r}: expected 'x86'.*haswell"):
        targets.preset(name)


@pytest.mark.parametrize("name", ["x86-64", "nehalem", "ivybridge"])
def test_cpu_without_avx2(name: str) -> None:
    with pytest.raises(BuildError, match=f"Unsupported CPU {name}: .*AVX2"):
        targets.preset(name)


def test_detection_promises_nothing_that_is_missing() -> None:
    spec = targets.detect()
    assert targets.preset("x86") == spec
    assert set(spec.features) <= cpu.cpu_flags()
    assert spec.lanes in (8, 16)


def test_a_flag_that_is_hidden_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "znver4", targets.preset("znver4").features, hidden={"avx512_bf16", "gfni"})
    spec = targets.detect()
    assert spec.id == "x86_64-znver4" and spec.lanes == 16
    assert not {"avx512_bf16", "gfni"} & set(spec.features)
    assert list(targets.to_tvm(spec).attrs["mattr"]) == ["-avx512bf16", "-gfni"]


def test_hidden_avx512_falls_back_to_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = targets.preset("znver4").features
    hidden = {flag for flag in flags if flag.startswith("avx512")}
    _pretend(monkeypatch, "znver4", flags, hidden)
    assert targets.detect() == targets.preset("haswell")


def test_hidden_avx2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "haswell", targets.preset("haswell").features, {"avx2"})
    with pytest.raises(BuildError, match="needs AVX2"):
        targets.detect()


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(BuildError, match="Unsupported machine 'riscv64'"):
        targets.detect()


def test_arm_presets() -> None:
    board = targets.preset("cortex-a72")
    assert (board.id, board.kind, board.lanes) == ("aarch64-cortex-a72", "llvm", 4)
    assert board.machine == "aarch64" and board.to_json()["machine"] == "aarch64"
    assert set(board.features) == {"fp", "asimd"}  # no crc32 and aes, which no kernel uses
    assert targets.preset("aarch64").id == "aarch64-generic"
    assert {"asimdhp", "asimddp", "atomics"} <= set(targets.preset("cortex-a76").features)
    assert targets.preset("armv7") == targets.preset("cortex-a7")
    assert targets.preset("armv7").id == "armv7-cortex-a7" and {"neon", "vfpv4"} < set(targets.preset("armv7").features)
    assert "machine" not in targets.preset("haswell").to_json()


def test_arm_targets_of_tvm() -> None:
    board, old = (targets.to_tvm(targets.preset(name)) for name in ("neoverse-v1", "armv7"))
    assert board.attrs["mtriple"] == "aarch64-linux-gnu" and "-sve" in list(board.attrs["mattr"])
    assert old.attrs["mfloat-abi"] == "hard" and old.attrs["mtriple"].endswith("gnueabihf")


def test_detection_on_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    flags = targets.preset("cortex-a76").features
    _pretend(monkeypatch, "cortex-a76", flags, {"asimdhp"})
    spec = targets.detect()
    assert targets.preset("cpu") == spec and spec.id == "aarch64-cortex-a76"
    assert list(targets.to_tvm(spec).attrs["mattr"]) == ["+neon", "-fullfp16"]
    with pytest.raises(BuildError, match="'x86' means this machine's CPU, which is aarch64"):
        targets.preset("x86")
    targets.detect.cache_clear()
    _pretend(monkeypatch, "generic", ("fp", "asimd", "sve"), set())
    assert targets.detect() == targets.preset("aarch64")
    targets.detect.cache_clear()
    _pretend(monkeypatch, "generic", ("fp",), set())
    with pytest.raises(BuildError, match="needs asimd and fp on aarch64, this one has fp"):
        targets.detect()


def test_flags_of_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "CPUINFO", cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd crc32\n\nprocessor\t: 1\nFeatures\t: fp asimd\n")
    assert cpu.cpu_flags.__wrapped__() == {"fp", "asimd"}
    cpuinfo.write_text("flags : avx2\n")  # emulated: the file is that of the machine below
    monkeypatch.setattr(hwcap.ctypes, "CDLL", lambda name: SimpleNamespace(getauxval=_Auxval({16: 0b11, 26: 0b10})))
    assert cpu.cpu_flags.__wrapped__() == {"fp", "asimd", "sve2"}


class _Auxval:
    def __init__(self, values: dict[int, int]) -> None:
        self.values = values

    def __call__(self, kind: int) -> int:
        return self.values[kind]


def test_tvm_target() -> None:
    target = targets.to_tvm(targets.preset("haswell"))
    assert str(target.kind) == "llvm" or target.kind.name == "llvm"
    assert target.attrs["mcpu"] == "haswell"
    assert "-memdep-block-scan-limit:int=4000" in list(target.attrs["cl-opt"])


def test_what_cannot_be_checked_is_off() -> None:
    target = targets.to_tvm(targets.preset("diamondrapids"))
    assert {"-avx10.2", "-egpr"} <= set(target.attrs["mattr"])


def test_flags_that_all_processors_have() -> None:
    text = "processor : 0\nflags\t\t: fpu avx avx2\n\nprocessor : 1\nflags\t\t: fpu avx\nvmx flags : ept\n"
    assert cpu.parse_flags(text) == {"fpu", "avx"}
    assert cpu.parse_flags("Features : asimd") == frozenset()


def test_gpu_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = targets.preset("sm_90")
    assert (hopper.id, hopper.kind, hopper.arch) == ("cuda-sm_90", "cuda", "sm_90")
    assert (hopper.architectures, hopper.max_threads, hopper.shared_bytes) == (("sm_80", "sm_90"), 1024, 227 * 1024)
    assert targets.preset("sm_80").shared_bytes == 163 * 1024
    assert targets.preset("sm_80").architectures == ("sm_80", "sm_90")
    assert targets.preset("sm_120").architectures == ("sm_80", "sm_90", "sm_120")

    def none() -> Any:
        raise GpuNotFoundError("none")

    monkeypatch.setattr(gpu, "gpus", none)
    assert targets.preset("cuda") == hopper
    monkeypatch.setattr(gpu, "gpus", lambda: (gpu.Gpu("Other", "sm_89", 0), gpu.Gpu("Another", "sm_90", 0)))
    assert targets.preset("cuda").id == "cuda-sm_89"


@pytest.mark.parametrize("name", ["sm_75", "sm_", "sm_90x"])
def test_unknown_gpus(name: str) -> None:
    with pytest.raises(BuildError, match=f"Unknown GPU architecture {name!r}: expected 'cuda' .* sm_80, .*sm_90"):
        targets.preset(name)


def test_tvm_target_of_a_gpu() -> None:
    target = targets.to_tvm(targets.preset("sm_80"))
    assert target.attrs["arch"] == "sm_80" and int(target.attrs["max_shared_memory_per_block"]) == 163 * 1024
    assert target.host.attrs["mcpu"] == "x86-64"  # the library runs on any host


def test_import_is_light(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run_python("import sys, rpe_tvm.targets\nassert not {'tvm', 'tvm_ffi', 'torch', 'numpy'} & set(sys.modules)")


def _pretend(monkeypatch: pytest.MonkeyPatch, mcpu: str, flags: tuple[str, ...], hidden: set[str]) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags) - hidden)
    monkeypatch.setattr(llvm, "host_cpu", lambda: mcpu)
