"""Code objects for AMD GPUs: what they hold, how they are launched, and what is refused. No GPU, nothing of AMD's."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpe_tvm import targets
from rpe_tvm.build import code_object, lld, local_memory, manifest, rocm
from rpe_tvm.build import compile as build
from rpe_tvm.errors import ArtefactError, BuildError, CompilerNotFoundError
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.rocm_limits import WAVES
from rpe_tvm.runtime import load_hip

pytestmark = pytest.mark.compile

try:
    lld.find()
except CompilerNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

# The real lengths compile in the time of the small ones; registers and local memory depend on them.
CONFIG = GpuAttentionConfig(32, 64, 1024, (8, 4, 4, 8), 128)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture -> artefact of `CONFIG`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {arch: build.compile_operator(CONFIG, targets.preset(arch)) for arch in WAVES}


@pytest.mark.parametrize("arch", WAVES)
def test_a_code_object_holds_what_the_manifest_says(artefacts: dict[str, Path], arch: str) -> None:
    found = manifest.read(artefacts[arch])
    assert found["target"] == {"id": f"rocm-{arch}", "kind": "rocm", "arch": arch}
    assert found["library"]["file"] == "kernels.hsaco"
    assert found["functions"] == sorted(found["device"]["functions"])
    assert "forward_prf" not in found["functions"] and len(found["functions"]) == 6
    assert (found["device"]["wave"], found["device"]["lld"]) == (WAVES[arch], lld.version())

    described = code_object.read((artefacts[arch] / "kernels.hsaco").read_bytes())
    assert described.undefined == frozenset()
    kernels = {k["name"]: k for function in found["device"]["functions"].values() for k in function["kernels"]}
    assert set(kernels) == set(described.kernels) and {f"{name}.kd" for name in kernels} <= described.defined
    for name, kernel in kernels.items():
        of = described.kernels[name]
        assert (of["wavefront_size"], of["vgpr_spill_count"], of["private_segment_fixed_size"]) == (WAVES[arch], 0, 0)
        assert kernel["vector_registers"] == of["vgpr_count"] <= 256
        assert kernel["shared_bytes"] == of["group_segment_fixed_size"] <= 65536
        assert (kernel["fused_multiply_adds"] > 20) == (name != "largest_kernel")
    attention = kernels["attention_kernel"]
    assert attention["grid"] == [66, "heads", "batch"] and attention["block"] == [128, 1, 1]
    # value, weights and two stages with padded rows: 8, 9 and 10 KiB
    assert attention["shared_bytes"] == 27648
    order = ["partial", "phi_k", "phi_q", "spectrum", "tables", "value", "batch", "heads", "n_key"]
    assert (
        attention["arguments"][:9] == order == [a[".name"] for a in described.kernels["attention_kernel"]["args"]][:9]
    )


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1201"])
def test_the_instructions_are_those_of_the_code_object(artefacts: dict[str, Path], arch: str) -> None:
    objdump = shutil.which("llvm-objdump-22") or shutil.which("llvm-objdump-21")
    if objdump is None:
        pytest.skip("no llvm-objdump of LLVM 21 or 22 (Debian: apt install llvm-22)")
    library = artefacts[arch] / "kernels.hsaco"
    text = subprocess.run([objdump, "-d", f"--mcpu={arch}", library], capture_output=True, text=True, check=True).stdout
    body = text.partition("<attention_kernel>:")[2].partition(">:")[0]
    kernels = manifest.read(artefacts[arch])["device"]["functions"]["attention"]["kernels"]
    assert len(rocm._FUSED.findall(body)) == kernels[0]["fused_multiply_adds"]
    assert ("v_pk_fma_f32" in body) == (arch == "gfx90a") and ("v_dual_" in body) == (arch == "gfx1201")
    local_memory.check("", body)
    # what threads hand to each other goes through local memory: only the sums at the end are written
    stores = [line for line in body.splitlines() if "global_store" in line]
    assert 0 < len(stores) <= CONFIG.radices[0] and "scratch_" not in body and "buffer_store" not in body
    assert body.count("s_barrier_signal" if arch == "gfx1201" else "s_barrier") >= 2 * len(CONFIG.radices) - 2


def test_exp_sqrt_and_division_are_exact(artefacts: dict[str, Path], tmp_path: Path) -> None:
    """exp by the hardware's 2^x alone would lose the digits of its argument, and 1 / x and sqrt two units."""
    objdump = shutil.which("llvm-objdump-22") or shutil.which("llvm-objdump-21")
    if objdump is None:
        pytest.skip("no llvm-objdump of LLVM 21 or 22 (Debian: apt install llvm-22)")
    library = artefacts["gfx90a"] / "kernels.hsaco"
    text = subprocess.run([objdump, "-d", "--mcpu=gfx90a", library], capture_output=True, text=True, check=True).stdout
    body = text.partition("<features_nprf_kernel>:")[2].partition(">:")[0]
    # x log2(e) in two parts, 2^fraction, then the exponent; Newton's steps after the approximations
    assert body.count("v_exp_f32") == body.count("v_ldexp_f32") == body.count("v_rndne_f32") > 0
    assert "v_div_fixup_f32" in body and "v_sqrt_f32" in body and "v_cmp_class_f32" in body


def test_other_limits_are_refused(artefacts: dict[str, Path]) -> None:
    image = (artefacts["gfx942"] / "kernels.hsaco").read_bytes()
    target = targets.preset("gfx942")
    functions = manifest.read(artefacts["gfx942"])["device"]["functions"]
    attention = functions["attention"]["kernels"][0]

    def with_kernel(**fields: Any) -> dict[str, Any]:
        return {"attention": {**functions["attention"], "kernels": [{**attention, **fields}]}}

    assert set(rocm.check(image, target, functions)) > {"attention_kernel"}
    for wanted, spec, message in (
        (with_kernel(name="other"), target, "no kernel other"),
        (with_kernel(block=[512, 1, 1]), target, "blocks of 512 threads, and it allows 256"),
        (with_kernel(arguments=attention["arguments"][1:]), target, "arguments .* are expected"),
        (with_kernel(arguments=["batch", *attention["arguments"][1:]]), target, "arguments .* are expected"),
        (functions, replace(target, shared_bytes=16384), "group_segment_fixed_size is 27648, expected at most 16384"),
        (functions, replace(target, arch="gfx1100"), "machine 0x4c, expected 0x41.*waves of 64 threads, expected 32"),
    ):
        with pytest.raises(BuildError, match=message):
            rocm.check(image, spec, wanted)


def test_damaged_code_objects_are_refused(artefacts: dict[str, Path]) -> None:
    image = (artefacts["gfx942"] / "kernels.hsaco").read_bytes()
    for damaged in (
        b"",
        image[:100],
        image[: len(image) // 2],
        b"\x7fELF" + bytes(200),
        image[:18] + b"\x3e" + image[19:],
    ):
        with pytest.raises(BuildError, match="[Cc]ode object"):
            code_object.read(damaged)
    note = image.index(b"AMDGPU\0\0") + 8
    with pytest.raises(BuildError, match="unknown type 0xc1"):
        code_object.read(image[:note] + b"\xc1" + image[note + 1 :])


def test_undefined_symbols_are_refused() -> None:
    with pytest.raises(BuildError, match="failed with status"):
        lld.link(b"no object file")


def test_barriers_without_waits_and_global_local_memory_are_refused() -> None:
    local_memory.check("", "\tds_write_b64 v1, v[2:3]\n\ts_waitcnt vmcnt(1) lgkmcnt(0)\n\ts_barrier\n")
    local_memory.check("", "\tds_store_b64 v1, v[2:3]\n\ts_wait_loadcnt_dscnt 0x200\n\ts_barrier_signal -1\n")
    for wait in ("s_waitcnt vmcnt(0)", "s_waitcnt lgkmcnt(1)", "s_wait_dscnt 0x1", "s_wait_loadcnt_dscnt 0x201"):
        with pytest.raises(BuildError, match="does not wait for local memory"):
            local_memory.check("", f"\tds_store_b64 v1, v[2:3]\n\t{wait}\n\ts_barrier\n")
    with pytest.raises(BuildError, match="takes local memory for global"):
        local_memory.check("%1 = getelementptr float, ptr addrspace(1) addrspacecast (ptr addrspace(3) @x", "")


def test_what_tvm_alone_generates_is_refused(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = GpuAttentionConfig(2, 3, 64, (4, 4, 4), 32)
    with monkeypatch.context() as patch:
        patch.setattr(local_memory, "corrected", lambda device: device)
        with pytest.raises(BuildError, match="local memory"):
            build.compile_operator(small, targets.preset("gfx90a"))


def test_what_does_not_fit_is_refused_before_llvm_ends_the_process(cache_dir: Path) -> None:
    target = targets.preset("gfx90a")
    with pytest.raises(BuildError, match="_kernel needs .* bytes of local memory for each block, gfx90a has"):
        build.compile_operator(GpuAttentionConfig(2, 3, 4096, (8, 8, 8, 8), 256), target)
    with pytest.raises(BuildError, match=r"blocks of \[512, 1, 1\] threads: expected at most 256"):
        build.compile_operator(GpuAttentionConfig(2, 3, 2048, (4, 4, 4, 4, 4, 2), 512), target)
    with pytest.raises(BuildError, match="Invalid blocks_per_sm .* expected 0, got 2"):
        build.compile_operator(GpuAttentionConfig(2, 3, 64, (4, 4, 4), 32, blocks_per_sm=2), target)
    tiles = TensorCoreConfig(32, 64, 1024, "bfloat16", 2, 4, 1, 64, 3)
    with pytest.raises(BuildError, match="is for NVIDIA GPUs, and the target rocm-gfx90a is none"):
        build.compile_operator(tiles, target)


def test_without_a_linker_nothing_is_compiled(cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rocm, "_split", lambda *arguments: pytest.fail("too late"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CompilerNotFoundError, match="No ld.lld of LLVM 19 or later: .*apt install lld-22"):
        build.compile_operator(CONFIG, targets.preset("gfx90a"))
    old = tmp_path / "ld.lld"
    old.write_text("#!/bin/sh\necho 'Debian LLD 14.0.6 (compatible with GNU linkers)'\n")
    old.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(old) if name == "ld.lld" else None)
    with pytest.raises(CompilerNotFoundError, match="is of version 14.0.6"):
        lld.find()


def test_artefacts_of_another_architecture_are_not_loaded(artefacts: dict[str, Path]) -> None:
    with pytest.raises(ArtefactError, match="compiled for gfx942, and the GPU is gfx90a"):
        load_hip(artefacts["gfx942"], "gfx90a", lambda: 0)
