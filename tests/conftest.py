"""Small compiled operators, so that build and runtime are tested apart from the real kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpe_tvm.plan.config import AttentionConfig

ROOT = Path(__file__).resolve().parents[1]
NUM_FEATURES, HEAD_DIM = 3, 8

# The operator by its definition, slow and short: same names, arguments, strides and alignment as the real
# one.
_NAIVE_ATTENTION = """
@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def features_prf(x_: T.handle, w_: T.handle, phi_: T.handle):
        T.func_attr({{"global_symbol": "features_prf", "tirx.noalias": True}}) B = T.int64(); H = T.int64(); n
        = T.int64(); P = T.int64(); s0 = T.int64(); s1 = T.int64(); s2 = T.int64() x = T.match_buffer(x_, (B,
        H, n, {d}), "float32", strides=(s0, s1, s2, 1), align=4) w = T.match_buffer(w_, ({m}, {d}), "float32",
        align=4) phi = T.match_buffer(phi_, (B, H, {m}, P), "float32", align=4) for b, h, i, p in T.grid(B, H,
        {m}, P):
            with T.sblock("phi"):
                vb, vh, vi, vp = T.axis.remap("SSSS", [b, h, i, p])
                T.reads(x[vb, vh, 0:n, 0:{d}], w[vi, 0:{d}])
                T.writes(phi[vb, vh, vi, vp])
                phi[vb, vh, vi, vp] = T.float32(0)
                if vp < n:
                    for c in range({d}):
                        phi[vb, vh, vi, vp] += (
                            w[vi, c] * x[vb, vh, vp, c] * T.float32({d} ** -0.25)
                            - x[vb, vh, vp, c] * x[vb, vh, vp, c] * T.float32(0.5 * {d} ** -0.5)
                        )
                    phi[vb, vh, vi, vp] = T.exp(phi[vb, vh, vi, vp]) * T.float32({m} ** -0.5)

    @T.prim_func(s_tir=True)
    def features_nprf(x_: T.handle, w_: T.handle, phi_: T.handle):
        T.func_attr({{"global_symbol": "features_nprf", "tirx.noalias": True}}) B = T.int64(); H = T.int64();
        n = T.int64(); P = T.int64(); s0 = T.int64(); s1 = T.int64(); s2 = T.int64() x = T.match_buffer(x_,
        (B, H, n, {d}), "float32", strides=(s0, s1, s2, 1), align=4) w = T.match_buffer(w_, ({m}, {d}),
        "float32", align=4) phi = T.match_buffer(phi_, (B, H, {m}, P), "float32", align=4) for b, h, i, p in
        T.grid(B, H, {m}, P):
            with T.sblock("phi"):
                vb, vh, vi, vp = T.axis.remap("SSSS", [b, h, i, p])
                T.reads(x[vb, vh, 0:n, 0:{d}], w[vi, 0:{d}])
                T.writes(phi[vb, vh, vi, vp])
                square = T.sblock_alloc_buffer((1,), "float32", scope="local")
                phi[vb, vh, vi, vp] = T.float32(0)
                if vp < n:
                    square[0] = T.float32(0)
                    for c in range({d}):
                        square[0] += x[vb, vh, vp, c] * x[vb, vh, vp, c]
                    for c in range({d}):
                        phi[vb, vh, vi, vp] += w[vi, c] * x[vb, vh, vp, c]
                    if square[0] != T.float32(0):
                        phi[vb, vh, vi, vp] = phi[vb, vh, vi, vp] / T.sqrt(square[0])
                    phi[vb, vh, vi, vp] = T.exp(phi[vb, vh, vi, vp] - T.float32(0.5)) * T.float32({m} ** -0.5)

    @T.prim_func(s_tir=True)
    def weights(bias_: T.handle, n_q: T.int64, n_k: T.int64, causal: T.int64, t_: T.handle, table_: T.handle):
        T.func_attr({{"global_symbol": "weights", "tirx.noalias": True}})
        H = T.int64(); L = T.int64(); W = T.int64(); S = T.int64()
        bias = T.match_buffer(bias_, (H, L), "float32", align=4)
        tables = T.match_buffer(t_, (S,), "float32", align=4)
        table = T.match_buffer(table_, (H, W), "float32", align=4)
        for h, t in T.grid(H, L):
            with T.sblock("weight"):
                vh, vt = T.axis.remap("SS", [h, t])
                T.reads(bias[vh, 0:L])
                T.writes(table[vh, vt])
                most = T.sblock_alloc_buffer((1,), "float32", scope="local")
                most[0] = bias[vh, 0]
                for u in range(L):
                    most[0] = T.max(most[0], bias[vh, u])
                table[vh, vt] = T.exp(bias[vh, vt] - most[0])
                if causal != T.int64(0) and vt > n_q - T.int64(1):
                    table[vh, vt] = T.float32(0)

    @T.prim_func(s_tir=True)
    def attention(q_: T.handle, k_: T.handle, v_: T.handle, table_: T.handle, t_: T.handle, out_: T.handle):
        T.func_attr({{"global_symbol": "attention", "tirx.noalias": True}}) B = T.int64(); H = T.int64(); n_q
        = T.int64(); n_k = T.int64(); P = T.int64(); W = T.int64(); S = T.int64() v0 = T.int64(); v1 =
        T.int64(); v2 = T.int64(); o0 = T.int64(); o1 = T.int64(); o2 = T.int64() phi_q = T.match_buffer(q_,
        (B, H, {m}, P), "float32", align=4) phi_k = T.match_buffer(k_, (B, H, {m}, P), "float32", align=4)
        value = T.match_buffer(v_, (B, H, n_k, {d}), "float32", strides=(v0, v1, v2, 1), align=4) table =
        T.match_buffer(table_, (H, W), "float32", align=4) tables = T.match_buffer(t_, (S,), "float32",
        align=4) out = T.match_buffer(out_, (B, H, n_q, {d}), "float32", strides=(o0, o1, o2, 1), align=4) for
        bh in T.parallel(B * H):
            for i in range(n_q):
                with T.sblock("row"):
                    vb = T.axis.spatial(B, bh // H)
                    vh = T.axis.spatial(H, bh % H)
                    vi = T.axis.spatial(n_q, i)
                    T.reads(phi_q[vb, vh, 0:{m}, vi], phi_k[vb, vh, 0:{m}, 0:P], value[vb, vh, 0:n_k, 0:{d}],
                            table[vh, 0:W])
                    T.writes(out[vb, vh, vi, 0:{d}])
                    score = T.sblock_alloc_buffer((n_k,), "float32")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    total[0] = T.float32(0)
                    for j in range(n_k):
                        score[j] = T.float32(0)
                        for f in range({m}):
                            score[j] += phi_q[vb, vh, f, vi] * phi_k[vb, vh, f, j]
                        score[j] = score[j] * table[vh, j - vi + n_q - T.int64(1)]
                        total[0] += score[j]
                    for c in range({d}):
                        out[vb, vh, vi, c] = T.float32(0)
                        for j in range(n_k):
                            out[vb, vh, vi, c] += score[j] * value[vb, vh, j, c]
                        out[vb, vh, vi, c] = out[vb, vh, vi, c] / total[0]
"""


def naive_config(length: int) -> AttentionConfig:
    """The config that goes with `naive_module`."""
    return AttentionConfig(NUM_FEATURES, HEAD_DIM, length, "direct", tile=(1, 1), lanes=8)


def naive_module() -> Any:
    """The four functions of the attention operator as a TVM module, any length."""
    import tvm

    return tvm.script.from_source(_NAIVE_ATTENTION.format(m=NUM_FEATURES, d=HEAD_DIM))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("RPE_TVM_CACHE", str(directory))
    return directory


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled naive operators of lengths 64 and 96 for AVX2, as ``python -m rpe_tvm compile`` lays them
    out."""
    from rpe_tvm import targets
    from rpe_tvm.build import compile as build

    top = tmp_path_factory.mktemp("artefacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RPE_TVM_CACHE", str(tmp_path_factory.mktemp("cache")))
        target = targets.preset("haswell")
        for length in (64, 96):
            config = naive_config(length)
            built = build.compile_module(naive_module(), config.name, config.to_json(), target)
            build.copy_artefact(built, top / config.name / target.id)
    yield top


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a fresh process, with the package on its path."""

    def run(
        code: str, *arguments: str, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run
