"""The functions that are compiled for GPUs take the buffers that the sequence of kernels hands them. No GPU is needed.

TVM's code checks the shape, strides and dtype of every argument before it launches a kernel. Here launches do nothing,
and tensors on the CPU say that they are on a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rpe_tvm import targets
from rpe_tvm.build import compile as build
from rpe_tvm.build import nvcc
from rpe_tvm.errors import CompilerNotFoundError
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_choice import GpuConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.runtime import tvm_runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fake_gpu

pytestmark = pytest.mark.compile

try:
    nvcc.find()
except CompilerNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

_CODE = """
import ctypes, sys
import torch, tvm_ffi
from rpe_tvm.runtime import GpuInstance, load_gpu
from rpe_tvm.torch import cuda

def on_gpu(x):
    if not isinstance(x, torch.Tensor):
        return x
    tensor = tvm_ffi.from_dlpack(x)
    # DLTensor follows the object's header of 24 bytes: pointer, type of device
    ctypes.c_int32.from_address(tensor.__chandle__() + 24 + 8).value = 2
    return tensor

loaded, called = load_gpu(sys.argv[1]), []

def wrap(name, function):
    def call(*arguments):
        called.append(name)
        function(*map(on_gpu, arguments))
    return call

config = loaded.config
instance = GpuInstance(config, {name: wrap(name, function) for name, function in loaded.functions.items()})
m, d, n_q, n_k = config.num_features, config.head_dim, config.length - 3, config.length - 20
dtype = getattr(torch, config.dtype)
query = torch.randn(2, n_q, 3, d, dtype=dtype).transpose(1, 2)
key, value = torch.randn(2, 2, 3, n_k, d + 1, dtype=dtype)[..., 1:].unbind()
bias = torch.randn(3, n_q + n_k - 1)
out = torch.empty(2, n_q, 3, d, dtype=dtype).transpose(1, 2)
for feature_map in ("prf", "nprf"):
    cuda.attention(
        instance, query, key, value, bias, torch.randn(m, d), out, feature_map=feature_map, is_causal=True
    )
if config.dtype == "float32":
    cuda.attention_on_features(
        instance, torch.rand(2, 3, n_q, m), torch.rand(2, 3, n_k, m), value, bias, out, is_causal=False
    )
assert set(called) == set(loaded.functions)
try:
    if "forward_prf" in loaded.functions:
        longer = torch.empty(2, 3, config.length + 1, d, dtype=dtype)
        bias = torch.empty(3, n_q + config.length)
        instance.functions["forward_prf"](query, longer, longer, bias, torch.empty(m, d), 0, out)
    else:
        instance.functions["features_prf"](*[torch.empty(1)] * 5)
except (RuntimeError if "forward_prf" in loaded.functions else ValueError) as error:
    print("checked" if "expected" in str(error) else error)
"""


@pytest.mark.parametrize(
    "config",
    [
        GpuAttentionConfig(3, 4, 64, (8, 8), 32),
        GpuAttentionConfig(2, 3, 512, (8, 8), 32, columns=8),
        TensorCoreConfig(6, 8, 64, "bfloat16"),
        TensorCoreConfig(6, 16, 64, "bfloat16", fused=True),
    ],
    ids=["short", "long", "tensor cores", "fused"],
)
def test_arguments_fit(
    config: GpuConfig,
    cache_dir: Path,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    target = targets.preset("sm_90")
    build.export(config, replace(target, architectures=("sm_90",)), tmp_path / "artefacts")
    package = tvm_runtime.installed()
    assert package is not None
    fake = fake_gpu.write_libraries(tmp_path / "fake", package)
    done = run_python(_CODE, str(tmp_path / "artefacts"), LD_LIBRARY_PATH=str(fake), FAKE_GPU="90:232448")
    assert done.stdout == "checked\n"
