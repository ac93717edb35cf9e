"""`MultiheadKernelizedAttention`: stands where `torch.nn.MultiheadAttention` stood."""

from __future__ import annotations

from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.bias import LearnedBias
from rpe_tvm.torch.feature_maps import FeatureMapFunction, check_feature_map, make_feature_map
from rpe_tvm.torch.projection import gaussian_projection


class MultiheadKernelizedAttention(nn.Module):
    """Multi-head kernelized attention with relative positions, called as `torch.nn.MultiheadAttention` is.

    ``out = W_o concat_h(attention_h(W_q query, W_k key, W_v value))`` with the attention of Luo 2021, Eq. 10, in
    O(n log n). It replaces ``self_attn`` of `torch.nn.TransformerEncoderLayer`.

    Parameters
    ----------
    embed_dim : int
        E, the size of the queries and of the output; a multiple of ``num_heads``. A head has d = E / H channels.
    num_heads : int
        H.
    dropout : float
        Rate of dropout on what the heads return, before ``out_proj``. (There are no attention weights to drop.)
    bias : bool
        Whether the four projections add a bias.
    kdim, vdim : int, optional
        Sizes of the keys and values that come in; E by default.
    batch_first : bool
        Whether tensors are ``[B, n, E]`` rather than ``[n, B, E]``.
    num_kv_heads : int, optional
        Heads of keys and values, a divisor of H; each serves H / num_kv_heads heads of queries. H by default.
    max_length : int, optional
        Makes the relative bias a parameter per head and offset, zeros at first, of sequences up to this length. Longer
        ones are taken, see `LearnedBias`.
    rpe_bias : nn.Module, optional
        The relative bias in place of that: ``rpe_bias(n_q, n_k)`` returns ``[H, n_q + n_k - 1]``, entry
        ``(j - i) + n_q - 1`` for query i and key j. With neither, attention knows no positions.
    feature_map : str, nn.Module or callable
        ``"nprf"`` (normalised queries and keys, the stable choice), ``"prf"``, or ``feature_map(query, key)`` that
        takes ``[B, H, n, d]`` and returns the features ``[B, H, n, m]`` of both.
    num_features : int
        m of ``"nprf"`` and ``"prf"``.
    is_causal : bool
        Whether query i sees only keys j <= i in every call, so that no mask has to be passed.
    seed : int
        Seed of the random projection of ``"nprf"`` and ``"prf"``.

    Raises
    ------
    ShapeError
        If sizes do not fit together.
    ValueError
        If the feature map is unknown, the dropout is no rate, or both ``max_length`` and ``rpe_bias`` are given.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
    >>> layer.self_attn = MultiheadKernelizedAttention(64, 4, batch_first=True, max_length=1024)
    >>> encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    """

    # torch.nn.TransformerEncoder and its layers read these two. So they never take their fused kernel, which computes
    # softmax attention from the weights and would ignore this class.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        num_kv_heads: int | None = None,
        max_length: int | None = None,
        rpe_bias: nn.Module | None = None,
        feature_map: str | FeatureMapFunction = "nprf",
        num_features: int = 32,
        is_causal: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads) < 1 or embed_dim % num_heads:
            raise ShapeError(f"Invalid embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}.")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ShapeError(
                f"Invalid num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}."
            )
        if max_length is not None and rpe_bias is not None:
            raise ValueError("Expected at most one of max_length and rpe_bias, got both: drop one of them.")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.batch_first = batch_first
        self.is_causal = is_causal

        kv_channels = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.k_proj = nn.Linear(self.kdim, kv_channels, bias)
        self.v_proj = nn.Linear(self.vdim, kv_channels, bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias)
        self.dropout = nn.Dropout(dropout)
        self._reset_parameters()

        self.rpe_bias = LearnedBias(num_heads, max_length) if max_length is not None else rpe_bias
        self.feature_map = feature_map
        if isinstance(feature_map, str):
            check_feature_map(feature_map)
            self.register_buffer("projection", gaussian_projection(num_features, self.head_dim, seed=seed))
        elif not callable(feature_map):
            raise TypeError(
                f"Invalid feature_map: expected 'nprf', 'prf' or a callable (query, key) -> (phi_q, phi_k), got "
                f"{feature_map!r}."
            )

    def _reset_parameters(self) -> None:
        # As torch.nn.MultiheadAttention does.
        for each in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(each.weight)
        for each in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if each.bias is not None:
                nn.init.zeros_(each.bias)

    @property
    def in_proj_weight(self) -> NoReturn:
        """Not there: raises a ``RuntimeError`` that names the way out."""
        # torch.nn.TransformerEncoder reads it when it packs padded batches into nested tensors, which it decides
        # to do when it is built.
        raise RuntimeError(
            "MultiheadKernelizedAttention has no in_proj_weight and takes no nested tensors. If "
            "nn.TransformerEncoder asked for it: replace self_attn before the encoder is built, build it with "
            "enable_nested_tensor=False, or set encoder.use_nested_tensor = False."
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend.

        Parameters
        ----------
        query : Tensor
            ``[B, n_q, E]`` with ``batch_first``, else ``[n_q, B, E]``; or ``[n_q, E]``.
        key, value : Tensor
            The same with n_k positions and ``kdim`` and ``vdim`` channels.
        key_padding_mask : Tensor, optional
            ``[B, n_k]`` or ``[n_k]``. bool: True marks keys that are not attended to, anywhere in the row. float: added
            to the logarithm of the key's weights, so that -inf removes it. A row without keys attends to nothing: 0
            before ``out_proj``.
        need_weights : bool
            Has to be False: the weights are never formed.
        attn_mask : Tensor, optional
            Only the causal mask, ``[n_q, n_k]``, is taken. It costs n_q n_k memory: better pass ``is_causal`` alone.
        average_attn_weights : bool
            Without effect; there for callers of `torch.nn.MultiheadAttention`.
        is_causal : bool
            Whether query i sees only keys j <= i; needs no ``attn_mask``.

        Returns
        -------
        tuple of Tensor and None
            The output, shaped like query, and None in place of attention weights.

        Raises
        ------
        ShapeError, DTypeError
            If the tensors do not fit together, or are float64 or no floating point.
        ValueError
            If attention weights are asked for, or ``attn_mask`` is not the causal mask.
        """
        if need_weights:
            raise ValueError(
                "need_weights=True is not available: the weights of kernelized attention are never formed. Pass "
                "need_weights=False."
            )
        self._check(query, key, value)
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        batch, n_q, _ = query.shape
        n_k = key.shape[1]
        if attn_mask is not None:
            _check_causal_mask(attn_mask, n_q, n_k, is_promised=is_causal)

        rpe_bias = query.new_zeros(self.num_heads, max(n_q + n_k - 1, 0), dtype=torch.float32)
        if self.rpe_bias is not None:
            rpe_bias = self.rpe_bias(n_q, n_k)
        feature_map: FeatureMapFunction
        if isinstance(self.feature_map, str):
            feature_map = make_feature_map(self.feature_map, cast(Tensor, self.projection))
        else:
            feature_map = self.feature_map
        if key_padding_mask is not None:
            mask = key_padding_mask if is_batched else key_padding_mask.unsqueeze(0)
            feature_map = _masked(feature_map, _key_weights(mask, batch, n_k))

        heads = kernelized_attention(
            self._split(self.q_proj(query), self.num_heads),
            self._split(self.k_proj(key), self.num_kv_heads),
            self._split(self.v_proj(value), self.num_kv_heads),
            rpe_bias,
            feature_map=feature_map,
            is_causal=self.is_causal or is_causal or attn_mask is not None,
        )
        out: Tensor = self.out_proj(self.dropout(heads.transpose(1, 2).reshape(batch, n_q, self.embed_dim)))
        if not is_batched:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ShapeError("Expected padded tensors and a key_padding_mask, got a nested tensor.")
        for name, x, channels in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != channels:
                layout = "[B, n, {0}]" if self.batch_first else "[n, B, {0}]"
                raise ShapeError(
                    f"Invalid shape of {name}: expected {layout.format(channels)} (or [n, {channels}] for all three), "
                    f"got {list(x.shape)}."
                )
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise DTypeError(
                    f"Invalid dtype of {name}: expected float32, bfloat16 or float16, got {x.dtype}. Convert it with "
                    ".float()."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ShapeError(
                f"Invalid shape of value: expected as many values as keys, {list(key.shape)}, got {list(value.shape)}."
            )
        batch_axis = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_axis] != key.shape[batch_axis]:
            raise ShapeError(
                f"Invalid shape of key: expected the batch of query {list(query.shape)}, got {list(key.shape)}, with "
                f"batch_first={self.batch_first}."
            )

    def extra_repr(self) -> str:
        """The arguments that the layer was made with and that its children do not show."""
        made = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, batch_first={self.batch_first}"
        if isinstance(self.feature_map, str):
            made += f", feature_map={self.feature_map!r}, num_features={cast(Tensor, self.projection).shape[0]}"
        return f"{made}, is_causal={self.is_causal}"


def _check_causal_mask(attn_mask: Tensor, n_q: int, n_k: int, is_promised: bool) -> None:
    """Raise unless `attn_mask` hides the keys j > i and nothing else."""
    if tuple(attn_mask.shape) != (n_q, n_k):
        raise ShapeError(f"Invalid shape of attn_mask: expected [{n_q}, {n_k}], got {list(attn_mask.shape)}.")
    # Values cannot be looked at while a graph is made; then a caller's is_causal=True has to do, as in torch.
    if is_promised and torch.compiler.is_compiling():
        return
    is_hidden = torch.ones(n_q, n_k, dtype=torch.bool, device=attn_mask.device).triu(1)
    if attn_mask.dtype != torch.bool:
        expected = torch.zeros_like(attn_mask).masked_fill(is_hidden, float("-inf"))
    else:
        expected = is_hidden
    if not torch.equal(attn_mask, expected):
        raise ValueError(
            "Invalid attn_mask: expected the causal mask (nn.Transformer.generate_square_subsequent_mask(n)) or none. "
            "Kernelized attention never forms the n x n scores that another mask would be added to: hide keys with "
            "key_padding_mask, weigh offsets with rpe_bias, or keep nn.MultiheadAttention."
        )


def _key_weights(mask: Tensor, batch: int, n_k: int) -> Tensor:
    """What every key's features are multiplied by, ``[B, n_k]``, float32."""
    if tuple(mask.shape) != (batch, n_k):
        raise ShapeError(f"Invalid shape of key_padding_mask: expected [{batch}, {n_k}], got {list(mask.shape)}.")
    if mask.dtype == torch.bool:
        return (~mask).float()
    if not mask.is_floating_point():
        raise DTypeError(f"Invalid dtype of key_padding_mask: expected bool or a floating point, got {mask.dtype}.")
    return mask.float().exp()


def _masked(feature_map: FeatureMapFunction, key_weights: Tensor) -> FeatureMapFunction:
    # A key is in both sums through its features only: without features it is in neither.
    def features(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        phi_q, phi_k = feature_map(query, key)
        return phi_q, phi_k * key_weights[:, None, :, None]

    return features
