"""The schedule of Toeplitz products for AVX2, for this CPU, and with all threads on one product."""

from dataclasses import replace

import numpy as np
import pytest

from rpe_tvm import build, reference, runtime, targets
from rpe_tvm.errors import ArtefactError
from rpe_tvm.plan.toeplitz import ToeplitzConfig
from rpe_tvm.schedules import of_machine, x86

pytestmark = pytest.mark.compile

AVX2 = targets.preset("haswell")


def check(operator):
    random = np.random.default_rng(0)
    d, n = operator.config.head_dim, operator.config.length
    n_out = n - 5
    weights = random.standard_normal((3, n_out + n - 1)).astype("f4")
    x, grad = (random.standard_normal((2, 3, size, d)).astype("f4") for size in (n, n_out))
    out, sums = np.full((2, 3, n_out, d), np.nan, "f4"), np.full((2, 3, 2, n, 2), np.nan, "f4")
    operator.matmul(weights, x, out)
    expected = reference.toeplitz_dense(weights, x, n_out)
    assert np.linalg.norm(out - expected) < 1e-6 * np.linalg.norm(expected)
    operator.correlation(grad, x, sums)
    assert np.isfinite(sums).all()
    # by Parseval, sum of g_i^2 over i is the correlation's offset 0; so is the mean of both parities' spectra
    operator.correlation(x, x, sums)
    spectrum = sums[..., 0].astype("f8").sum((2, 3)) / (2 * n)
    np.testing.assert_allclose(spectrum, (x.astype("f8") ** 2).sum((2, 3)), rtol=1e-5)


@pytest.mark.parametrize(("d", "lanes"), [(32, 8), (5, 4)])
def test_values(d, lanes):
    config = ToeplitzConfig(d, 64, (4, 2), (8,), lanes)
    check(runtime.load_toeplitz(build.compile_operator(config, AVX2)))


def test_all_threads_work_on_one_product(monkeypatch):
    monkeypatch.setitem(of_machine._SCHEDULES, "x86_64", replace(x86.SCHEDULES, task_floats=0))
    check(runtime.load_toeplitz(build.compile_operator(ToeplitzConfig(32, 16, (4,), (4,), 8), AVX2)))


def test_both_operators_in_one_directory(artefacts, tmp_path, monkeypatch):
    from rpe_tvm.torch import dispatch, use_artefacts

    top = tmp_path / "both"
    config = ToeplitzConfig(5, 64, (4, 2), (8,), 4)
    build.export(config, AVX2, top)
    with pytest.raises(ArtefactError, match="No compiled operator 'attention'"):
        runtime.load(top)
    for name in ("attention-m3-d8-n64", "attention-m3-d8-n96"):
        (top / name).symlink_to(artefacts / name)
    assert runtime.load(top).lengths == (64, 96)
    assert runtime.load_toeplitz(top).config == config

    monkeypatch.setattr(dispatch, "_compiled", lambda kind, bucket: pytest.fail("compiled"))
    use_artefacts(top)
    try:
        assert dispatch.get_toeplitz(60, 5).config == config
        assert dispatch.get_operator(60, 3, 8).config.length == 64
    finally:
        use_artefacts(None)
