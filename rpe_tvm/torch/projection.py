"""Random projections W and the feature maps that use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rpe_tvm.errors import DTypeError, ShapeError


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


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A feature map phi with its projection W, shared by all heads.

    Parameters
    ----------
    projection : Tensor
        W, ``[m, d]``, float32. See `gaussian_projection` and `orthogonal_projection`.
    """

    projection: Tensor
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if type(self) is FeatureMap:
            raise TypeError(f"FeatureMap is a base class: use one of {known_feature_maps()}.")
        kind = type(self).__name__
        if not isinstance(self.projection, Tensor):
            raise TypeError(
                f"Invalid projection of {kind}: expected a torch.Tensor [m, d], got "
                f"{type(self.projection).__name__}. gaussian_projection(m, d) makes one."
            )
        if self.projection.dim() != 2 or 0 in self.projection.shape:
            raise ShapeError(
                f"Invalid shape of the projection of {kind}: expected [num_features, head_dim], got "
                f"{list(self.projection.shape)}."
            )
        if self.projection.dtype != torch.float32:
            raise DTypeError(
                f"Invalid dtype of the projection of {kind}: expected torch.float32, got "
                f"{self.projection.dtype}. Convert it with .float()."
            )

    @property
    def num_features(self) -> int:
        """Number of features m."""
        return self.projection.shape[0]

    @property
    def head_dim(self) -> int:
        """Size d of the vectors that the map takes."""
        return self.projection.shape[1]


class PRF(FeatureMap):
    """Positive random features: ``phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m)``, ``x' = x / d^(1/4)``.

    Luo 2021, Eq. 5; the scaling makes ``phi(q) . phi(k)`` an estimate of ``exp(q . k / sqrt(d))``.
    """

    name = "prf"


class NPRF(FeatureMap):
    """Normalised positive random features: ``phi(x) = exp(W x^ - 1/2) / sqrt(m)``, ``x^ = x / |x|_2``.

    Luo 2021, Algorithm 1. A zero vector stays zero under the normalisation.
    """

    name = "nprf"


_FEATURE_MAPS: dict[str, type[FeatureMap]] = {cls.name: cls for cls in (PRF, NPRF)}


def known_feature_maps() -> tuple[str, ...]:
    """Names of the feature maps, in the order of the documentation."""
    return tuple(_FEATURE_MAPS)


def make_feature_map(name: str, projection: Tensor) -> FeatureMap:
    """The feature map called ``name`` with this projection.

    Parameters
    ----------
    name : str
        ``"prf"`` or ``"nprf"``.
    projection : Tensor
        W, ``[m, d]``, float32.
    """
    check_feature_map(name)
    return _FEATURE_MAPS[name](projection)


def check_feature_map(name: object) -> None:
    """Raise ``ValueError`` with the known names unless ``name`` is one of them."""
    if name not in _FEATURE_MAPS:
        known = ", ".join(repr(known) for known in _FEATURE_MAPS)
        raise ValueError(f"Unknown feature map {name!r}: expected one of {known}.")
