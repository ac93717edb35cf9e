"""Feature maps phi: each takes query and key, and gives phi(query) and phi(key)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from rpe_tvm.errors import DTypeError, ShapeError

FeatureMapFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``[B, H, n_q, d], [B, H, n_k, d] -> [B, H, n_q, m], [B, H, n_k, m]``, differentiable."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A feature map phi with its projection W, shared by all heads. Called with query and key, it is plain torch.

    Parameters
    ----------
    projection : Tensor
        W, ``[m, d]``, float32, bfloat16 or float16; an ``nn.Parameter`` is learned. See `gaussian_projection`,
        `orthogonal_projection` and `sphere_projection`.

    Raises
    ------
    TypeError, ShapeError, DTypeError
        If the projection is no such tensor.
    """

    projection: Tensor
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if type(self) is FeatureMap:
            raise TypeError(f"FeatureMap is a base class: use one of {known_feature_maps()}.")
        _check_projection(type(self).__name__, self.projection)

    @property
    def num_features(self) -> int:
        """Number of rows m of the projection."""
        return self.projection.shape[0]

    @property
    def head_dim(self) -> int:
        """Size d of the vectors that the map takes."""
        return self.projection.shape[1]

    def phi(self, x: Tensor) -> Tensor:
        """The features of the vectors x, ``[..., n, d]``, in the dtype of x."""
        raise NotImplementedError

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``phi(query)`` and ``phi(key)``: ``[..., n, d] -> [..., n, m]``."""
        _check_vectors(query, key, self.head_dim)
        return self.phi(query), self.phi(key)


class PRF(FeatureMap):
    """Positive random features: ``phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m)``, ``x' = x / d^(1/4)``.

    Luo 2021, Eq. 5; the scaling makes ``phi(q) . phi(k)`` an estimate of ``exp(q . k / sqrt(d))``.
    """

    name = "prf"

    def phi(self, x: Tensor) -> Tensor:
        x = x * self.head_dim**-0.25
        phi: Tensor = torch.exp(_project(x, self.projection) - _half_square(x)) * self.num_features**-0.5
        return phi


class NPRF(FeatureMap):
    """Normalised positive random features: ``phi(x) = exp(W x^ - 1/2) / sqrt(m)``, ``x^ = x / |x|_2``.

    Luo 2021, Algorithm 1. A zero vector stays zero under the normalisation, and its gradient is zero.
    """

    name = "nprf"

    def phi(self, x: Tensor) -> Tensor:
        phi: Tensor = torch.exp(_project(_normalised(x), self.projection) - 0.5) * self.num_features**-0.5
        return phi


class TRF(FeatureMap):
    """Trigonometric random features: ``phi(x) = exp(|x'|^2 / 2) / sqrt(m) [sin(W x'), cos(W x')]``, 2m features.

    Luo 2021, Eq. 4, with ``x' = x / d^(1/4)`` as in `PRF`: ``phi(q) . phi(k)`` estimates ``exp(q . k / sqrt(d))``.

    Notes
    -----
    Features have both signs, so a denominator may be near 0 or negative, and a row of the output huge. The factor
    leaves float32 where ``|x|^2 > 176 sqrt(d)``.
    """

    name = "trf"

    def phi(self, x: Tensor) -> Tensor:
        x = x * self.head_dim**-0.25
        phi: Tensor = _sin_cos(_project(x, self.projection)) * torch.exp(_half_square(x)) * self.num_features**-0.5
        return phi


def elu_features(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """``phi(x) = elu(x) + 1``, elementwise, m = d (Katharopoulos et al. 2020, arXiv 2006.16236, Eq. 7)."""
    return nn.functional.elu(query) + 1.0, nn.functional.elu(key) + 1.0


def relu_features(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """``phi(x) = relu(x) + 0.001``, elementwise, m = d (the ReLU kernel of Choromanski et al. 2021, arXiv 2009.14794).

    The summand keeps the denominator of a query without positive entries from being 0.
    """
    return nn.functional.relu(query) + 1e-3, nn.functional.relu(key) + 1e-3


def sikf_features(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """``phi(q) = exp(q - max q)``, ``phi(k) = exp(k - max k)``, elementwise, m = d: a shift-invariant kernel.

    SIKF of FastRPB (Zubkov and Gavrilov 2022, arXiv 2202.11364), whose code subtracts a mean instead. The maximum of q
    is taken over the channels of one query, that of k over all positions and channels of a head. Both cancel in
    attention's output; they keep exp from overflowing.

    Notes
    -----
    The shifts are constants to autograd: gradients are those of attention's output, where the shifts have none.
    """
    largest_q = query.detach().amax(-1, keepdim=True)
    largest_k = key.detach().amax((-2, -1), keepdim=True) if key.shape[-2] else 0.0
    return torch.exp(query - largest_q), torch.exp(key - largest_k)


class T2R(nn.Module):
    """Learned features: ``phi(x) = relu(W x + b)`` per head, one map for queries and keys.

    Kasai et al. 2021, arXiv 2103.13076.

    Parameters
    ----------
    num_heads, head_dim, num_features : int
        H, d and m.

    Attributes
    ----------
    weight, bias : nn.Parameter
        W ``[H, m, d]`` and b ``[H, m]``, drawn as those of ``nn.Linear`` are, from torch's default generator.

    Raises
    ------
    ShapeError
        If a size is less than 1.

    Notes
    -----
    All features of a query can be 0; its row of the output is then 0 and passes no gradient.
    """

    def __init__(self, num_heads: int, head_dim: int, num_features: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads, head_dim=head_dim, num_features=num_features)
        self.weight = nn.Parameter(torch.empty(num_heads, num_features, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, num_features))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(head_dim**-0.5), head_dim**-0.5)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``phi(query)`` and ``phi(key)``: ``[B, H, n, d] -> [B, H, n, m]``."""
        _check_heads(query, key, self.weight.shape[0], self.weight.shape[2])
        return self._phi(query), self._phi(key)

    def _phi(self, x: Tensor) -> Tensor:
        return torch.relu(_project(x, self.weight) + self.bias.to(x.dtype).unsqueeze(-2))

    def extra_repr(self) -> str:
        """The arguments that the map was made with."""
        num_heads, num_features, head_dim = self.weight.shape
        return f"num_heads={num_heads}, head_dim={head_dim}, num_features={num_features}"


class RFA(nn.Module):
    """Random feature attention's map: ``phi(x) = [sin(W (s * x^)), cos(W (s * x^))] / sqrt(m)``, 2m features.

    Peng et al. 2021, arXiv 2103.02143; ``x^ = x / |x|_2``, and s is learned per head. With rows of W drawn from
    N(0, I), ``phi(q) . phi(k)`` estimates ``exp(-|s * (q^ - k^)|^2 / 2)``; with s = 1 that is ``exp(q^ . k^)`` up to a
    factor that cancels. A zero vector stays zero under the normalisation, and its gradient is zero.

    Parameters
    ----------
    num_heads : int
        H.
    projection : Tensor
        W, ``[m, d]``; a buffer, stored in the state dict.

    Attributes
    ----------
    scale : nn.Parameter
        s, ``[H, d]``, ones at first.

    Raises
    ------
    TypeError, ShapeError, DTypeError
        If the projection is no tensor ``[m, d]`` of float32, bfloat16 or float16, or num_heads is less than 1.

    Notes
    -----
    Features have both signs, so a denominator may be near 0 or negative, and a row of the output huge.
    """

    projection: Tensor

    def __init__(self, num_heads: int, projection: Tensor) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads)
        _check_projection("RFA", projection)
        self.register_buffer("projection", projection)
        self.scale = nn.Parameter(torch.ones(num_heads, projection.shape[1]))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """``phi(query)`` and ``phi(key)``: ``[B, H, n, d] -> [B, H, n, 2m]``."""
        _check_heads(query, key, self.scale.shape[0], self.scale.shape[1])
        return self._phi(query), self._phi(key)

    def _phi(self, x: Tensor) -> Tensor:
        scaled = _normalised(x) * self.scale.to(x.dtype).unsqueeze(-2)
        phi: Tensor = _sin_cos(_project(scaled, self.projection)) * self.projection.shape[0] ** -0.5
        return phi

    def extra_repr(self) -> str:
        """The sizes of the map."""
        num_features, head_dim = self.projection.shape
        return f"num_heads={self.scale.shape[0]}, head_dim={head_dim}, projection of {num_features} rows"


_FEATURE_MAPS: dict[str, type[FeatureMap]] = {cls.name: cls for cls in (PRF, NPRF, TRF)}
COMPILED = (PRF, NPRF)


def known_feature_maps() -> tuple[str, ...]:
    """Names of the feature maps that are made of a projection alone, in the order of the documentation."""
    return tuple(_FEATURE_MAPS)


def make_feature_map(name: str, projection: Tensor) -> FeatureMap:
    """The feature map called ``name`` with this projection.

    Parameters
    ----------
    name : str
        ``"prf"``, ``"nprf"`` or ``"trf"``.
    projection : Tensor
        W, ``[m, d]``.

    Raises
    ------
    ValueError
        If there is no such feature map.
    """
    if name not in _FEATURE_MAPS:
        known = ", ".join(repr(known) for known in _FEATURE_MAPS)
        raise ValueError(f"Unknown feature map {name!r}: expected one of {known}.")
    return _FEATURE_MAPS[name](projection)


def check_feature_map(name: object) -> None:
    """Raise ``ValueError`` unless there is a compiled kernel for the feature map of this name."""
    names = [kind.name for kind in COMPILED]
    if name not in names:
        raise ValueError(f"Unknown feature map {name!r}: expected one of {', '.join(map(repr, names))}.")


def _project(x: Tensor, projection: Tensor) -> Tensor:
    return x @ projection.to(x.dtype).mT


def _half_square(x: Tensor) -> Tensor:
    half: Tensor = 0.5 * x.square().sum(-1, keepdim=True)
    return half


def _sin_cos(x: Tensor) -> Tensor:
    return torch.cat([torch.sin(x), torch.cos(x)], -1)


def _normalised(x: Tensor) -> Tensor:
    """``x / |x|``; 0, with gradient 0, where x is 0 (nn.functional.normalize has a gradient of 1e12 there)."""
    # First by the largest entry: squares of large or tiny numbers leave the range of float32.
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / largest.masked_fill(largest == 0, 1.0)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    is_zero = norm == 0
    unit: Tensor = x / norm.masked_fill(is_zero, 1.0)
    return unit.masked_fill(is_zero, 0.0)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ShapeError(f"Invalid {name}: expected a positive integer, got {size}.")


def _check_projection(kind: str, projection: object) -> None:
    if not isinstance(projection, Tensor):
        raise TypeError(
            f"Invalid projection of {kind}: expected a torch.Tensor [m, d], got {type(projection).__name__}. "
            "gaussian_projection(m, d) makes one."
        )
    if projection.dim() != 2 or 0 in projection.shape:
        raise ShapeError(
            f"Invalid shape of the projection of {kind}: expected [num_features, head_dim], got "
            f"{list(projection.shape)}."
        )
    if projection.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DTypeError(
            f"Invalid dtype of the projection of {kind}: expected torch.float32, torch.bfloat16 or torch.float16, "
            f"got {projection.dtype}. Convert it with .float()."
        )


def _check_vectors(query: Tensor, key: Tensor, head_dim: int) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.dim() < 2 or x.shape[-1] != head_dim:
            raise ShapeError(
                f"Invalid shape of {name}: expected [..., n, {head_dim}] as the feature map's projection asks, got "
                f"{list(x.shape)}."
            )


def _check_heads(query: Tensor, key: Tensor, num_heads: int, head_dim: int) -> None:
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 4 or x.shape[1] != num_heads or x.shape[3] != head_dim:
            raise ShapeError(
                f"Invalid shape of {name}: expected [B, {num_heads}, n, {head_dim}] as the feature map's parameters "
                f"ask, got {list(x.shape)}."
            )
