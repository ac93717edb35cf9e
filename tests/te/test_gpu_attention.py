"""Attention by FFT on GPUs: the generated CUDA source, run on the CPU, against the float64 reference."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cuda_on_cpu import compile_kernel  # noqa: E402

from rpe_tvm import reference
from rpe_tvm.plan.gpu import GpuAttentionConfig, choose, tables

pytestmark = pytest.mark.compile


def generated(config: GpuAttentionConfig) -> str:
    """The CUDA source of all functions of a config."""
    import tvm
    from tvm.target import Target

    from rpe_tvm.build.lower_gpu import lower

    target = Target({"kind": "cuda", "arch": "sm_90", "max_num_threads": 1024}, host={"kind": "llvm"})
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        return str(tvm.compile(lower(config).mod, target).mod.imports[0].inspect_source())


def short(
    launch: Any, empty: Any, config: Any, phi_q: Any, phi_k: Any, value: Any, bias: Any, tables: Any, partial: Any
) -> None:
    batch, heads = phi_q.shape[:2]
    spectrum = empty(heads, config.residues, config.radices[-1], config.row // config.radices[-1], 2)
    launch("spectrum_kernel", (config.residues, heads, 1), config.threads, **bias, tables=tables, spectrum=spectrum)
    launch(
        "attention_kernel",
        (config.residues * config.pairs, heads, batch),
        config.threads,
        phi_q=phi_q,
        phi_k=phi_k,
        value=value,
        spectrum=spectrum,
        tables=tables,
        partial=partial,
    )


def long(
    launch: Any, empty: Any, config: Any, phi_q: Any, phi_k: Any, value: Any, bias: Any, tables: Any, partial: Any
) -> None:
    """The transforms of rows and columns, two pairs of channels of a head at a time."""
    batch, heads, m = phi_q.shape[:3]
    n1, n2, tiles = config.columns, config.row, config.row // min(config.row, 128)
    threads = min(128, config.row)
    spectra = empty(heads, 2, n1, n2, 2)
    launch("spectrum_columns_kernel", (tiles, 2, heads), threads, **bias, tables=tables, transformed=spectra)
    spectrum = empty(heads, 2, n1, n2, 2)
    launch(
        "spectrum_rows_kernel", (n1, 2, heads), config.threads, transformed=spectra, tables=tables, spectrum=spectrum
    )
    for b in range(batch):
        for h in range(heads):
            for first in range(0, config.pairs, 2):
                count = min(2, config.pairs - first)
                transformed, product = empty(count, 2, m, n1, n2, 2), empty(count, 2, m, n1, n2, 2)
                of_head = {"tables": tables, "count": count, "first": first}
                launch(
                    "columns_kernel",
                    (tiles, 2, count),
                    threads,
                    phi_k=phi_k[b, h],
                    value=value[b, h],
                    transformed=transformed,
                    **of_head,
                )
                launch(
                    "rows_kernel",
                    (m * n1, 2, count),
                    config.threads,
                    transformed=transformed,
                    spectrum=spectrum[h],
                    product=product,
                    **of_head,
                )
                launch(
                    "back_columns_kernel",
                    (tiles, 2, count),
                    threads,
                    product=product,
                    phi_q=phi_q[b, h],
                    partial=partial[b, h, first : first + count],
                    **of_head,
                )


def run_attention(
    source: str,
    config: GpuAttentionConfig,
    directory: Path,
    inputs: dict[str, Any],
    feature_map: str,
    is_causal: bool,
) -> np.ndarray:
    """All kernels in turn, each block after the other."""
    query, key, value, bias, projection = (inputs[k] for k in ("query", "key", "value", "bias", "projection"))
    batch, heads, n_q, d = query.shape
    n_k = key.shape[2]
    m, length = config.num_features, config.length

    def empty(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    def strides(name: str, x: np.ndarray) -> dict[str, int]:
        return {f"{name}_stride{axis}": x.strides[axis] // 4 for axis in range(x.ndim - 1)}

    compiled = functools.cache(functools.partial(compile_kernel, source, directory))

    def launch(name: str, grid: tuple[int, int, int], threads: int, **arguments: Any) -> None:
        sizes = {"batch": batch, "heads": heads, "n_query": n_q, "n_key": n_k, "causal": int(is_causal)}
        for each, array in list(arguments.items()):
            if each in ("query", "key", "value", "out"):
                sizes |= strides(each, array)
        compiled(name)(grid, threads, {**sizes, **arguments})

    phi_q, phi_k = empty(batch, heads, m, length), empty(batch, heads, m, length)
    tiles, threads = length // 64, 64 * min(-(-m // 8), 4)
    name = f"features_{feature_map}_kernel"
    launch(name, (tiles, heads, batch), threads, query=query, projection=projection, phi_q=phi_q)
    launch(f"{name}_1", (tiles, heads, batch), threads, key=key, projection=projection, phi_k=phi_k)
    # its kernel reduces across threads with shuffles, which cannot run here: tests on a GPU cover it
    largest = (bias[:, :n_q] if is_causal else bias).max(-1)
    constants = tables(config)
    partial = empty(batch, heads, config.pairs, config.residues, length, 2)
    attend = short if config.columns == 1 else long
    attend(launch, empty, config, phi_q, phi_k, value, {"rpe_bias": bias, "largest": largest}, constants, partial)
    out = empty(batch, heads, n_q, d)
    launch("normalise_kernel", (-(-n_q // 32), heads, batch), 256, partial=partial, tables=constants, out=out)
    return out


CASES = [
    # n_q, n_k, config, feature map, causal
    (1, 1, choose(1, 3, 4), "prf", False),
    (100, 70, choose(100, 10, 5), "nprf", False),
    (250, 256, choose(256, 2, 3), "prf", True),
    (1000, 1024, choose(1024, 2, 2), "nprf", False),
    (250, 200, GpuAttentionConfig(2, 3, 256, (8, 8), 32, folds=4), "nprf", True),
    (500, 512, GpuAttentionConfig(2, 3, 512, (8, 8), 32, columns=8), "prf", False),
    (2000, 2048, GpuAttentionConfig(1, 2, 2048, (8, 8), 32, columns=32), "nprf", False),
]


@pytest.mark.parametrize(("n_q", "n_k", "config", "feature_map", "is_causal"), CASES)
def test_numbers(
    tmp_path: Path, n_q: int, n_k: int, config: GpuAttentionConfig, feature_map: str, is_causal: bool
) -> None:
    check(tmp_path, config, n_q, n_k, feature_map, is_causal)


def check(directory: Path, config: GpuAttentionConfig, n_q: int, n_k: int, feature_map: str, is_causal: bool) -> None:
    m, d = config.num_features, config.head_dim
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    inputs = {
        "query": normal(1, n_q, 2, d).transpose(0, 2, 1, 3),  # any strides but the last
        "key": normal(1, 2, n_k, d),
        "value": normal(1, n_k, 2, d).transpose(0, 2, 1, 3),
        "bias": normal(2, n_q + n_k - 1),
        "projection": normal(m, d),
    }
    out = run_attention(generated(config), config, directory, inputs, feature_map, is_causal)
    *_, expected = reference.attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        inputs["bias"],
        inputs["projection"],
        feature_map=feature_map,
        is_causal=is_causal,
    )
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    # causal: the first rows have few terms, and the FFT's rounding errors are those of the longest sums
    assert error < (2e-4 if is_causal else 2e-6), error
