"""Relative positional biases b as modules: ``bias(n_q, n_k)`` gives the rpe_bias of a call.

The result is ``[H, n_q + n_k - 1]``, float32 unless the module was converted; the offset t = j - i of query i and
key j stands at index ``t + n_q - 1``. `LearnedBias2d` is for grids and gives ``[H, 2 * height - 1, 2 * width - 1]``.
All of them take any length, also longer ones than in training; each says what happens there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rpe_tvm.errors import ShapeError


class LearnedBias(nn.Module):
    """One learned number for each head and offset (Luo 2021, Eq. 6), zero at first.

    Offsets past the trained range take the value of the outermost trained offset on their side.

    Parameters
    ----------
    num_heads : int
        H.
    max_length : int
        The offsets -(max_length - 1) .. max_length - 1 have a parameter of their own.

    Attributes
    ----------
    rpe_bias : nn.Parameter
        ``[H, 2 * max_length - 1]``; offset t stands at index ``t + max_length - 1``.

    Raises
    ------
    ShapeError
        If a size is not positive.
    """

    def __init__(self, num_heads: int, max_length: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads, max_length=max_length)
        self.num_heads = num_heads
        self.max_length = max_length
        self.rpe_bias = nn.Parameter(torch.zeros(num_heads, 2 * max_length - 1, dtype=torch.float32))

    def forward(self, n_q: int, n_k: int | None = None) -> Tensor:
        """Bias of n_q queries and n_k keys (n_q by default), ``[H, n_q + n_k - 1]``."""
        return entries(self.rpe_bias, n_q, n_q if n_k is None else n_k)

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return f"num_heads={self.num_heads}, max_length={self.max_length}"


class T5Bias(nn.Module):
    """One learned number for each head and bucket of offsets (Raffel et al. 2020, section 2.1), zero at first.

    Short distances have buckets of their own, longer ones share buckets that widen with the logarithm of the
    distance; all distances from ``max_distance`` on share the last one, whatever the length. The buckets are those
    of Hugging Face transformers, and so is the name of the parameter in the state dict.

    Parameters
    ----------
    num_heads : int
        H.
    num_buckets : int
        Number of buckets. Unless causal, half of them are for keys after the query.
    max_distance : int
        Where the last bucket begins, at the latest.
    is_causal : bool
        Whether all buckets are for keys at or before the query. Keys after it fall into bucket 0, as in
        transformers: call the attention with ``is_causal=True`` too.

    Attributes
    ----------
    relative_attention_bias : nn.Embedding
        Its weight is ``[num_buckets, H]``.

    Raises
    ------
    ShapeError
        If num_heads is not positive, or if the buckets cannot be laid out.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, *, is_causal: bool = False
    ) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads)
        least = 2 if is_causal else 4
        if num_buckets < least:
            raise ShapeError(
                f"Invalid num_buckets: expected at least {least} for is_causal={is_causal}, got {num_buckets}."
            )
        if max_distance <= num_buckets // least:
            raise ShapeError(
                f"Invalid max_distance: expected more than the {num_buckets // least} distances that have a bucket "
                f"of their own, got {max_distance}."
            )
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.is_causal = is_causal
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads, dtype=torch.float32)
        nn.init.zeros_(self.relative_attention_bias.weight)

    def forward(self, n_q: int, n_k: int | None = None) -> Tensor:
        """Bias of n_q queries and n_k keys (n_q by default), ``[H, n_q + n_k - 1]``."""
        weight = self.relative_attention_bias.weight
        offsets = _offsets(n_q, n_k, weight.device)
        return weight.mT.index_select(1, _t5_bucket(offsets, self.num_buckets, self.max_distance, self.is_causal))

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"is_causal={self.is_causal}"
        )


class ALiBiBias(nn.Module):
    """Fixed slopes, ``b = -s_h |j - i|`` (Press et al. 2022, section 3), with no parameter.

    The formula holds for every length. Without is_causal it is symmetric.

    Parameters
    ----------
    num_heads : int
        H. For a power of two ``s_h = 2^(-8h/H)``, h = 1 .. H; else the slopes of the next smaller power of two P,
        followed by every other slope of 2P, as in the authors' code.

    Attributes
    ----------
    slopes : Tensor
        ``[H]``, a buffer.

    Raises
    ------
    ShapeError
        If num_heads is not positive.
    """

    slopes: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads)
        self.num_heads = num_heads
        self.register_buffer("slopes", torch.tensor(_alibi_slopes(num_heads), dtype=torch.float32))

    def forward(self, n_q: int, n_k: int | None = None) -> Tensor:
        """Bias of n_q queries and n_k keys (n_q by default), ``[H, n_q + n_k - 1]``."""
        return -self.slopes[:, None] * _distances(n_q, n_k, self.slopes.device)

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return f"num_heads={self.num_heads}"


class DecayBias(nn.Module):
    """Exponential decay at a learned rate, ``b = -r_h |j - i|``: the weight exp(b) is ``gamma_h^|j-i|``.

    ALiBi with learned slopes; gamma_h = exp(-r_h) is the decay of RetNet (Sun et al. 2023), learned and
    symmetric. The formula holds for every length.

    Parameters
    ----------
    num_heads : int
        H.

    Attributes
    ----------
    log_rate : nn.Parameter
        ``[H]``, log r_h, so that r_h stays positive; at first the slopes of `ALiBiBias`.

    Raises
    ------
    ShapeError
        If num_heads is not positive.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads)
        self.num_heads = num_heads
        self.log_rate = nn.Parameter(torch.tensor(_alibi_slopes(num_heads), dtype=torch.float32).log())

    def forward(self, n_q: int, n_k: int | None = None) -> Tensor:
        """Bias of n_q queries and n_k keys (n_q by default), ``[H, n_q + n_k - 1]``."""
        return -self.log_rate.exp()[:, None] * _distances(n_q, n_k, self.log_rate.device)

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return f"num_heads={self.num_heads}"


class KerpleLogBias(nn.Module):
    """``b = -p_h log(1 + a_h |j - i|)`` (Chi et al. 2022, KERPLE, logarithmic variant).

    The formula holds for every length. At first a ~ U(0, 1) and p ~ U(0, 2), at least 0.01, as in the authors' code,
    drawn from torch's default generator. Parameters are logarithms: a and p stay positive without a bound at which
    gradients would vanish.

    Parameters
    ----------
    num_heads : int
        H.

    Attributes
    ----------
    log_a, log_p : nn.Parameter
        ``[H]``.

    Raises
    ------
    ShapeError
        If num_heads is not positive.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads)
        self.num_heads = num_heads
        self.log_a = nn.Parameter(_uniform(num_heads, 1.0).log())
        self.log_p = nn.Parameter(_uniform(num_heads, 2.0).log())

    def forward(self, n_q: int, n_k: int | None = None) -> Tensor:
        """Bias of n_q queries and n_k keys (n_q by default), ``[H, n_q + n_k - 1]``."""
        a, p = self.log_a.exp()[:, None], self.log_p.exp()[:, None]
        return -p * torch.log1p(a * _distances(n_q, n_k, self.log_a.device))

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return f"num_heads={self.num_heads}"


class KerplePowerBias(nn.Module):
    """``b = -a_h |j - i|^p_h`` with 0 < p_h < 2 (Chi et al. 2022, KERPLE, power variant).

    The formula holds for every length. At first a ~ U(0, 1) and p ~ U(0, 2), at least 0.01, as in the authors' code,
    drawn from torch's default generator. p = 2 sigmoid(logit_p): beyond 2 the kernel is not conditionally positive
    definite.

    Parameters
    ----------
    num_heads : int
        H.

    Attributes
    ----------
    log_a, logit_p : nn.Parameter
        ``[H]``.

    Raises
    ------
    ShapeError
        If num_heads is not positive.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads)
        self.num_heads = num_heads
        self.log_a = nn.Parameter(_uniform(num_heads, 1.0).log())
        self.logit_p = nn.Parameter(torch.logit(_uniform(num_heads, 2.0) / 2, eps=1e-3))

    def forward(self, n_q: int, n_k: int | None = None) -> Tensor:
        """Bias of n_q queries and n_k keys (n_q by default), ``[H, n_q + n_k - 1]``."""
        a, p = self.log_a.exp()[:, None], 2 * self.logit_p.sigmoid()[:, None]
        return -a * _distances(n_q, n_k, self.log_a.device) ** p

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return f"num_heads={self.num_heads}"


class LearnedBias2d(nn.Module):
    """One learned number for each head and offset on a grid (Liu et al. 2021, Swin, section 3.2), zero at first.

    Offsets past the trained range take, along each axis, the value of the outermost trained offset.

    Parameters
    ----------
    num_heads : int
        H.
    max_height, max_width : int
        Offsets up to max_height - 1 rows and max_width - 1 columns have a parameter of their own.

    Attributes
    ----------
    rpe_bias : nn.Parameter
        ``[H, 2 * max_height - 1, 2 * max_width - 1]``; a key that lies dr rows below and dc columns right of its
        query has the entry ``[dr + max_height - 1, dc + max_width - 1]``.

    Raises
    ------
    ShapeError
        If a size is not positive.

    Notes
    -----
    Swin's and BEiT's tables, ``[(2 * height - 1) * (2 * width - 1), H]``, hold query minus key: they become this
    parameter by ``table.mT.unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1, 2)``.
    """

    def __init__(self, num_heads: int, max_height: int, max_width: int) -> None:
        super().__init__()
        _check_positive(num_heads=num_heads, max_height=max_height, max_width=max_width)
        self.num_heads = num_heads
        self.max_height = max_height
        self.max_width = max_width
        self.rpe_bias = nn.Parameter(torch.zeros(num_heads, 2 * max_height - 1, 2 * max_width - 1, dtype=torch.float32))

    def forward(self, height: int, width: int) -> Tensor:
        """Bias of a grid, ``[H, 2 * height - 1, 2 * width - 1]``."""
        last_row, last_column = self.max_height - 1, self.max_width - 1
        rows = _offsets(height, height, self.rpe_bias.device).clamp(-last_row, last_row) + last_row
        columns = _offsets(width, width, self.rpe_bias.device).clamp(-last_column, last_column) + last_column
        return self.rpe_bias.index_select(1, rows).index_select(2, columns)

    def extra_repr(self) -> str:
        """The arguments that the module was made with."""
        return f"num_heads={self.num_heads}, max_height={self.max_height}, max_width={self.max_width}"


def entries(table: Tensor, n_q: int, n_k: int) -> Tensor:
    """Entries of a table of offsets ``[H, 2 L - 1]`` for n_q queries and n_k keys; beyond it its first or last one."""
    last = table.shape[1] // 2
    # Sizes may be symbols where something traces: one formula serves all of them. Elsewhere five kernels are saved.
    are_numbers = not torch.compiler.is_compiling() and type(n_q) is int and type(n_k) is int
    if are_numbers and min(n_q, n_k) >= 0 and max(n_q, n_k) <= last + 1:
        return table[:, last - n_q + 1 : last + n_k].contiguous()
    return table.index_select(1, _offsets(n_q, n_k, table.device).clamp(-last, last) + last)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ShapeError(f"Invalid {name}: expected a positive integer, got {size}.")


def _offsets(n_q: int, n_k: int | None, device: torch.device) -> Tensor:
    """The offsets j - i of n_q queries and n_k keys in the order of rpe_bias, ``[n_q + n_k - 1]``, int64."""
    n_k = n_q if n_k is None else n_k
    if n_q < 0 or n_k < 0:
        raise ShapeError(f"Invalid length: expected a number of positions of at least 0, got {n_q} and {n_k}.")
    return torch.arange(max(n_q + n_k - 1, 0), device=device) - (n_q - 1)


def _distances(n_q: int, n_k: int | None, device: torch.device) -> Tensor:
    # float32 also in a half-precision module, which could not tell far distances apart
    return _offsets(n_q, n_k, device).abs().to(torch.float32)


def _t5_bucket(offsets: Tensor, num_buckets: int, max_distance: int, is_causal: bool) -> Tensor:
    if is_causal:
        first = torch.zeros_like(offsets)
        distances = (-offsets).clamp(min=0)
    else:
        num_buckets //= 2
        first = num_buckets * (offsets > 0)
        distances = offsets.abs()
    exact = num_buckets // 2  # so many distances have a bucket of their own
    # In float32, as in transformers: at the borders of buckets rounding decides.
    octaves = torch.log(distances.clamp(min=1).to(torch.float32) / exact) / math.log(max_distance / exact)
    wide = (exact + (octaves * (num_buckets - exact)).to(torch.int64)).clamp(max=num_buckets - 1)
    return first + torch.where(distances < exact, distances, wide)


def _alibi_slopes(num_heads: int) -> list[float]:
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-4 * h / power) for h in range(1, 2 * power, 2)]
    return slopes + between[: num_heads - power]


def _uniform(num_heads: int, high: float) -> Tensor:
    return (high * torch.rand(num_heads, dtype=torch.float32)).clamp(min=0.01)
