"""Random projections W, the draws that feature maps use."""

from __future__ import annotations

import torch
from torch import Tensor

from rpe_tvm.errors import ShapeError


def _generator(seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    if seed is not None and generator is not None:
        raise ValueError("Expected at most one of seed and generator, got both: drop one of them.")
    if seed is not None:
        return torch.Generator().manual_seed(seed)
    return generator


def _check_sizes(num_features: int, head_dim: int) -> None:
    for name, size in (("num_features", num_features), ("head_dim", head_dim)):
        if size < 1:
            raise ShapeError(f"Invalid {name}: expected a positive integer, got {size}.")


def gaussian_projection(
    num_features: int, head_dim: int, *, seed: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Rows drawn independently from N(0, I) (Luo 2021, Eqs. 4 and 5).

    Parameters
    ----------
    num_features : int
        Number of rows, m.
    head_dim : int
        Number of columns, d.
    seed : int, optional
        Seed of a generator of its own. With neither ``seed`` nor ``generator``, torch's default generator is
        used.
    generator : torch.Generator, optional
        A CPU generator to draw from.

    Returns
    -------
    Tensor
        ``[m, d]``, float32, on the CPU.
    """
    _check_sizes(num_features, head_dim)
    rows = torch.randn(num_features, head_dim, dtype=torch.float64, device="cpu", generator=_generator(seed, generator))
    return rows.to(torch.float32)


def orthogonal_projection(
    num_features: int, head_dim: int, *, seed: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Rows that are orthogonal within every block of d, each still distributed as N(0, I).

    Orthogonal random features (the ORF of Luo 2021; Choromanski 2021, section 2.4): directions from a
    uniformly distributed orthogonal matrix per block, lengths from independent Gaussian vectors (a chi
    distribution with d degrees of freedom). They estimate the same kernel as `gaussian_projection`, with less
    variance.

    Parameters
    ----------
    num_features : int
        Number of rows, m. The last block is cut where m is no multiple of d.
    head_dim : int
        Number of columns, d.
    seed, generator : optional
        As in `gaussian_projection`.

    Returns
    -------
    Tensor
        ``[m, d]``, float32, on the CPU.
    """
    _check_sizes(num_features, head_dim)
    source = _generator(seed, generator)
    blocks = -(-num_features // head_dim)
    gauss = torch.randn(blocks, head_dim, head_dim, dtype=torch.float64, device="cpu", generator=source)
    q, r = torch.linalg.qr(gauss)
    # QR fixes signs as it likes; a positive diagonal of R makes q uniformly distributed.
    signs = torch.diagonal(r, dim1=-2, dim2=-1).sign()
    directions: Tensor = (q * signs.unsqueeze(-2)).mT.reshape(blocks * head_dim, head_dim)
    gauss = torch.randn(num_features, head_dim, dtype=torch.float64, device="cpu", generator=source)
    lengths: Tensor = torch.linalg.vector_norm(gauss, dim=1, keepdim=True)
    return (directions[:num_features] * lengths).to(torch.float32)


def sphere_projection(
    num_features: int, head_dim: int, *, seed: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Rows drawn independently and uniformly from the sphere of radius sqrt(d) (Sphere-PRF of Luo 2021).

    The rows have the covariance of N(0, I), but no long ones among them: features vary less, and estimate the kernel
    with a bias that vanishes as d grows.

    Parameters
    ----------
    num_features : int
        Number of rows, m.
    head_dim : int
        Number of columns, d.
    seed, generator : optional
        As in `gaussian_projection`.

    Returns
    -------
    Tensor
        ``[m, d]``, float32, on the CPU.
    """
    _check_sizes(num_features, head_dim)
    gauss = torch.randn(
        num_features, head_dim, dtype=torch.float64, device="cpu", generator=_generator(seed, generator)
    )
    lengths: Tensor = torch.linalg.vector_norm(gauss, dim=1, keepdim=True)
    rows: Tensor = gauss / lengths * head_dim**0.5
    return rows.to(torch.float32)


_DRAWS = {"gaussian": gaussian_projection, "orthogonal": orthogonal_projection, "sphere": sphere_projection}


def draw_projection(kind: str, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """A projection ``[m, d]`` of the kind ``"gaussian"``, ``"orthogonal"`` or ``"sphere"``.

    Raises
    ------
    ValueError
        If there is no such kind.
    ShapeError
        If m or d is less than 1.
    """
    if kind not in _DRAWS:
        known = ", ".join(repr(known) for known in _DRAWS)
        raise ValueError(f"Unknown projection {kind!r}: expected one of {known}.")
    return _DRAWS[kind](num_features, head_dim, generator=generator)
