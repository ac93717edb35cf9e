"""Toeplitz products on GPUs: the generated CUDA source, run on the CPU, against the float64 reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_on_cpu import compile_kernel  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan import gpu, gpu_buffers, gpu_toeplitz
from rpe_tvm.plan.gpu_toeplitz import GpuToeplitzConfig

pytestmark = pytest.mark.compile

B, H = 2, 2
Array = np.ndarray[Any, np.dtype[Any]]


class Kernels:
    """The kernels of a config: each call runs all blocks of a launch, one after the other."""

    def __init__(self, config: GpuToeplitzConfig, directory: Path) -> None:
        import tvm
        from tvm.target import Target

        from rpe_tvm.build.lower_gpu_toeplitz import lower

        self.config = config
        functions = {str(each.attrs["global_symbol"]): each for each in lower(config).mod.functions.values()}
        functions.pop("matmul", None)  # launches nothing itself
        target = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024}, host={"kind": "llvm"})
        with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
            source = str(tvm.compile(tvm.IRModule(functions), target).mod.imports[0].inspect_source())
        self.kernels: dict[str, Callable[..., None]] = {
            name: compile_kernel(source, directory, f"{name}_kernel") for name in functions
        }

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, **arguments: Any) -> None:
        for each in ("x", "grad", "out"):
            if each in arguments:
                array = arguments[each]
                arguments |= {f"{each}_stride{axis}": array.strides[axis] // 4 for axis in range(array.ndim - 1)}
        for z, y, x in np.ndindex(*grid[::-1]):
            self.kernels[name]((x, y, z), threads, {"batch": B, "heads": H, **arguments})


def _empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def _product(kernels: Kernels, weights: Array, x: Array, n_out: int) -> Array:
    config, tables = kernels.config, gpu.tables(kernels.config)
    sizes = {"tables": tables, "n_query": n_out, "n_key": x.shape[2]}
    out = _empty(B, n_out, H, x.shape[3]).transpose(0, 2, 1, 3)
    spectrum = _empty(*gpu_buffers.spectrum(config, H))
    if config.columns == 1:
        kernels.launch("spectrum", (2, H, 1), config.threads, weights=weights, spectrum=spectrum, **sizes)
        kernels.launch("product", (config.pairs, H, B), config.threads, x=x, spectrum=spectrum, out=out, **sizes)
        return out
    columns = _empty(*gpu_buffers.spectrum_columns(config, H))
    width = min(128, config.row)
    grid = config.row // width, 2, H
    kernels.launch("spectrum_columns", grid, width, weights=weights, transformed=columns, **sizes)
    kernels.launch(
        "spectrum_rows", (config.columns, 2, H), config.threads, transformed=columns, spectrum=spectrum, **sizes
    )
    for b in range(B):
        transformed = _columns(kernels, x[b])
        product = np.full_like(transformed, np.nan)
        kernels.launch(
            "rows",
            (2 * config.columns, config.pairs, H),
            config.threads,
            transformed=transformed,
            spectrum=spectrum,
            product=product,
            count=H,
            **sizes,
        )
        tiles, threads = _tiles(config)
        kernels.launch("back_columns", tiles, threads, product=product, out=out[b], count=H, **sizes)
    return out


def _tiles(config: GpuToeplitzConfig) -> tuple[tuple[int, int, int], int]:
    pairs, width = min(8, config.pairs), min(32, config.row)
    return (config.row // width, -(-config.pairs // pairs), H), pairs * width


def _columns(kernels: Kernels, x: Array) -> Array:
    transformed = _empty(*gpu_toeplitz.between(kernels.config, H))
    tiles, threads = _tiles(kernels.config)
    sizes = {"tables": gpu.tables(kernels.config), "count": H, "n_key": x.shape[1]}
    kernels.launch("columns", tiles, threads, x=x, transformed=transformed, **sizes)
    return transformed


def _correlation(kernels: Kernels, grad: Array, x: Array) -> Array:
    """The spectrum of the gradient of the weights, `[H, 2, P]`, frequencies in natural order."""
    config, tables = kernels.config, gpu.tables(kernels.config)
    sums = _empty(B, H, *gpu_toeplitz.correlation_shape(config))
    groups = gpu_toeplitz.correlation_groups(config)
    if config.columns == 1:
        sizes = {"n_query": grad.shape[2], "n_key": x.shape[2], "tables": tables}
        kernels.launch("correlation", (2 * groups, H, B), config.threads, grad=grad, x=x, sums=sums, **sizes)
    else:
        for b in range(B):
            sides = {"grad_columns": _columns(kernels, grad[b]), "x_columns": _columns(kernels, x[b])}
            grid = 2 * config.columns, groups, H
            kernels.launch("correlation_rows", grid, config.threads, tables=tables, sums=sums[b], count=H, **sides)
    summed = sums.astype(np.float64).sum((0, 2)).reshape(H, 2, config.length, 2)
    return (summed[..., 0] + 1j * summed[..., 1])[..., gpu_toeplitz.places(config)]


CONFIGS = {
    "short": gpu_toeplitz.choose(100, 4),
    "pairs of one channel": gpu_toeplitz.choose(64, 5),
    "columns": GpuToeplitzConfig(1, 3, 512, (8, 8), 8, columns=8),
    "columns of two groups": GpuToeplitzConfig(1, 20, 64, (4, 4), 4, columns=4),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(CONFIGS[request.param], tmp_path_factory.mktemp("kernels"))


def _inputs(config: GpuToeplitzConfig, n: int, n_out: int) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(n)

    def rows(count: int) -> Array:  # any strides but the last
        normal = random.standard_normal((B, count, H, config.head_dim + 1)).astype(np.float32)
        return normal[..., 1:].transpose(0, 2, 1, 3)

    return random.standard_normal((H, n_out + n - 1)).astype(np.float32), rows(n), rows(n_out)


def _error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("which", ["full", "less", "more"])
def test_numbers(kernels: Kernels, which: str) -> None:
    length = kernels.config.length
    n, n_out = {"full": (length, length), "less": (length - 3, 5), "more": (7, length - 1)}[which]
    weights, x, grad = _inputs(kernels.config, n, n_out)
    assert _error(_product(kernels, weights, x, n_out), reference.toeplitz_dense(weights, x, n_out)) < 1e-6

    # dw[t] = sum of g_i x_(i+t): here by the transforms of 2 P points, whose even and odd frequencies are the parities
    transforms = [np.fft.fft(each.astype(np.float64), 2 * length, axis=2) for each in (grad, x)]
    expected = (transforms[0].conj() * transforms[1]).sum((0, 3))
    found = _correlation(kernels, grad, x)
    for parity in (0, 1):
        # of pairs of channels as complex numbers only what is real in the end is the same
        both = [np.fft.ifft(each[:, parity]) for each in (found, np.stack([expected[:, ::2], expected[:, 1::2]], 1))]
        turns = np.exp(1j * np.pi * parity / length * np.arange(length))
        assert _error(*((each * turns).real for each in both)) < 1e-6
