"""Attention on GPUs apart from a GPU: the sequence of functions, what is registered, devices, which operator serves."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rpe_tvm import build, reference
from rpe_tvm.errors import ArtefactError, CompilerNotFoundError, DTypeError, GpuGradientError
from rpe_tvm.plan import (
    gpu,
    gpu_backward,
    gpu_buffers,
    gpu_choice,
    gpu_direct,
    gpu_tiles_backward,
    gpu_toeplitz,
    gpu_wisdom,
)
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.runtime.gpu import Gpu
from rpe_tvm.runtime.gpu_operator import function_names
from rpe_tvm.torch import (
    NPRF,
    core,
    cuda,
    dispatch,
    elu_features,
    gaussian_projection,
    grid_attention,
    kernelized_attention,
    operators,
    use_artefacts,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calls_on_cpu

B, H, D, M, P = 2, 3, 7, 4, 64
SHORT = GpuAttentionConfig(M, D, P, (8, 8), 32)
LONG = GpuAttentionConfig(M, D, P, (4, 4), 32, columns=4)
TILES = TileConfig(M, D, P, 1, 1, 2, 2)
MAPS = {"prf": reference.prf, "nprf": reference.nprf}


class StandIn:
    """The functions of a config in NumPy: each reads only its arguments, and checks the shapes of its buffers.

    In the place of spectra are n_q and the weights themselves; sums of parity 1 are 0.
    """

    last = "normalise"  # what writes the output, which may have any strides

    def __init__(self, config: GpuConfig) -> None:
        self.config = config
        self.calls: list[str] = []
        whole = "forward", "recorded"
        functions = {name: self._logged(name) for name in function_names(config) if not name.startswith(whole)}
        self.instance = GpuInstance(config, functions)

    def add_forward(self, directory: Path) -> None:
        """Add the compiled functions that call the others."""
        from rpe_tvm.build.lower_forward import forward_functions

        functions = dict(self.instance.functions)
        for name, function in forward_functions(self.config).items():
            functions[name] = calls_on_cpu.compile_calls(function, self.instance.functions, directory)
        self.instance = GpuInstance(self.config, functions)

    def _logged(self, name: str) -> Any:
        function = getattr(self, name.split("_")[0] if name.startswith("features") else name)

        def call(*arguments: Any) -> None:
            self.calls.append(name)
            is_out = name == self.last
            assert all(x.is_contiguous() for x in arguments[-1:] if not is_out and isinstance(x, torch.Tensor))
            function(*arguments, *([name.removeprefix("features_")] if name.startswith("features") else []))

        return call

    def _check_tables(self, tables: Any) -> None:
        assert tables.dtype == torch.float32 and np.array_equal(tables.numpy(), gpu.tables(self.config))

    def features(self, query: Any, key: Any, projection: Any, phi_q: Any, phi_k: Any, name: str) -> None:
        assert query.stride(3) == key.stride(3) == 1 and projection.is_contiguous()
        for x, phi in ((query, phi_q), (key, phi_k)):
            assert phi.shape == (*x.shape[:2], M, P) and phi.is_contiguous()
            phi.zero_()
            phi[..., : x.shape[2]] = torch.from_numpy(MAPS[name](x.double().numpy(), projection.double().numpy())).mT

    def largest(self, bias: Any, n_q: int, n_k: int, causal: int, largest: Any) -> None:
        assert bias.shape == (H, n_q + n_k - 1) and bias.is_contiguous() and largest.shape == (H,)
        largest[:] = bias[:, : n_q if causal else None].amax(1)

    def _weights(self, bias: Any, largest: Any, n_q: int, n_k: int, causal: int, tables: Any, spectrum: Any) -> None:
        self._check_tables(tables)
        weights = torch.exp(bias - largest[:, None])
        if causal:
            weights[:, n_q:] = 0
        flat = spectrum.view(H, 4 * P)
        flat.zero_()
        flat[:, 0], flat[:, 1 : n_q + n_k] = n_q, weights

    def _matrix(self, spectrum: Any, n_k: int) -> Any:
        flat = spectrum.reshape(-1, 4 * P)
        n_q = int(flat[0, 0])
        matrix = reference.toeplitz_matrix(flat[:, 1 : n_q + n_k].double().numpy(), n_q, n_k)
        return torch.from_numpy(np.array(matrix)).float()

    def spectrum(self, *arguments: Any) -> None:
        assert arguments[-1].shape == (H, 2, 8, 8, 2)
        self._weights(*arguments)

    def attention(self, phi_q: Any, phi_k: Any, value: Any, spectrum: Any, tables: Any, partial: Any) -> None:
        self._check_tables(tables)
        n_k = value.shape[2]
        assert value.stride(3) == 1
        assert partial.shape == (*value.shape[:2], D // 2 + 1, 2, 1, 8, 8, 2)
        matrix = self._matrix(spectrum, n_k)
        n_q = matrix.shape[1]
        sums = (phi_q.mT[:, :, :n_q] @ phi_k[..., :n_k] * matrix) @ torch.cat(
            [value, torch.ones(*value.shape[:3], 1)], -1
        )
        halves = torch.zeros(*value.shape[:2], P, 2 * (D // 2 + 1))
        halves[:, :, :n_q, : D + 1] = sums
        partial[:, :, :, 0, 0] = halves.view(*value.shape[:2], 8, 8, -1, 2).permute(0, 1, 4, 2, 3, 5)
        partial[:, :, :, 1] = 0.0

    def spectrum_columns(self, *arguments: Any) -> None:
        assert arguments[-1].shape == (H, 2, 4, 16, 2)
        self._weights(*arguments)

    def spectrum_rows(self, transformed: Any, tables: Any, spectrum: Any) -> None:
        self._check_tables(tables)
        assert transformed.shape == spectrum.shape == (H, 2, 4, 4, 4, 2) and transformed.is_contiguous()
        spectrum.copy_(transformed)

    def columns(self, phi_k: Any, value: Any, tables: Any, first: int, transformed: Any) -> None:
        self._check_tables(tables)
        n_k = value.shape[0]
        assert phi_k.shape == (M, P) and value.stride(1) == 1 and transformed.shape[1:] == (2, M, 4, 16, 2)
        packed = torch.zeros(P, 2 * (D // 2 + 1))
        packed[:n_k] = torch.cat([value, torch.ones(n_k, 1)], 1)
        pairs = packed.view(P, -1, 2)[:, first : first + len(transformed)]
        transformed[:, 0] = (phi_k.T[:, :, None, None] * pairs[:, None]).permute(2, 1, 0, 3).unflatten(2, (4, 16))
        transformed[:, 1] = n_k

    def rows(self, transformed: Any, spectrum: Any, tables: Any, product: Any) -> None:
        self._check_tables(tables)
        assert transformed.shape == product.shape == (len(product), 2, M, 4, 4, 4, 2) and transformed.is_contiguous()
        matrix = self._matrix(spectrum, int(transformed[0, 1].flatten()[0]))[0]
        x = transformed[:, 0].flatten(2, 4)[:, :, : matrix.shape[1]]
        product.zero_()
        product.flatten(3, 5)[:, 0, :, : len(matrix)] = torch.einsum("ij,ufjc->ufic", matrix, x)

    def back_columns(self, product: Any, phi_q: Any, tables: Any, partial: Any) -> None:
        self._check_tables(tables)
        assert product.shape[1:] == (2, M, 4, 16, 2) and partial.shape == (len(product), 2, 4, 16, 2)
        partial.copy_((product * phi_q.view(M, 4, 16, 1)).sum(2))

    def normalise(self, partial: Any, tables: Any, out: Any) -> None:
        self._check_tables(tables)
        assert out.stride(3) == 1 and partial.is_contiguous()
        batch, heads, n_q, _ = out.shape
        assert partial.shape == (batch, heads, D // 2 + 1, 2, P, 2)
        halves = partial.sum(3).permute(0, 1, 3, 2, 4).reshape(batch, heads, P, -1)[:, :, :n_q]
        out.copy_(halves[..., :D] / halves[..., D : D + 1])


class TileStandIn(StandIn):
    """The same for tiles."""

    last = "attention"

    def weights(self, bias: Any, n_q: int, n_k: int, causal: int, origin: int, table: Any) -> None:
        assert bias.shape == (H, n_q + n_k - 1) and bias.is_contiguous()
        assert origin == gpu_direct.round_up(n_q, 32) and table.shape == (H, origin + gpu_direct.round_up(n_k, 64))
        table.zero_()
        weights = torch.exp(bias - bias[:, : n_q if causal else None].amax(1, keepdim=True))
        if causal:
            weights[:, n_q:] = 0
        table[:, origin - n_q + 1 : origin + n_k] = weights

    def attention(
        self, phi_q: Any, phi_k: Any, value: Any, table: Any, causal: int, denominators: Any, out: Any
    ) -> None:
        n_q, n_k = out.shape[2], value.shape[2]
        assert denominators.shape == out.shape[:3] and denominators.is_contiguous()
        assert phi_q.is_contiguous() and phi_k.is_contiguous() and value.stride(3) == out.stride(3) == 1
        offset = torch.arange(n_k) - torch.arange(n_q)[:, None]
        scores = phi_q.mT[:, :, :n_q] @ phi_k[..., :n_k] * table[:, offset + gpu_direct.round_up(n_q, 32)]
        assert not causal or bool((scores[..., offset > 0] == 0).all())
        denominators.copy_(scores.sum(-1))
        out.copy_(scores @ value / denominators[..., None])


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[GpuConfig, StandIn]:
    found: dict[GpuConfig, StandIn] = {SHORT: StandIn(SHORT), LONG: StandIn(LONG), TILES: TileStandIn(TILES)}
    for config in (SHORT, TILES):
        found[config].add_forward(tmp_path_factory.mktemp("forward"))
    return found


@pytest.fixture(params=[SHORT, LONG, TILES], ids=["short", "long", "tiles"])
def stand_in(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, stand_ins: dict[GpuConfig, StandIn]
) -> Iterator[StandIn]:
    made = stand_ins[request.param]
    made.calls.clear()
    # two pairs of channels at once
    monkeypatch.setattr(gpu_buffers, "_ARRAY_FLOATS", 2 * 2 * M * P * 2)
    for module in (operators, core):
        monkeypatch.setattr(module, "get_gpu_operator", lambda index, n, m, d, dtype="float32": made.instance)
    # Fresh memory holds NaN.
    torch.use_deterministic_algorithms(True)
    yield made
    torch.use_deterministic_algorithms(False)


def _inputs(n_q: int, n_k: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n_q)
    query = torch.randn(B, n_q, H, D, generator=g).transpose(1, 2)
    key, value = torch.randn(2, B, H, n_k, D + 1, generator=g)[..., 1:].unbind()
    return [query, key, value, torch.randn(H, n_q + n_k - 1, generator=g), gaussian_projection(M, D, seed=0)]


def _calls(stand_in: StandIn) -> list[str]:
    if stand_in.config is TILES:
        return ["weights", "attention"]
    if stand_in.config is SHORT:
        return ["largest", "spectrum", "attention", "normalise"]
    turns = B * H * 2  # four pairs of channels, two at once
    return ["largest", "spectrum_columns", "spectrum_rows", *["columns", "rows", "back_columns"] * turns, "normalise"]


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(64, 64), (5, 60), (60, 5), (1, 1)])
def test_the_sequence_of_functions(stand_in: StandIn, n_q: int, n_k: int, is_causal: bool, name: str) -> None:
    inputs = _inputs(n_q, n_k)
    out = operators._kernelized_attention_cuda(*inputs, name, is_causal)
    want = reference.attention(*(x.numpy() for x in inputs), feature_map=name, is_causal=is_causal)[2]
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-5)
    assert stand_in.calls == [f"features_{name}", *_calls(stand_in)]
    assert out.transpose(1, 2).is_contiguous()  # as query


@pytest.mark.parametrize("is_causal", [False, True])
def test_what_is_kept_for_gradients(stand_in: StandIn, is_causal: bool) -> None:
    inputs = _inputs(20, 30)
    out = torch.full(inputs[0].shape, torch.nan)
    kept = cuda.launch_recorded(stand_in.instance, inputs[0], inputs[1], "nprf", is_causal)(*inputs, out)
    _, sums, want = reference.attention(*(x.numpy() for x in inputs), feature_map="nprf", is_causal=is_causal)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-5)
    assert (kept is not None) == (stand_in.config is TILES)
    if kept is not None:
        ratio = kept.numpy() / sums  # one for each head: weights are exp(b - max b)
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1, :, :1], ratio.shape), rtol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_on_features_of_ones_own(stand_in: StandIn, reference_operator: Any, is_causal: bool) -> None:
    query, key, value, bias, projection = _inputs(20, 30)
    phi_q, phi_k = NPRF(projection)(query, key)
    phi_k[:, :, :12] = 0.0
    out, sees_none = core._forward_cuda(phi_q, phi_k, value, bias, is_causal)
    want, want_none = core._forward(phi_q, phi_k, value, bias, is_causal)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(sees_none, want_none) and bool(sees_none.any()) == is_causal
    assert stand_in.calls == _calls(stand_in)


def test_empty_inputs_call_nothing(stand_in: StandIn) -> None:
    query, key, value, bias, projection = _inputs(5, 5)
    without_keys = query, key[:, :, :0], value[:, :, :0], bias[:, :4], projection
    assert torch.equal(operators._kernelized_attention_cuda(*without_keys, "prf", False), torch.zeros(B, H, 5, D))
    without_batch = query[:0], key[:0], value[:0], bias
    assert operators._kernelized_attention_cuda(*without_batch, projection, "prf", False).shape == (0, H, 5, D)
    out, _ = core._forward_cuda(*without_batch, False)
    assert out.shape == (0, H, 5, D) and stand_in.calls == []


def test_shapes_of_the_buffers() -> None:
    short = gpu.choose(4096, 32, 64)
    assert gpu_buffers.features(short, 2, 3) == (2, 3, 32, 4096)
    assert gpu_buffers.spectrum(short, 3) == (3, 2, 16, 256, 2)
    assert gpu_buffers.partial(short, 2, 3) == (2, 3, 33, 2, 4096, 2)
    long = GpuAttentionConfig(32, 65, 16384, (16, 16, 8), 128, columns=8)
    assert gpu_buffers.spectrum(long, 3) == (3, 2, 8, 8, 256, 2)
    assert gpu_buffers.spectrum_columns(long, 3) == (3, 2, 8, 2048, 2)
    assert gpu_buffers.between(long, 5) == (5, 2, 32, 8, 2048, 2)
    assert gpu_buffers.pairs_at_once(long) == 32
    assert gpu_buffers.pairs_at_once(gpu.choose(gpu.LONGEST, 64, 64)) == 1


@pytest.mark.parametrize("name", ["kernelized_attention", "toeplitz_attention"])
def test_kernels_for_gpus_are_registered(name: str) -> None:
    for operator in (f"rpe_tvm::{name}", f"rpe_tvm::{name}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")


def test_gradients_say_what_works() -> None:
    n = gpu_backward.LONGEST + 1
    x = torch.empty(1, 1, n, D)
    bias, projection = torch.empty(1, 2 * n - 1), torch.empty(M, D)
    says = rf"up to {n - 1} queries and keys so far, got {n}.*torch.no_grad\(\).*\.cpu\(\)"
    with pytest.raises(GpuGradientError, match=says):
        operators.attention_backward_on_gpu(x, x, x, x, bias, projection, x, "prf", False, True)
    with pytest.raises(GpuGradientError, match=says):
        core._backward_cuda(x, x, x, x, bias, x, torch.zeros(1, 1, n, 1, dtype=torch.bool), False)


def test_gradients_of_nothing_are_zero() -> None:
    query, key, value, bias, projection = _inputs(5, 5)
    inputs = query, key[:, :, :0], value[:, :, :0], bias[:, :4], projection
    found = operators.attention_backward_on_gpu(query, *inputs, query, "prf", False, True)
    assert all(torch.equal(grad, torch.zeros(x.shape)) for grad, x in zip(found, inputs, strict=True))


def test_gpu_tensors_pass_the_checks_and_keep_their_device() -> None:
    with FakeTensorMode():
        query, key, value = (torch.empty(B, H, 10, D, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        bias, projection = torch.empty(H, 19, device="cuda"), torch.empty(M, D, device="cuda")
        out = kernelized_attention(query, key, value, bias, feature_map=NPRF(projection))
        assert (out.shape, out.device, out.dtype) == (query.shape, query.device, torch.bfloat16)


@pytest.mark.parametrize(("head_dim", "n", "taken"), [(8, 10, True), (7, 10, False), (8, 40_000, False)])
def test_sixteen_bits_go_to_tensor_cores_as_they_are(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, n: int, taken: bool
) -> None:
    dtypes: list[torch.dtype] = []
    inner = operators.check_inputs
    monkeypatch.setattr(operators, "check_inputs", lambda *inputs: dtypes.append(inputs[0].dtype) or inner(*inputs))
    with FakeTensorMode():
        x = torch.empty(B, H, n, head_dim, dtype=torch.bfloat16, device="cuda")
        bias, projection = torch.empty(H, 2 * n - 1, device="cuda"), torch.empty(M, head_dim, device="cuda")
        assert kernelized_attention(x, x, x, bias, feature_map=NPRF(projection)).dtype == torch.bfloat16
        assert set(dtypes) == {torch.bfloat16 if taken else torch.float32}
        with pytest.raises(DTypeError, match="dtype of value: expected torch.bfloat16, got torch.float32"):
            torch.ops.rpe_tvm.kernelized_attention(x, x, x.float(), bias, projection, "nprf", False)


def test_rows_for_tensor_cores_are_whole_pieces() -> None:
    x = torch.zeros(2, 3, 5, 16, dtype=torch.bfloat16)
    for fine in (x, x.transpose(1, 2), x[:, :, 1:], x[..., 8:]):
        assert cuda.in_whole_pieces(fine) is fine
    for odd in (x[..., 1:9], x.new_zeros(2, 3, 5, 12)[..., :8], x.mT[..., :3, :], x.new_zeros(2, 3, 16, 5).mT):
        copy = cuda.in_whole_pieces(odd)
        assert copy is not odd and copy.is_contiguous() and torch.equal(copy, odd)


@pytest.mark.parametrize(("current", "entered"), [(0, []), (1, ["cuda:0"])])
def test_another_current_gpu_is_put_back(monkeypatch: pytest.MonkeyPatch, current: int, entered: list[str]) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(str(device)) or contextlib.nullcontext())
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:0")
    with cuda.current_gpu(x):
        assert seen == entered


@pytest.mark.parametrize("index", range(5))
def test_tensors_of_a_call_share_a_device(index: int) -> None:
    name = ("query", "key", "value", "rpe_bias", "the projection")[index]
    with FakeTensorMode():
        shapes = (*[(B, H, 10, D)] * 3, (H, 19), (M, D))
        inputs = [torch.empty(shape, device="cuda") for shape in shapes]
        inputs[index] = torch.empty(inputs[index].shape)
        name, here, there = ("key", "cpu", "cuda:0") if index == 0 else (name, "cuda:0", "cpu")
        with pytest.raises(ValueError, match=rf"device of {name}: expected {here}.*, got {there}.*\.to\('{here}'\)"):
            kernelized_attention(*inputs[:4], feature_map=NPRF(inputs[4]))
        if index < 4:
            with pytest.raises(ValueError, match=rf"device of {name}: expected {here}"):
                kernelized_attention(*inputs[:4], feature_map=lambda q, k: (q.exp(), k.exp()))
        with pytest.raises(ValueError, match=rf"device of .*{name.split()[-1]}: expected {here}"):
            torch.ops.rpe_tvm.kernelized_attention(*inputs, "nprf", False)


def test_key_lengths_are_where_query_is() -> None:
    with FakeTensorMode():
        x, bias = torch.empty(B, H, 10, D, device="cuda"), torch.empty(H, 19, device="cuda")
        feature_map = NPRF(torch.empty(M, D, device="cuda"))
        with pytest.raises(ValueError, match="device of key_lengths: expected cuda:0"):
            kernelized_attention(x, x, x, bias, feature_map=feature_map, key_lengths=torch.tensor([1, 2]))


def test_tensors_of_a_grid_share_a_device() -> None:
    with FakeTensorMode():
        x, bias = torch.empty(B, H, 3, 4, D, device="cuda"), torch.empty(H, 5, 7, device="cuda")
        with pytest.raises(ValueError, match="device of rpe_bias: expected cuda:0"):
            grid_attention(x, x, x, bias.cpu(), feature_map=elu_features)
        with pytest.raises(ValueError, match="device of key_mask: expected cuda:0"):
            mask = torch.ones(B, 3, 4, dtype=torch.bool)
            grid_attention(x, x, x, bias, feature_map=elu_features, key_mask=mask)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Two GPUs of one kind and an older one; compiling and loading only say what they were asked for."""
    made = SimpleNamespace(compiled=[], loaded=[], error=None)

    def compile_operator(config: Any, target: Any) -> Path:
        if made.error is not None:
            raise made.error
        made.compiled.append((config, target.id))
        return _write(tmp_path / "cache" / config.name, config)

    def load_gpu(path: Path, index: int) -> Any:
        made.loaded.append((path.name, index))
        (manifest,) = path.rglob("manifest.json")
        return GpuInstance(gpu_wisdom.config_from_json(json.loads(manifest.read_text())["config"]), {})

    h100, a100 = Gpu("H100", "sm_90", 1), Gpu("A100", "sm_80", 1)
    monkeypatch.setattr(dispatch, "gpus", lambda: (h100, h100, a100))
    monkeypatch.setattr(build, "compile_operator", compile_operator)
    monkeypatch.setattr(dispatch, "load_gpu", load_gpu)
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch, "_gpu_calls", {})
    monkeypatch.setattr(dispatch, "_gpu_backward_calls", {})
    monkeypatch.setattr(dispatch, "_gpu_toeplitz_calls", {})
    monkeypatch.setattr(dispatch, "_artefacts", None)
    monkeypatch.delenv("RPE_TVM_ARTEFACTS", raising=False)
    monkeypatch.setenv("RPE_TVM_CACHE", str(tmp_path / "cache"))
    return made


def _write(path: Path, config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"config": config.to_json(), "schedule": {"source": "default"}}))
    return path


def test_one_operator_for_all_gpus_of_an_architecture(machine: Any) -> None:
    first = dispatch.get_gpu_operator(0, 1000, 32, 64)
    assert first.config == gpu_choice.choose(1024, 32, 64, target_id="cuda-sm_90")
    assert dispatch.get_gpu_operator(1, 1024, 32, 64) is first
    machine.compiled.clear()
    assert dispatch.get_gpu_operator(1, 100, 32, 64).config.length == 128
    assert [target for _, target in machine.compiled] == ["cuda-sm_90"]


def test_a_directory_of_artefacts_serves_gpus(machine: Any, tmp_path: Path) -> None:
    top = tmp_path / "shipped"
    for length in (256, 1024):
        config = gpu.choose(length, 32, 64)
        _write(top / config.name / "cuda-sm_90", config)
    (top / "tvm_runtime").mkdir()
    use_artefacts(top)
    assert dispatch.get_gpu_operator(2, 200, 32, 64).config.length == 256
    assert dispatch.get_gpu_operator(0, 300, 32, 64).config.length == 1024
    assert machine.loaded == [("attention-m32-d64-n256-float32", 2), ("attention-m32-d64-n1024-float32", 0)]
    assert machine.compiled == []
    assert dispatch._from_artefacts(SimpleNamespace(name="attention-m32-d64"), 64) is None  # that is the CPU's


def test_gradients_are_operators_of_their_own(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "load_gpu_backward", lambda path, index: (path.name, index))
    config = gpu_tiles_backward.choose(300, 32, 64)
    assert dispatch.get_gpu_backward(1, 300, 32, 64) == (config.name, 1)
    assert machine.compiled == [(config, "cuda-sm_90")]
    machine.compiled.clear()
    for each in (config, gpu.choose(300, 32, 64)):
        _write(tmp_path / "shipped" / each.name / "cuda-sm_90", each)
    use_artefacts(tmp_path / "shipped")
    assert dispatch.get_gpu_backward(0, 100, 32, 64) == ("backward-m32-d64-n512-float32", 0)
    assert machine.compiled == []


def test_toeplitz_products_are_operators_of_their_own(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dispatch, "load_gpu_toeplitz", lambda path, index: (path.name, index))
    config = gpu_toeplitz.choose(300, 64, shared_bytes=1)
    assert dispatch.get_gpu_toeplitz(1, 300, 64) == (config.name, 1)
    assert machine.compiled == [(config, "cuda-sm_90")]
    machine.compiled.clear()
    for name in (config.name, "toeplitz-d64-n256", "toeplitz-d63-n256-float32"):  # those of the CPU and of 63 channels
        _write(tmp_path / "shipped" / name / "cuda-sm_90", config)
    use_artefacts(tmp_path / "shipped")
    assert dispatch.get_gpu_toeplitz(0, 100, 64) == ("toeplitz-d64-n512-float32", 0)
    assert machine.compiled == []


def test_without_nvcc_there_is_no_second_way(machine: Any) -> None:
    machine.error = CompilerNotFoundError("No nvcc: install it")
    with pytest.raises(CompilerNotFoundError, match="No nvcc: install it"):
        dispatch.get_gpu_operator(0, 100, 32, 64)


def test_without_tvm_the_error_names_the_target(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delattr("rpe_tvm.build")
    monkeypatch.setitem(sys.modules, "rpe_tvm.build", None)
    with pytest.raises(
        ArtefactError, match=r"--features 32 --head-dim 64 --target sm_90 --dtype float32 --lengths 128 --out DIR"
    ):
        dispatch.get_gpu_operator(0, 100, 32, 64)
