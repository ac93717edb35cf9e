"""The torch layer on compiled libraries: small ones that the tests compile from a plain definition."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from rpe_tvm import reference
from rpe_tvm.errors import ArtefactError
from rpe_tvm.torch import NPRF, PRF, dispatch, gaussian_projection, kernelized_attention, use_artefacts

M, D = 3, 8  # as in the fixture `artefacts`
NO_TVM = """
import importlib.abc, sys
class NoTVM(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "tvm" or name.startswith("tvm."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTVM())
from importlib import metadata
version = metadata.version
def version_without_tvm(name):
    if name == "apache-tvm":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = version_without_tvm
"""


@pytest.fixture(autouse=True)
def libraries(artefacts, monkeypatch):
    monkeypatch.delenv("RPE_TVM_ARTEFACTS", raising=False)
    use_artefacts(artefacts)
    yield
    use_artefacts(None)


def inputs(n_q, n_k, batch=2, heads=3):
    g = torch.Generator().manual_seed(n_q)
    query = torch.randn(batch, heads, n_q, D, generator=g)
    key, value = torch.randn(2, batch, heads, n_k, D, generator=g).unbind()
    return query, key, value, torch.randn(heads, n_q + n_k - 1, generator=g)


@pytest.mark.parametrize("kind", [PRF, NPRF])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (1, 1), (96, 70), (5, 90)])
def test_values(n_q, n_k, is_causal, kind):
    args, projection = inputs(n_q, n_k), gaussian_projection(M, D, seed=0)
    want = reference.attention(
        *(x.numpy() for x in args), projection.numpy(), feature_map=kind.name, is_causal=is_causal
    )[2]
    out = kernelized_attention(*args, feature_map=kind(projection), is_causal=is_causal)
    np.testing.assert_allclose(out.numpy(), want, rtol=2e-4, atol=1e-5)


def test_strided_tensors_reach_the_kernel_as_they_are():
    fused = torch.randn(2, 50, 3, 3, D + 1)
    query, key, value = (x[..., 1:].transpose(1, 2) for x in fused.unbind(2))
    rpe_bias, feature_map = torch.randn(3, 99), NPRF(gaussian_projection(M, D, seed=0))
    out = kernelized_attention(query, key, value, rpe_bias, feature_map=feature_map)
    assert out.transpose(1, 2).is_contiguous()
    copies = [x.contiguous() for x in (query, key, value)]
    assert torch.equal(out, kernelized_attention(*copies, rpe_bias, feature_map=feature_map))


def test_parameters_that_require_gradients_are_taken():
    args, projection = inputs(10, 10), gaussian_projection(M, D, seed=0)
    want = kernelized_attention(*args, feature_map=NPRF(projection))
    grad = [x.clone().requires_grad_() for x in args]
    out = kernelized_attention(*grad, feature_map=NPRF(projection.requires_grad_()))
    assert torch.equal(out, want) and out.requires_grad


def test_threads_follow_torch(openmp):
    """The library and torch use one OpenMP runtime, so torch.set_num_threads sets the library's threads."""
    kernelized_attention(*inputs(64, 64), feature_map=NPRF(gaussian_projection(M, D, seed=0)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert openmp.omp_get_max_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_neither_tvm_nor_a_compiler_is_needed(artefacts, run_python, tmp_path):
    code = (
        NO_TVM
        + """
import torch
from rpe_tvm.torch import KernelizedAttention
layer = KernelizedAttention(2, 8, 96, num_features=3)
with torch.no_grad():
    print(layer(*torch.randn(3, 1, 2, 80, 8)).isfinite().all().item(), "tvm" in sys.modules)
"""
    )
    done = run_python(code, RPE_TVM_ARTEFACTS=str(artefacts), PATH="/nowhere", RPE_TVM_CACHE=str(tmp_path / "cache"))
    assert done.stdout.split() == ["True", "False"]
    assert not (tmp_path / "cache").exists()


def test_gradients_without_their_library_say_what_to_compile(artefacts, run_python, tmp_path):
    """Forward libraries alone, and no TVM: attention runs, its gradient is a clear error."""
    code = (
        NO_TVM
        + """
import torch
from rpe_tvm.errors import ArtefactError
from rpe_tvm.torch import NPRF, gaussian_projection, kernelized_attention
query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 2, 80, 8).unbind())
out = kernelized_attention(query, key, value, torch.zeros(2, 159), feature_map=NPRF(gaussian_projection(3, 8, seed=0)))
assert out.isfinite().all()
try:
    out.sum().backward()
except ArtefactError as error:
    print(error)
"""
    )
    done = run_python(code, RPE_TVM_ARTEFACTS=str(artefacts), PATH="/nowhere", RPE_TVM_CACHE=str(tmp_path / "cache"))
    assert f"No compiled operator backward-m3-d8 for 80 positions in {artefacts}" in done.stdout
    assert "rpe_tvm compile --op backward --features 3 --head-dim 8 --lengths 80 --out DIR" in done.stdout


def test_an_artefact_of_another_cpu_or_a_damaged_one_is_refused(artefacts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artefacts, copy)
    (library,) = copy.glob(f"attention-m{M}-d{D}-n64/*/lib.so")
    library.write_bytes(library.read_bytes()[:-100])
    use_artefacts(copy)
    feature_map = NPRF(gaussian_projection(M, D, seed=0))
    with pytest.raises(ArtefactError, match="altered or truncated"):
        kernelized_attention(*inputs(64, 64), feature_map=feature_map)
    kernelized_attention(*inputs(96, 96), feature_map=feature_map)  # the other length is whole
    assert len(dispatch._loaded) == 1
