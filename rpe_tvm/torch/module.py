"""`KernelizedAttention`, a layer for `torch.nn` models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rpe_tvm.errors import ShapeError
from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.bias import entries
from rpe_tvm.torch.feature_maps import FeatureMapFunction, make_feature_map
from rpe_tvm.torch.projection import draw_projection
from rpe_tvm.torch.redraw import next_projection


class KernelizedAttention(nn.Module):
    """Multi-head kernelized attention with a bias per head and offset (Luo 2021, Algorithm 1).

    Parameters
    ----------
    num_heads : int
        H.
    head_dim : int
        d.
    max_length : int, optional
        The longest sequence (of queries and of keys) that the learned bias tells apart. Longer sequences are taken:
        offsets past the last one of the parameter have the bias of that one. Required without ``bias``, and
        not used with it.
    feature_map : str or callable
        ``"nprf"`` (normalised queries and keys, the stable choice), ``"prf"`` or ``"trf"``, with a projection of the
        layer's own; or any ``feature_map(query, key) -> (phi_q, phi_k)``, see `kernelized_attention`. A module becomes
        a part of the layer.
    num_features : int
        m, the number of random features; not used with a feature map of one's own.
    is_causal : bool
        Whether query i sees only keys j <= i.
    seed : int
        Seed of the random projection.
    bias : nn.Module, optional
        ``bias(n_q, n_k) -> [H, n_q + n_k - 1]``, in place of the learned parameter.
    projection : str
        ``"gaussian"``, ``"orthogonal"`` or ``"sphere"``, see `gaussian_projection` and its neighbours.
    redraw : bool
        Whether every forward pass in training mode draws a projection of its own; evaluation uses the fixed one.
    learned_projection : bool
        Whether the projection is a parameter.

    Attributes
    ----------
    rpe_bias : nn.Parameter or None
        ``[H, 2 * max_length - 1]``, zeros at first; entry ``(j - i) + max_length - 1`` belongs to query i and
        key j. None with ``bias``.
    projection : Tensor or None
        ``[m, d]``, a buffer, or a parameter if it is learned, stored in the state dict. None with a feature map of
        one's own.
    redraw_state : Tensor or None
        State of the generator that redraws, a buffer: a layer with the same state dict draws the same projections
        from there on. None without ``redraw``.

    Raises
    ------
    ShapeError
        If a size is less than 1.
    ValueError
        If a name is unknown, or options exclude each other.

    Notes
    -----
    With ``redraw`` the layer cannot stand inside an activation checkpoint: it raises in the backward pass.
    """

    rpe_bias: nn.Parameter | None
    projection: Tensor | None
    redraw_state: Tensor | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_length: int | None = None,
        feature_map: str | FeatureMapFunction = "nprf",
        num_features: int = 32,
        is_causal: bool = False,
        seed: int = 0,
        *,
        bias: nn.Module | None = None,
        projection: str = "gaussian",
        redraw: bool = False,
        learned_projection: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("max_length", max_length)):
            if size is not None and size < 1:
                raise ShapeError(f"Invalid {name}: expected a positive integer, got {size}.")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.max_length = max_length
        self.feature_map = feature_map
        self.num_features = num_features
        self.is_causal = is_causal
        self.projection_kind = projection
        self._add_bias(bias)
        self._add_projection(seed, redraw, learned_projection)

    def _add_bias(self, bias: nn.Module | None) -> None:
        self.bias = bias
        if bias is not None:
            self.rpe_bias = None
        elif self.max_length is None:
            raise ValueError("Expected max_length or bias, got neither: give the length of the longest sequence.")
        else:
            zeros = torch.zeros(self.num_heads, 2 * self.max_length - 1, dtype=torch.float32)
            self.rpe_bias = nn.Parameter(zeros)

    def _add_projection(self, seed: int, redraw: bool, learned: bool) -> None:
        self.register_buffer("redraw_state", None)
        if not isinstance(self.feature_map, str):
            if redraw or learned:
                raise ValueError(
                    "Invalid redraw or learned_projection: expected False with a feature map of your own, which has "
                    "its projection itself, got True."
                )
            self.projection = None
            return
        if redraw and learned:
            raise ValueError("Expected at most one of redraw and learned_projection, got both: drop one of them.")
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_projection(self.projection_kind, self.num_features, self.head_dim, generator)
        make_feature_map(self.feature_map, drawn)  # raises where the name is unknown
        if learned:
            self.projection = nn.Parameter(drawn)
        else:
            self.register_buffer("projection", drawn)
        if redraw:
            self.redraw_state = generator.get_state()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        query : Tensor
            ``[B, H, n_q, d]``.
        key, value : Tensor
            ``[B, H_kv, n_k, d]``, H_kv a divisor of H.
        key_lengths : Tensor, optional
            ``[B]``: keys from that length on are not attended to.

        Returns
        -------
        Tensor
            ``[B, H, n_q, d]``.

        Raises
        ------
        ShapeError, DTypeError, ValueError, TypeError
            As `kernelized_attention` does.
        """
        for name, x in (("query", query), ("key", key)):
            if x.dim() != 4 or x.shape[3] != self.head_dim or (x is query and x.shape[1] != self.num_heads):
                raise ShapeError(
                    f"Invalid shape of {name}: expected [B, {self.num_heads}, n, {self.head_dim}], got {list(x.shape)}."
                )
        return kernelized_attention(
            query,
            key,
            value,
            self._bias_of(query.shape[2], key.shape[2]),
            feature_map=self._current_feature_map(),
            is_causal=self.is_causal,
            key_lengths=key_lengths,
        )

    def _bias_of(self, n_q: int, n_k: int) -> Tensor:
        """The bias ``[H, n_q + n_k - 1]`` of the offsets j - i from -(n_q - 1) to n_k - 1."""
        if self.bias is not None:
            rpe_bias: Tensor = self.bias(n_q, n_k)
            return rpe_bias
        assert self.rpe_bias is not None and self.max_length is not None  # one of them is there, see _add_bias
        return entries(self.rpe_bias, n_q, n_k)

    def _current_feature_map(self) -> FeatureMapFunction:
        if not isinstance(self.feature_map, str):
            return self.feature_map
        assert self.projection is not None  # see _add_projection
        if self.training and self.redraw_state is not None:
            drawn = next_projection(self.redraw_state, self.projection_kind, self.num_features, self.head_dim)
            return make_feature_map(self.feature_map, drawn)
        return make_feature_map(self.feature_map, self.projection)

    def extra_repr(self) -> str:
        """The arguments that the layer was made with; modules among them are shown by ``repr`` itself."""
        shown: dict[str, object] = {"num_heads": self.num_heads, "head_dim": self.head_dim}
        if self.bias is None:
            shown["max_length"] = self.max_length
        if isinstance(self.feature_map, str):
            shown |= {"feature_map": self.feature_map, "num_features": self.num_features}
        elif not isinstance(self.feature_map, nn.Module):
            shown["feature_map"] = getattr(self.feature_map, "__name__", self.feature_map)
        shown["is_causal"] = self.is_causal
        if self.projection_kind != "gaussian":
            shown["projection"] = self.projection_kind
        if self.redraw_state is not None:
            shown["redraw"] = True
        if isinstance(self.projection, nn.Parameter):
            shown["learned_projection"] = True
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
