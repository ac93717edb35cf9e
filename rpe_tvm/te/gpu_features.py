"""Feature maps of query and key on GPUs: one thread for each position, a row of positions for each feature."""

from __future__ import annotations

from typing import Literal, Protocol

from tvm import te, tirx

from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.shapes import Sizes

FeatureMap = Literal["prf", "nprf"]
FEATURE_MAPS: tuple[FeatureMap, ...] = ("prf", "nprf")


class FeatureSizes(Protocol):
    """What a config says of its features: m, d, the positions P of phi, and the dtype of query and key."""

    @property
    def num_features(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def dtype(self) -> str: ...


def features(config: FeatureSizes, sizes: Sizes, feature_map: FeatureMap) -> list[te.Tensor]:
    """Return the arguments of a feature map of queries and keys, the outputs last.

    PRF: phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m) with x' = x / d^(1/4). NPRF: the same with x' = x / |x|, where
    |x'|^2 / 2 = 1/2; a zero vector stays zero. Source: Luo et al. 2021, Eq. 5 and Algorithm 1.

    Returns
    -------
    list of te.Tensor
        query `[B, H, n_q, d]`, key `[B, H, n_k, d]`, projection W `[m, d]`, phi_q and phi_k `[B, H, m, P]`, zero from
        position n on.
    """
    d = cx.int64(config.head_dim)
    projection = te.placeholder((cx.int64(config.num_features), d), cx.FLOAT, "projection")
    query, key = (
        te.placeholder((sizes.batch, sizes.heads, n, d), config.dtype, name)
        for name, n in (("query", sizes.n_query), ("key", sizes.n_key))
    )
    phi_q = _features(config, sizes, feature_map, query, projection, "q")
    phi_k = _features(config, sizes, feature_map, key, projection, "k")
    return [query, key, projection, phi_q, phi_k]


def _features(
    config: FeatureSizes,
    sizes: Sizes,
    feature_map: FeatureMap,
    x: te.Tensor,
    projection: te.Tensor,
    name: str,
) -> te.Tensor:
    m, d, length = config.num_features, config.head_dim, config.length
    batch, heads, n = sizes.batch, sizes.heads, x.shape[2]
    # past the end the last position again: a bound instead of a branch; `phi` has zeros there
    row = cx.compute(
        (batch, heads, length, d),
        lambda b, h, i, k: x[b, h, tirx.min(i, n - 1), k].astype(cx.FLOAT),
        f"row_{name}",
    )
    k = te.reduce_axis((cx.int64(0), cx.int64(d)), "k")
    norm = cx.compute((batch, heads, length), lambda *at: te.sum(row[(*at, k)] * row[(*at, k)], axis=k), f"norm_{name}")
    k2 = te.reduce_axis((cx.int64(0), cx.int64(d)), "k")
    logits = cx.compute(
        (batch, heads, m, length),
        lambda b, h, f, i: te.sum(row[b, h, i, k2] * projection[f, k2], axis=k2),
        f"logits_{name}",
    )
    if feature_map == "prf":
        scale = cx.compute(norm.shape, lambda *at: norm[at] * cx.real(-0.5 * d**-0.5), f"scale_{name}")
    else:
        scale = cx.compute(
            norm.shape,
            lambda *at: tirx.Select(norm[at] > 0, cx.real(1.0) / tirx.sqrt(norm[at]), norm[at]),
            f"scale_{name}",
        )

    def activate(b: Expr, h: Expr, f: Expr, i: Expr) -> Expr:
        logit = logits[b, h, f, i]
        if feature_map == "prf":
            exponent = logit * cx.real(d**-0.25) + scale[b, h, i]
        else:
            exponent = logit * scale[b, h, i] - cx.real(0.5)
        return tirx.Select(i < n, tirx.exp(exponent) * cx.real(m**-0.5), cx.real(0.0))

    return cx.compute((batch, heads, m, length), activate, f"phi_{name}")
