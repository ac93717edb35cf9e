from __future__ import annotations

import pytest
import torch

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch import gaussian_projection, orthogonal_projection, sphere_projection
from rpe_tvm.torch.projection import draw_projection

DRAWS = {"gaussian": gaussian_projection, "orthogonal": orthogonal_projection, "sphere": sphere_projection}
ALL = pytest.mark.parametrize("make", DRAWS.values())


@ALL
@pytest.mark.parametrize(("m", "d"), [(1, 1), (16, 64), (64, 40), (81, 40), (24, 80)])
def test_shape_dtype_and_seed(make, m, d):
    w = make(m, d, seed=3)
    assert w.shape == (m, d) and w.dtype == torch.float32 and w.is_contiguous()
    assert torch.equal(w, make(m, d, seed=3))
    assert not torch.equal(w, make(m, d, seed=4))
    assert torch.equal(w, make(m, d, generator=torch.Generator().manual_seed(3)))


@ALL
def test_a_seed_leaves_the_default_generator_alone(make):
    state = torch.get_rng_state()
    make(8, 8, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    first = make(8, 8)
    torch.manual_seed(1)
    assert torch.equal(first, make(8, 8))


@pytest.mark.parametrize("make", [gaussian_projection, orthogonal_projection])
def test_rows_are_standard_normal(make):
    w = make(20000, 8, seed=0).double()
    assert w.mean().abs() < 0.01
    assert (w.T @ w / 20000 - torch.eye(8)).abs().max() < 0.05
    assert (w.pow(4).mean() - 3).abs() < 0.1


def test_rows_of_the_sphere_are_uniform():
    w = sphere_projection(20000, 8, seed=0).double()
    torch.testing.assert_close(w.norm(dim=1), torch.full((20000,), 8.0**0.5).double(), rtol=1e-6, atol=0)
    assert w.mean().abs() < 0.01
    assert (w.T @ w / 20000 - torch.eye(8)).abs().max() < 0.05
    # E[u^4] of one coordinate of a uniform unit vector is 3 / (d (d + 2)).
    assert (w.pow(4).mean() - 64 * 3 / (8 * 10)).abs() < 0.1


@pytest.mark.parametrize("kind", DRAWS)
def test_a_draw_by_its_name(kind):
    drawn = draw_projection(kind, 5, 4, torch.Generator().manual_seed(2))
    assert torch.equal(drawn, DRAWS[kind](5, 4, seed=2))


def test_an_unknown_draw_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="Unknown projection 'ball': expected one of 'gaussian', 'orthogonal', 'sphe"):
        draw_projection("ball", 5, 4, torch.Generator())


def test_blocks_of_rows_are_orthogonal():
    w = orthogonal_projection(100, 40, seed=0).double()
    for start in (0, 40, 80):
        rows = w[start : start + 40]
        rows = rows / rows.norm(dim=1, keepdim=True)
        assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 1e-6


@ALL
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8)])
def test_sizes_are_checked(make, sizes):
    with pytest.raises(ShapeError, match="expected a positive integer"):
        make(*sizes)


@ALL
def test_seed_and_generator_exclude_each_other(make):
    with pytest.raises(ValueError, match="at most one of seed and generator"):
        make(8, 8, seed=0, generator=torch.Generator())
