from __future__ import annotations

import pickle

import pytest
import torch

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch import (
    NPRF,
    PRF,
    FeatureMap,
    gaussian_projection,
    make_feature_map,
    orthogonal_projection,
)

BOTH = pytest.mark.parametrize("make", [gaussian_projection, orthogonal_projection])


@BOTH
@pytest.mark.parametrize(("m", "d"), [(1, 1), (16, 64), (64, 40), (81, 40), (24, 80)])
def test_shape_dtype_and_seed(make, m, d):
    w = make(m, d, seed=3)
    assert w.shape == (m, d) and w.dtype == torch.float32 and w.is_contiguous()
    assert torch.equal(w, make(m, d, seed=3))
    assert not torch.equal(w, make(m, d, seed=4))
    assert torch.equal(w, make(m, d, generator=torch.Generator().manual_seed(3)))


@BOTH
def test_a_seed_leaves_the_default_generator_alone(make):
    state = torch.get_rng_state()
    make(8, 8, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    first = make(8, 8)
    torch.manual_seed(1)
    assert torch.equal(first, make(8, 8))


@BOTH
def test_rows_are_standard_normal(make):
    w = make(20000, 8, seed=0).double()
    assert w.mean().abs() < 0.01
    assert (w.T @ w / 20000 - torch.eye(8)).abs().max() < 0.05
    assert (w.pow(4).mean() - 3).abs() < 0.1


def test_blocks_of_rows_are_orthogonal():
    w = orthogonal_projection(100, 40, seed=0).double()
    for start in (0, 40, 80):
        rows = w[start : start + 40]
        rows = rows / rows.norm(dim=1, keepdim=True)
        assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-6


@BOTH
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8)])
def test_sizes_are_checked(make, sizes):
    with pytest.raises(ShapeError, match="expected a positive integer"):
        make(*sizes)


@BOTH
def test_seed_and_generator_exclude_each_other(make):
    with pytest.raises(ValueError, match="at most one of seed and generator"):
        make(8, 8, seed=0, generator=torch.Generator())


def test_feature_maps():
    w = gaussian_projection(16, 8, seed=0)
    assert (PRF(w).name, NPRF(w).name) == ("prf", "nprf")
    assert PRF(w).num_features == 16 and PRF(w).head_dim == 8
    assert type(make_feature_map("nprf", w)) is NPRF
    assert torch.equal(pickle.loads(pickle.dumps(PRF(w))).projection, w)
    with pytest.raises(AttributeError):
        PRF(w).projection = w


def test_an_unknown_feature_map_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown feature map 'relu': expected one of 'prf', 'nprf'"):
        make_feature_map("relu", torch.zeros(2, 2))
    with pytest.raises(TypeError, match="base class"):
        FeatureMap(torch.zeros(2, 2))


def test_projections_are_checked():
    with pytest.raises(ShapeError, match=r"expected \[num_features, head_dim\], got \[3\]"):
        PRF(torch.zeros(3))
    with pytest.raises(DTypeError, match=r"expected torch.float32, got torch.float64"):
        NPRF(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="expected a torch.Tensor"):
        NPRF([[1.0]])
