"""What the benchmark compares with, in plain torch: the papers' formula through torch.fft, and softmax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F


def torch_fft_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpe_bias: torch.Tensor,
    projection: torch.Tensor,
    feature_map: Literal["nprf", "prf"] = "nprf",
    is_causal: bool = False,
    chunk: int | None = None,
) -> torch.Tensor:
    """Kernelized attention with relative positional encoding as the papers write it, through torch.fft.

    Parameters
    ----------
    query
        `[B, H, n_q, d]`.
    key
        `[B, H, n_k, d]`.
    value
        `[B, H, n_k, d_v]`.
    rpe_bias
        `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1.
    projection
        `[m, d]`.
    feature_map
        `"nprf"` or `"prf"`.
    is_causal
        Whether query i sees keys j <= i only.
    chunk
        How many features are transformed at a time, for a leaner and faster form than the papers' code has. None:
        the formula as published, which holds several arrays of `[B, H, n, m d_v]`: `torch_fft_bytes` says how much.

    Returns
    -------
    Tensor
        `[B, H, n_q, d_v]`.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Algorithm 1: D1 = FFTMatrixMul(c, A1), A1 of shape `[n, m d_v]`, transformed
    along n. With `chunk`: over the contiguous axis, and in place where torch allows.
    """
    if chunk is None:
        return _published_formula(query, key, value, rpe_bias, projection, feature_map, is_causal)
    n_q, n_k = query.shape[2], key.shape[2]
    size = fft_length(n_q + n_k - 1)
    spectrum = _spectrum(rpe_bias, n_q, size, is_causal)[:, None]

    def toeplitz(x: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        full: torch.Tensor = torch.fft.irfft(torch.fft.rfft(x, size).mul_(spectrum), size)
        return full[..., :n_q]

    phi_q = _features(query, projection, feature_map).mT.contiguous()
    phi_k = _features(key, projection, feature_map).mT.contiguous()
    den = (phi_q * toeplitz(phi_k, spectrum)).sum(dim=2, keepdim=True)

    phi_q, phi_k, value = phi_q[:, :, :, None], phi_k[:, :, :, None], value.mT[:, :, None].contiguous()
    num = query.new_zeros(())
    for start in range(0, phi_q.shape[2], chunk):
        some = slice(start, start + chunk)
        products = toeplitz(phi_k[:, :, some] * value, spectrum[:, None])
        num = num + products.mul_(phi_q[:, :, some]).sum(dim=2)
    return (num / den).mT


def _published_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rpe_bias: torch.Tensor,
    projection: torch.Tensor,
    feature_map: Literal["nprf", "prf"],
    is_causal: bool,
) -> torch.Tensor:
    n_q, n_k = query.shape[2], key.shape[2]
    size = fft_length(n_q + n_k - 1)
    spectrum = _spectrum(rpe_bias, n_q, size, is_causal)[..., None]

    def fft_matrix_mul(x: torch.Tensor) -> torch.Tensor:
        full: torch.Tensor = torch.fft.irfft(torch.fft.rfft(x, size, dim=-2) * spectrum, size, dim=-2)
        return full[..., :n_q, :]

    phi_q, phi_k = _features(query, projection, feature_map), _features(key, projection, feature_map)
    products = (phi_k[..., None] * value[..., None, :]).flatten(-2)
    d1 = fft_matrix_mul(products).reshape(*phi_q.shape, value.shape[-1])
    d2 = fft_matrix_mul(phi_k)
    num = torch.einsum("bhnm,bhnmd->bhnd", phi_q, d1)
    return num / (phi_q * d2).sum(dim=-1, keepdim=True)


def torch_fft_bytes(
    batch: int, heads: int, n_q: int, n_k: int, num_features: int, head_dim: int, chunk: int | None = None
) -> int:
    """Peak memory of `torch_fft_attention` in bytes, estimated from above, without its inputs."""
    size = fft_length(n_q + n_k - 1)
    features = min(chunk or num_features, num_features)
    # the products and arrays of transform size; one more of them where the transformed axis is not the last one
    products = features * head_dim * (n_k + (2 if chunk else 3) * size)
    rest = (4 * num_features + 6 * head_dim) * (n_k + size)
    return 4 * batch * heads * (products + rest)


def torch_fft_toeplitz(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The Toeplitz product y_i = sum_j w[j-i] x_j through torch.fft along n, as FastRPB's authors write it.

    Parameters
    ----------
    weights
        `[H, 2 n - 1]`; offset t = j - i stands at index t + n - 1.
    x
        `[B, H, n, d]`.

    Returns
    -------
    Tensor
        `[B, H, n, d]`.
    """
    n = x.shape[2]
    size = fft_length(2 * n - 1)
    spectrum = _column_spectrum(weights, n, size)[..., None]
    full: torch.Tensor = torch.fft.irfft(torch.fft.rfft(x, size, dim=2) * spectrum, size, dim=2)
    return full[:, :, :n]


def torch_fft_toeplitz_contiguous(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As `torch_fft_toeplitz` with positions as the contiguous axis and in place, the leaner form."""
    n = x.shape[2]
    size = fft_length(2 * n - 1)
    transformed = torch.fft.rfft(x.mT.contiguous(), size).mul_(_column_spectrum(weights, n, size)[:, None])
    full: torch.Tensor = torch.fft.irfft(transformed, size)
    return full[..., :n].mT.contiguous()


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False) -> torch.Tensor:
    """Softmax attention without a bias, `[B, H, n_q, d]`: another result, the peer that a user has today."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def sdpa_with_bias(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention with a bias, `[B, H, n_q, d]`; `mask` as `bias_mask` makes it, `[H, n_q, n_k]`.

    Luo et al. 2021 (arXiv 2106.12566), Eq. 6: what the kernelized attention stands in for.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.unsqueeze(0))


def by_cudnn(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `call` gives with softmax attention by cuDNN, which torch may not pick by itself.

    Raises
    ------
    RuntimeError
        If cuDNN has no kernel for the tensors of the call.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return call()


def flex_with_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rpe_bias: torch.Tensor, *, is_causal: bool = False
) -> Callable[[], torch.Tensor]:
    """Softmax attention with a bias by FlexAttention, which reads `rpe_bias` for every score: no mask of n x n.

    Parameters
    ----------
    query, key, value
        `[B, H, n_q, d]`, `[B, H, n_k, d]` twice.
    rpe_bias
        `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1.
    is_causal
        Whether query i sees keys j <= i only; blocks of later keys are left out.

    Returns
    -------
    callable
        It compiles when it is called first, and gives `[B, H, n_q, d]`. Only the latest one may be called.

    Notes
    -----
    Luo et al. 2021 (arXiv 2106.12566), Eq. 6.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n_q, n_k = query.shape[2], key.shape[2]

    def with_bias(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> Any:
        return score + rpe_bias[h, j - i + n_q - 1]

    def sees(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> Any:
        return j <= i

    @functools.cache
    def compiled() -> Callable[..., torch.Tensor]:
        # Past a few lengths of one function torch would stop compiling it and make all n x n scores.
        torch.compiler.reset()
        blocks = create_block_mask(sees, None, None, n_q, n_k, device=str(query.device)) if is_causal else None
        flex = torch.compile(flex_attention, dynamic=False)
        # torch's own number of stages needs more shared memory in bfloat16 than a Hopper has
        options: Any
        for options in ({}, {"num_stages": 2}):
            call = functools.partial(flex, score_mod=with_bias, block_mask=blocks, kernel_options=options)
            try:
                call(query, key, value)
            except RuntimeError as error:
                if options or "out of resource" not in str(error):
                    raise
            else:
                break
        return call

    return lambda: compiled()(query, key, value)


def bias_mask(rpe_bias: torch.Tensor, n_q: int, n_k: int, *, is_causal: bool = False) -> torch.Tensor:
    """The bias of every pair of positions, mask[h, i, j] = b_{j-i}; causal: -inf where j > i.

    Parameters
    ----------
    rpe_bias
        `[H, n_q + n_k - 1]`; offset t = j - i stands at index t + n_q - 1.
    n_q, n_k
        Number of queries and keys, at least 1 each.
    is_causal
        Whether query i sees keys j <= i only.

    Returns
    -------
    Tensor
        `[H, n_q, n_k]`, contiguous.
    """
    if is_causal:
        rpe_bias = rpe_bias.clone()
        rpe_bias[:, n_q:] = -torch.inf
    # Row i is the window of n_k biases that starts at offset -i, so the windows come last row first.
    return rpe_bias.unfold(-1, n_k, 1).flip(1).contiguous()


def fft_length(minimum: int) -> int:
    """The smallest length 2^a 3^b 5^c >= `minimum`: those transform fastest."""
    best = 1 << max(minimum - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            factor = -(-minimum // three)
            best = min(best, three << max(factor - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


def _features(x: torch.Tensor, projection: torch.Tensor, feature_map: Literal["nprf", "prf"]) -> torch.Tensor:
    """PRF and NPRF (Luo et al. 2021, Eq. 5 and Algorithm 1), `[B, H, n, d]` to `[B, H, n, m]`."""
    num_features, head_dim = projection.shape
    if feature_map == "nprf":
        x = F.normalize(x, dim=-1)
        half_square = x.new_tensor(0.5)
    else:
        x = x * head_dim**-0.25
        half_square = 0.5 * x.square().sum(dim=-1, keepdim=True)
    features: torch.Tensor = torch.exp(x @ projection.T - half_square) * num_features**-0.5
    return features


def _spectrum(rpe_bias: torch.Tensor, n_q: int, size: int, is_causal: bool) -> torch.Tensor:
    """Transform of the first column of the circulant matrix that holds the Toeplitz matrix of exp(b)."""
    c = torch.exp(rpe_bias - rpe_bias.amax(dim=-1, keepdim=True))
    if is_causal:
        c = torch.cat((c[:, :n_q], torch.zeros_like(c[:, n_q:])), dim=-1)
    return _column_spectrum(c, n_q, size)


def _column_spectrum(c: torch.Tensor, n_q: int, size: int) -> torch.Tensor:
    """Transform of the first column of the circulant matrix that holds the Toeplitz matrix of c."""
    column = c.new_zeros(c.shape[0], size)
    column[:, :n_q] = c[:, :n_q].flip(-1)
    n_ahead = c.shape[1] - n_q
    column[:, size - n_ahead :] = c[:, n_q:].flip(-1)
    spectrum: torch.Tensor = torch.fft.rfft(column)
    return spectrum
