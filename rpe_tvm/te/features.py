"""Feature maps of query and key: projection and exp as one expression, positions as lanes, features in rows."""

from __future__ import annotations

from typing import Literal

from tvm import te, tirx

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.te import complex as cx
from rpe_tvm.te.complex import Expr
from rpe_tvm.te.elementary import exp
from rpe_tvm.te.shapes import Sizes

FeatureMap = Literal["prf", "nprf"]
FEATURE_MAPS: tuple[FeatureMap, ...] = ("prf", "nprf")


def features(config: AttentionConfig, sizes: Sizes, feature_map: FeatureMap) -> list[te.Tensor]:
    """Return the arguments of a feature map, the output last.

    PRF: phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m) with x' = x / d^(1/4). NPRF: the same with x' = x / |x|, where
    |x'|^2 / 2 = 1/2; a zero vector stays zero. Source: Luo et al. 2021, Eq. 5 and Algorithm 1.

    Parameters
    ----------
    config : AttentionConfig
        Gives the number of features m and the head dimension d.
    sizes : Sizes
        Batch, heads, `n_query` positions, blocks of 64 positions of the output.
    feature_map : {"prf", "nprf"}
        Which map.

    Returns
    -------
    list of te.Tensor
        x `[B, H, n, d]`, projection W `[m, d]`, phi `[B, H, m, blocks, 64]`, zero from position n on.
    """
    m, d = config.num_features, config.head_dim
    batch, heads, n = sizes.batch, sizes.heads, sizes.n_query
    x = te.placeholder((batch, heads, n, cx.int64(d)), cx.FLOAT, "x")
    projection = te.placeholder((cx.int64(m), cx.int64(d)), cx.FLOAT, "projection")
    blocks = sizes.blocks

    def transpose(b: Expr, h: Expr, block: Expr, k: Expr, i: Expr) -> Expr:
        # past the end the last position again: a bound instead of a branch; `activate` makes zeros of them
        return x[b, h, tirx.min(block * BLOCK + i, n - 1), k]

    columns = cx.compute((batch, heads, blocks, d, BLOCK), transpose, "columns")
    k = te.reduce_axis((cx.int64(0), cx.int64(d)), "k")
    square = cx.compute(
        (batch, heads, blocks, BLOCK),
        lambda b, h, block, i: te.sum(columns[b, h, block, k, i] * columns[b, h, block, k, i], axis=k),
        "square",
    )
    k2 = te.reduce_axis((cx.int64(0), cx.int64(d)), "k")
    logits = cx.compute(
        (batch, heads, blocks, m, BLOCK),
        lambda b, h, block, f, i: te.sum(projection[f, k2] * columns[b, h, block, k2, i], axis=k2),
        "logits",
    )

    def activate(b: Expr, h: Expr, f: Expr, block: Expr, i: Expr) -> Expr:
        at = (b, h, block)
        position = block * BLOCK + i
        norm, logit = square[(*at, i)], logits[(*at, f, i)]
        if feature_map == "prf":
            exponent = logit * cx.real(d**-0.25) - norm * cx.real(0.5 * d**-0.5)
        else:
            exponent = logit * tirx.Select(norm > 0, cx.real(1.0) / tirx.sqrt(norm), norm) - cx.real(0.5)
        return tirx.Select(position < n, exp(exponent) * cx.real(m**-0.5), cx.real(0.0))

    phi = cx.compute((batch, heads, m, blocks, BLOCK), activate, "phi")
    return [x, projection, phi]
