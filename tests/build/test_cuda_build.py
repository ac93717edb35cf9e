"""From scheduled functions to a library for GPUs: what it holds, and what is refused. No GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpe_tvm import targets
from rpe_tvm.build import compile as build
from rpe_tvm.build import cuda, device_code, fatbin, link, manifest, nvcc
from rpe_tvm.errors import BuildError, CompilerNotFoundError
from rpe_tvm.gpu_targets import GpuTargetSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_gpu

pytestmark = pytest.mark.compile

try:
    nvcc.find()
except CompilerNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def target() -> GpuTargetSpec:
    """One architecture: half of the compiling."""
    found = targets.preset("sm_90")
    assert isinstance(found, GpuTargetSpec)
    return replace(found, architectures=("sm_90",))


def _compile(target: GpuTargetSpec, module: Any = None) -> Path:
    module = toy_gpu.module("scale") if module is None else module
    return build.compile_module(module, "toy", {"a": 1}, target, op="scale")


def test_a_library_holds_machine_code_and_says_what_it_needs(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = _compile(targets.preset("sm_90"))
    assert artefact.is_relative_to(cache_dir / "artefacts" / "toy" / "cuda-sm_90")
    content = (artefact / "lib.so").read_bytes()
    assert fatbin.contents(content) == (["sm_80", "sm_90"], ["sm_90"])
    assert b"__global__" not in content
    found = manifest.read(artefact)
    assert found["target"] == {"id": "cuda-sm_90", "kind": "cuda", "arch": "sm_90"}
    device = found["device"]
    assert device["architectures"] == ["sm_80", "sm_90"]
    assert (device["ptx"], device["shared_bytes"], device["nvcc"]) == ("sm_90", 256, nvcc.version())
    assert list(device["kernels"]) == ["scale_kernel"]
    for use in device["kernels"]["scale_kernel"].values():
        assert 0 < use["registers"] < 64 and use["spill_bytes"] == 0 and use["shared_bytes"] == 256
    monkeypatch.setenv("PATH", "")  # what is in the cache needs no compiler
    assert _compile(targets.preset("sm_90")) == artefact


def test_the_key_depends_on_the_target(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rpe_tvm.build import cache

    keys: list[str] = []
    monkeypatch.setattr(cache, "entry", lambda relative, is_whole, build: keys.append(relative.name))
    for arch in ("sm_80", "sm_90"):
        _compile(targets.preset(arch))
    monkeypatch.setattr(nvcc, "FLAGS", ("-O0",))
    _compile(targets.preset("sm_90"))
    assert len(set(keys)) == 3


def test_older_gpus_are_left_out_where_they_lack_shared_memory(cache_dir: Path) -> None:
    module = toy_gpu.module("scale", shared=180 * 256)
    assert manifest.read(_compile(targets.preset("sm_90"), module))["device"]["architectures"] == ["sm_90"]
    with pytest.raises(BuildError, match="scale_kernel needs 184320 bytes of shared memory .*, sm_80 has 166912"):
        _compile(targets.preset("sm_80"), module)
    with pytest.raises(BuildError, match="sm_90 has 232448"):
        _compile(targets.preset("sm_90"), toy_gpu.module("scale", shared=228 * 256))


def test_source_instead_of_machine_code_is_refused(
    cache_dir: Path, target: GpuTargetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_tvm_packs_it(code: device_code.DeviceCode, binary: bytes) -> bytes:
        import tvm_ffi

        return np.from_dlpack(tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(code.host)).tobytes()

    monkeypatch.setattr(device_code, "blob", as_tvm_packs_it)
    with pytest.raises(BuildError, match="holds CUDA source"):
        _compile(target)


def test_a_missing_architecture_is_refused(
    cache_dir: Path, target: GpuTargetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = device_code.blob
    other, _ = nvcc.compile_fatbin('extern "C" __global__ void scale_kernel() {}', ["sm_80"])
    monkeypatch.setattr(device_code, "blob", lambda code, binary: inner(code, other))
    with pytest.raises(BuildError, match="expected machine code for sm_90 .*, found machine code for sm_80 and"):
        _compile(target)
    with pytest.raises(BuildError, match="found machine code for none and PTX of none"):
        fatbin.check_library(b"no device code", ("sm_90",))


def test_spills_are_refused() -> None:
    # 128 numbers that live at once in each of 1024 threads, which have 64 registers
    source = """
    extern "C" __global__ void __launch_bounds__(1024) hungry_kernel(float* x) {
      float values[128];
      #pragma unroll
      for (int i = 0; i < 128; ++i) values[i] = x[i * 1024 + threadIdx.x];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = values[i] * values[127 - i] + values[(i + 64) % 128];
    }
    """
    _, uses = nvcc.compile_fatbin(source, ["sm_80", "sm_90"])
    assert [(use.kernel, use.arch) for use in uses] == [("hungry_kernel", "sm_80"), ("hungry_kernel", "sm_90")]
    assert all(use.registers == 64 and use.spill_bytes > 0 and use.stack_bytes > 0 for use in uses)
    with pytest.raises(BuildError, match=r"spill registers.*hungry_kernel on sm_80: \d+ bytes, 64 registers"):
        cuda.check_uses(uses, ["hungry_kernel"], ["sm_80", "sm_90"])
    with pytest.raises(BuildError, match="reported nothing on other_kernel for sm_90"):
        cuda.check_uses([], ["other_kernel"], ["sm_90"])


def test_the_report_of_ptxas() -> None:
    text = (
        "ptxas info    : 24 bytes gmem, 8 bytes cmem[4]\n"
        "ptxas info    : Compiling entry function 'first' for 'sm_80'\n"
        "ptxas info    : Function properties for first\n"
        "    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, "
        "384 bytes cmem[0]\n"
        "ptxas info    : Compile time = 22.054 ms\n"
        "ptxas info    : Compiling entry function 'second' for 'sm_90'\n"
        "ptxas info    : Function properties for helper\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Function properties for second\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 22 registers, used 0 barriers\n"
    )
    assert nvcc.read_report(text) == [
        nvcc.KernelUse("first", "sm_80", 255, 16, 12, 1024),
        nvcc.KernelUse("second", "sm_90", 22, 0, 0, 0),
    ]


def test_a_function_without_a_kernel_is_refused(cache_dir: Path, target: GpuTargetSpec) -> None:
    import tvm

    scheduled = toy_gpu.module("scale")
    on_host = tvm.script.from_source(
        scheduled.script().replace('T.thread_binding(n, thread="blockIdx.x")', "range(n)")
        .replace('T.thread_binding(64, thread="threadIdx.x")', "range(64)").replace("shared.dyn", "global")
    )  # fmt: skip
    with pytest.raises(BuildError, match="function scale of toy has no kernel: its schedule binds no loop"):
        _compile(target, on_host)


def test_arrays_of_its_own_are_refused(cache_dir: Path, target: GpuTargetSpec) -> None:
    import tvm

    # two kernels with an array between them that TVM would allocate
    text = """
@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def twice(x: T.Buffer((65536,), "float32"), y: T.Buffer((65536,), "float32")):
        T.func_attr({"global_symbol": "twice", "tirx.noalias": True})
        with T.sblock("root"):
            between = T.sblock_alloc_buffer((65536,), "float32")
            for i in T.thread_binding(512, thread="blockIdx.x"):
                for j in T.thread_binding(128, thread="threadIdx.x"):
                    with T.sblock("between"):
                        v = T.axis.spatial(65536, i * 128 + j)
                        between[v] = x[v] * T.float32(2)
            for i in T.thread_binding(512, thread="blockIdx.x"):
                for j in T.thread_binding(128, thread="threadIdx.x"):
                    with T.sblock("y"):
                        v = T.axis.spatial(65536, i * 128 + j)
                        y[v] = between[65535 - v] * T.float32(2)
"""
    with pytest.raises(BuildError, match="__TVMBackendAllocWorkspace.*arrays have to be arguments"):
        _compile(target, tvm.script.from_source(text))


def test_what_does_not_compile(cache_dir: Path, target: GpuTargetSpec) -> None:
    import tvm

    with pytest.raises(BuildError, match=r"nvcc failed with status \d+: .*\n[\s\S]*unknown_function"):
        nvcc.compile_fatbin("__global__ void f() { unknown_function(); }", ["sm_90"])
    nested = toy_gpu.module("scale").script().replace('T.thread_binding(n, thread="blockIdx.x")', "T.vectorized(n)")
    with pytest.raises(BuildError, match="TVM could not compile toy for"):
        _compile(target, tvm.script.from_source(nested))


def test_nvcc_of_the_python_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "bin").mkdir()
    files = [
        SimpleNamespace(match=Path(name).match, locate=lambda name=name: tmp_path / name)
        for name in ("include/nvcc.h", "bin/nvcc")
    ]
    monkeypatch.setattr(nvcc.metadata, "files", lambda package: files)
    assert nvcc.find() == tmp_path / "bin" / "nvcc"

    def missing(package: str) -> None:
        raise nvcc.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(nvcc.metadata, "files", missing)
    with pytest.raises(CompilerNotFoundError, match=r"No nvcc: .*pip install 'rpe_tvm\[cuda\]'"):
        nvcc.find()
    monkeypatch.setattr(nvcc, "find", lambda: tmp_path / "no-such-file")
    with pytest.raises(CompilerNotFoundError, match="Could not start nvcc"):
        nvcc.version()


def test_without_nvcc_nothing_is_compiled(
    cache_dir: Path, target: GpuTargetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Path:
        raise CompilerNotFoundError("No nvcc")

    monkeypatch.setattr(nvcc, "find", missing)
    monkeypatch.setattr(device_code, "generate", lambda *arguments: pytest.fail("too late"))
    with pytest.raises(CompilerNotFoundError, match="No nvcc"):
        _compile(target)


def test_damaged_device_code() -> None:
    whole, _ = nvcc.compile_fatbin('extern "C" __global__ void f() {}', ["sm_80", "sm_90"])
    assert fatbin.contents(b"\0" * 7 + whole + b"\0" * 9) == (["sm_80", "sm_90"], ["sm_90"])
    with pytest.raises(BuildError, match="Damaged device code"):
        fatbin.contents(whole[:100])
    with pytest.raises(BuildError, match="header of 0 bytes"):
        fatbin.contents(whole[:16] + b"\0" * (len(whole) - 16))


def test_an_unknown_packing_is_refused(target: GpuTargetSpec) -> None:
    code = device_code.generate(toy_gpu.module("scale"), targets.to_tvm(target), "toy")
    other = device_code.generate(toy_gpu.module("other"), targets.to_tvm(target), "toy")
    code.host.import_module(other.host.imports[0])  # a second module, which no code of ours makes
    with pytest.raises(BuildError, match="form that this rpe_tvm does not know"):
        device_code.blob(code, b"binary")


def test_blocks_on_a_multiprocessor_bound_registers(cache_dir: Path, target: GpuTargetSpec) -> None:
    module = toy_gpu.module("scale")
    function = module["scale"].with_attr(device_code.BLOCKS_ATTRIBUTE, 7)
    code = device_code.generate(type(module)({"scale": function}), targets.to_tvm(target), "toy")
    assert "__launch_bounds__(64, 7) scale_kernel(" in code.source
    assert fatbin.contents(device_code.blob(code, nvcc.compile_fatbin(code.source, ["sm_90"])[0]))[0] == ["sm_90"]


def test_kernels_that_load_again_promise_nothing(target: GpuTargetSpec) -> None:
    module = toy_gpu.module("scale", "other")
    functions = {"scale": module["scale"].with_attr(device_code.RELOAD_ATTRIBUTE, True), "other": module["other"]}
    source = device_code.generate(type(module)(functions), targets.to_tvm(target), "toy").source
    signatures = re.findall(r" (\w+)_kernel\(([^)]*)\)", source)
    assert {name for name, parameters in signatures if "__restrict__" in parameters} == {"other"}
    assert {name for name, _ in signatures} == {"scale", "other"}


def test_only_kernels_with_tables_promise_that_these_are_aligned(target: GpuTargetSpec) -> None:
    module = toy_gpu.module("scale")
    function = module["scale"].with_attr(device_code.ALIGNED_ATTRIBUTE, True)
    with pytest.raises(BuildError, match="kernels of scale have no tables"):
        device_code.generate(type(module)({"scale": function}), targets.to_tvm(target), "toy")


def test_kernels_for_newer_gpus_are_empty_on_older_ones(target: GpuTargetSpec) -> None:
    import tvm
    from tvm.script import tirx as T

    from rpe_tvm.te import cuda_warp as warp
    from rpe_tvm.te.cuda_function import argument, function, named

    with function("meet") as built:
        x = argument("x", (named("n", T.int64()),), "float32")
        with (
            T.launch_thread("blockIdx.x", 2),
            T.launch_thread("clusterCtaIdx.x", 2) as rank,
            T.launch_thread("threadIdx.x", 32),
        ):
            warp.cluster_arrive()
            warp.cluster_wait()
            T.buffer_store(x, T.float32(1), [rank])
    functions = (built.get(), built.get().with_attr(device_code.ARCH_ATTRIBUTE, 90))
    always, newer = (
        device_code.generate(tvm.IRModule({"meet": function}), targets.to_tvm(target), "toy").source
        for function in functions
    )
    with pytest.raises(BuildError, match="sm_90 or higher"):
        nvcc.compile_fatbin(always, ["sm_80"])
    _, uses = nvcc.compile_fatbin(newer, ["sm_80", "sm_90"])
    assert [(use.kernel, use.arch) for use in uses] == [("meet_kernel", "sm_80"), ("meet_kernel", "sm_90")]


def test_kernels_that_wait_themselves_are_launched_early(target: GpuTargetSpec) -> None:
    from rpe_tvm.build import lower_tensor_cores
    from rpe_tvm.plan.gpu_direct import TensorCoreConfig

    mod = lower_tensor_cores.lower(TensorCoreConfig(3, 16, 640, "bfloat16")).mod
    functions = {str(f.attrs["global_symbol"]): f for f in mod.functions.values()}
    early = {name for name, function in functions.items() if device_code.OVERLAP_ATTRIBUTE in function.attrs}
    assert early == {"clustered_prf", "clustered_nprf"}
    for name in ("clustered_prf", "fused_prf"):
        code = device_code.generate(type(mod)({name: functions[name]}), targets.to_tvm(target), "attention")
        kernel = code.source[code.source.index(f"{name}_kernel(") :]
        packed = device_code.blob(code, b"")
        if name in early:
            before = kernel[kernel.index("{") : kernel.index("griddepcontrol_wait")]
            assert not re.search(r"\b(query|key|value|rpe_bias|projection|out)_ptr\b", before)
            assert b"use_programtic_dependent_launch" in packed
        else:
            assert "griddepcontrol" not in kernel and b"use_programtic_dependent_launch" not in packed


def test_exporting_packs_tvms_runtime(
    cache_dir: Path, target: GpuTargetSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rpe_tvm.runtime import tvm_runtime

    lowered = SimpleNamespace(mod=toy_gpu.module("scale"), schedule={"source": "default"})
    monkeypatch.setattr(build, "_lower", lambda config, target: lowered)
    path = build.export(toy_gpu.CONFIG, target, tmp_path)
    assert path == tmp_path / "attention-m3-d8-n64-float32" / "cuda-sm_90"
    assert sorted(file.name for file in (tmp_path / tvm_runtime.PACKED).iterdir()) == sorted(
        ("LICENSE", "NOTICE", *tvm_runtime.LIBRARIES)
    )


@pytest.mark.parametrize(("config", "name"), [(toy_gpu.CONFIG, "haswell"), (None, "sm_90")])
def test_configs_and_targets_fit(config: Any, name: str, naive: tuple[Any, Any]) -> None:
    with pytest.raises(BuildError, match="and the target .* is none"):
        build.compile_operator(naive[0] if config is None else config, targets.preset(name))


def test_hooks_of_the_cpu_are_not_linked(tmp_path: Path) -> None:
    code = tmp_path / "code.o"
    code.write_bytes(b"\0__TVMFFIFunctionCall\0__TVMBackendParallelLaunch\0")
    with pytest.raises(BuildError, match="GPU library calls __TVMBackendParallelLaunch"):
        link.link_with_device([code], code, tmp_path / "lib.so")


def test_the_environment_is_left_as_it_was(target: GpuTargetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0"):
        if value is not None:
            monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", value)
        device_code.generate(toy_gpu.module("scale"), targets.to_tvm(target), "toy")
        assert os.environ.get("TVM_COMPILE_FORCE_FALLBACK") == value
