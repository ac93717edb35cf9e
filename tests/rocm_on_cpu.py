"""Runs the kernels that a code object for AMD GPUs is made of on the CPU: lowered for AMD, written as CUDA source."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from rpe_tvm import targets
from rpe_tvm.build import code_object, lower_rocm
from rpe_tvm.plan.gpu import GpuAttentionConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cuda_on_cpu import compile_block  # noqa: E402


def cuda_source(config: GpuAttentionConfig, arch: str) -> str:
    """The kernels of a config as they are lowered for an architecture of AMD's, in CUDA C++."""
    import tvm
    import tvm_ffi
    from tvm.target import Target
    from tvm.tirx import get_default_tir_pipeline

    amd = targets.to_tvm(targets.preset(arch))
    cuda = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 256}, host={"kind": "llvm"})
    lower, _, _ = get_default_tir_pipeline(amd)
    _, _, finish = get_default_tir_pipeline(cuda)
    lowered = lower(tvm.tirx.transform.BindTarget(amd)(lower_rocm.lower(config).mod))
    kernels = {
        name: function.with_attr("target", cuda)
        for name, function in lowered.functions_items()
        if str(function.attrs["target"].kind.name) == "rocm"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_COMPILE_FORCE_FALLBACK", "1")
        module = tvm_ffi.get_global_func("target.build.cuda")(finish()(tvm.IRModule(kernels)), cuda)
        return str(module.inspect_source())


class Kernels:
    """Runs launches on the CPU, with arguments as the code object itself describes them."""

    def __init__(self, source: str, image: bytes, directory: Path) -> None:
        self._source, self._directory = source, directory
        self._described = code_object.read(image).kernels
        self._compiled: dict[str, Any] = {}
        self.launches: list[tuple[str, list[int], int, int]] = []

    def __call__(self, name: str, sizes: list[int], shared: int, stream: int, arguments: Any) -> None:
        self.launches.append((name, sizes, shared, stream))
        if name not in self._compiled:
            self._compiled[name] = compile_block(self._source, self._directory, name)
        run_block, names, types = self._compiled[name]
        described = self._described[name]["args"]
        assert [each[".name"] for each in described] == names
        pointers = (ctypes.c_void_p * len(names))()
        for index, (kind, each) in enumerate(zip(types, described, strict=True)):
            assert kind.endswith("*") == (each[".value_kind"] == "global_buffer")
            address = arguments[index]
            pointers[index] = ctypes.c_void_p.from_address(address).value if kind.endswith("*") else address
        x, y, z, threads = sizes[:4]
        for block in range(x * y * z):
            at = block % x, block // x % y, block // (x * y)
            assert run_block(*at, threads, 1 if block % 2 else -1, pointers) == 0, f"{name}: different barriers"
