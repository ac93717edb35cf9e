"""The functions that are compiled for GPUs take the buffers that the sequence of kernels hands them. No GPU is needed.

TVM's code checks the shape, strides and dtype of every argument before it launches a kernel. Here launches do nothing,
and tensors on the CPU say that they are on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rpe_tvm import targets
from rpe_tvm.build import compile as build
from rpe_tvm.build import nvcc
from rpe_tvm.errors import CompilerNotFoundError
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_backward import GpuBackwardConfig
from rpe_tvm.plan.gpu_backward_choice import AnyBackwardConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_direct_backward import TensorCoreBackwardConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_tiles_backward import TileBackwardConfig
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.runtime import tvm_runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fake_gpu

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parents[2]

try:
    nvcc.find()
except CompilerNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

# Imports torch once, and runs every piece of code that it is sent in a process of its own.
_SERVER = """
import json, os, sys
import torch, tvm_ffi
import rpe_tvm.runtime
from rpe_tvm.torch import cuda, cuda_backward, cuda_toeplitz

for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:
        for name, stream in (("out", 1), ("errors", 2)):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), stream)
        os.environ["FAKE_GPU"] = job["gpu"]
        sys.argv[1:] = job["arguments"]
        exec(job["code"], {"__name__": "__main__"})
        sys.exit()
    print(os.wait()[1], flush=True)
"""

_CODE = """
import ctypes, sys
import torch, tvm_ffi
from rpe_tvm.runtime import GpuInstance, load_gpu, load_gpu_backward
from rpe_tvm.torch import cuda, cuda_backward

def on_gpu(x):
    if not isinstance(x, torch.Tensor):
        return x
    tensor = tvm_ffi.from_dlpack(x)
    # DLTensor follows the object's header of 24 bytes: pointer, type of device
    ctypes.c_int32.from_address(tensor.__chandle__() + 24 + 8).value = 2
    return tensor

op = sys.argv[2]
loaded, called = (load_gpu if op == "attention" else load_gpu_backward)(sys.argv[1]), []

def wrap(name, function):
    def call(*arguments):
        called.append(name)
        function(*map(on_gpu, arguments))
    return call

def launches():
    return ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "launches").value

config = loaded.config
instance = GpuInstance(config, {name: wrap(name, function) for name, function in loaded.functions.items()})
m, d, n_q, n_k = config.num_features, config.head_dim, config.length - 3, config.length - 20
dtype = getattr(torch, config.dtype)
query = torch.randn(2, n_q, 3, d, dtype=dtype).transpose(1, 2)
key, value = torch.randn(2, 2, 3, n_k, d + 1, dtype=dtype)[..., 1:].unbind()
bias = torch.randn(3, n_q + n_k - 1)
out = torch.empty(2, n_q, 3, d, dtype=dtype).transpose(1, 2)
for feature_map in ("prf", "nprf"):
    arguments = query, key, value, bias, torch.randn(m, d), out
    if op == "attention":
        cuda.attention(instance, *arguments, feature_map=feature_map, is_causal=True)
    else:
        grad_out = torch.ones((), dtype=dtype).expand(out.shape)
        cuda_backward.attention_backward(
            instance, grad_out, *arguments, feature_map=feature_map, is_causal=True, of_projection=True
        )
of_each_map = launches() // 2
if op == "backward" and config.dtype == "float32":
    phi_q, phi_k = torch.rand(2, 3, n_q, m), torch.rand(2, 3, n_k, m)
    cuda_backward.attention_on_features_backward(
        instance, torch.randn(out.shape).mT.contiguous().mT, phi_q, phi_k, value, bias, out, is_causal=False
    )
if "forward_prf" in loaded.functions:
    once = next(kind for kind in ("clustered", "fused", "forward") if kind + "_prf" in loaded.functions)
    assert called == [once + "_prf", once + "_nprf"]
    print(of_each_map, "launches")
elif "backward_prf" in loaded.functions:
    assert [name for name in called if name.startswith("backward")] == ["backward_prf", "backward_nprf"]
    print(of_each_map, "launches")
elif op == "attention" or config.columns > 1:
    assert set(called) == set(loaded.functions)
if op == "attention" and config.dtype == "float32":
    cuda.attention_on_features(
        instance, torch.rand(2, 3, n_q, m), torch.rand(2, 3, n_k, m), value, bias, out, is_causal=False
    )
try:
    instance.functions["features_prf"](*[torch.empty(1)] * 5)
except ValueError:
    print("checked")
if "fused_prf" in loaded.functions:
    called.clear()
    cuda._runs = lambda one_launch, device: one_launch.cluster == 1
    cuda.attention(instance, *arguments, feature_map="prf", is_causal=True)
    assert called == ["fused_prf"]
    longer = torch.empty(2, 3, config.length + 1, d, dtype=dtype)
    bias = torch.empty(3, n_q + config.length)
    for name in {"fused_prf", "clustered_prf"} & {*loaded.functions}:
        try:
            instance.functions[name](query, longer, longer, bias, torch.empty(m, d), 0, out)
            print("accepted too many keys")
        except RuntimeError as error:
            assert "expected at most" in str(error)
    called.clear()
    many = torch.empty(50, 3, n_q, d, dtype=dtype)
    bias = torch.empty(3, 2 * n_q - 1)
    cuda.attention(instance, many, many, many, bias, torch.empty(m, d), many, feature_map="prf", is_causal=True)
    assert called == ["forward_prf"]
"""

_TOEPLITZ = (
    _CODE.partition("op = ")[0]
    + """
from rpe_tvm.runtime import load_gpu_toeplitz
from rpe_tvm.torch import cuda_toeplitz

loaded = load_gpu_toeplitz(sys.argv[1])
called = []

def wrap(name, function):
    def call(*arguments):
        called.append(name)
        function(*map(on_gpu, arguments))
    return call

config = loaded.config
instance = GpuInstance(config, {name: wrap(name, function) for name, function in loaded.functions.items()})
d, n, n_out = config.head_dim, config.length - 3, config.length - 20
x = torch.randn(2, 3, n, d + 1)[..., 1:]
out = torch.empty(2, n_out, 3, d).transpose(1, 2)
cuda_toeplitz.matmul(instance, torch.randn(3, n_out + n - 1), x, out)
cuda_toeplitz.weight_spectra(instance, torch.ones(()).expand(out.shape).contiguous(), x)
print(*called)
print(ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "launches").value, "launches")
try:
    instance.functions["spectrum" if config.columns == 1 else "rows"](*[torch.empty(1)] * 4)
except (TypeError, ValueError):
    print("checked")
"""
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process of `_SERVER`, for which the driver's libraries are fakes."""
    package = tvm_runtime.installed()
    assert package is not None
    fake = fake_gpu.write_libraries(tmp_path_factory.mktemp("fake"), package)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(fake)}
    started = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    yield started
    started.communicate(timeout=60)


@pytest.fixture
def said(server: subprocess.Popen[str], tmp_path: Path) -> Callable[..., str]:
    """What code prints where it finds a GPU ``compute capability:bytes of shared memory``."""

    def run(code: str, *arguments: str, gpu: str) -> str:
        out, errors = tmp_path / "out", tmp_path / "errors"
        job = {"code": code, "arguments": arguments, "gpu": gpu, "out": str(out), "errors": str(errors)}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "0\n", errors.read_text()[-4000:]
        return out.read_text()

    return run


@pytest.mark.parametrize(
    ("config", "calls", "launches"),
    [
        (GpuToeplitzConfig(1, 4, 64, (8, 8), 8), "matmul correlation", 3),
        (
            GpuToeplitzConfig(1, 3, 128, (4, 4), 4, columns=8),
            "spectrum_columns spectrum_rows"
            + 2 * " columns rows back_columns"
            + 2 * " columns columns correlation_rows",
            14,
        ),
    ],
    ids=["short", "long"],
)
def test_arguments_of_toeplitz_products_fit(
    config: GpuToeplitzConfig,
    calls: str,
    launches: int,
    cache_dir: Path,
    tmp_path: Path,
    said: Callable[..., str],
) -> None:
    build.export(config, targets.preset("sm_90"), tmp_path / "artefacts")  # machine code for sm_80, too
    found = said(_TOEPLITZ, str(tmp_path / "artefacts"), gpu="80:166912")
    assert found == f"{calls}\n{launches} launches\nchecked\n"


@pytest.mark.parametrize(
    ("config", "launches"),
    [
        (GpuAttentionConfig(3, 4, 64, (8, 8), 32), 6),
        (GpuAttentionConfig(2, 3, 512, (8, 8), 32, columns=8), None),
        (TileConfig(3, 5, 64, 1, 1, 2, 2), 4),
        (TensorCoreConfig(6, 8, 64, "bfloat16"), 3),
        (TensorCoreConfig(6, 16, 64, "bfloat16"), 1),
        (TensorCoreConfig(6, 16, 640, "bfloat16"), 1),
        (GpuBackwardConfig(3, 5, 64, (8, 8), 8), 14),
        (GpuBackwardConfig(2, 3, 512, (8, 8), 8, columns=8), None),
        (TensorCoreBackwardConfig(6, 8, 64, "bfloat16", 1, 1, 2, 64), 5),
        (TileBackwardConfig(3, 5, 64, 32, 32, 1), 8),
    ],
    ids=[
        *("short", "long", "tiles", "tensor cores", "one launch", "clusters"),
        *("gradients", "long gradients", "gradients on tensor cores", "gradients by tiles"),
    ],
)
def test_arguments_fit(
    config: GpuConfig | AnyBackwardConfig,
    launches: int | None,
    cache_dir: Path,
    tmp_path: Path,
    said: Callable[..., str],
) -> None:
    target = targets.preset("sm_90")
    build.export(config, replace(target, architectures=("sm_90",)), tmp_path / "artefacts")
    found = said(_CODE, str(tmp_path / "artefacts"), config.op, gpu="90:232448")
    assert found == ("" if launches is None else f"{launches} launches\n") + "checked\n"
