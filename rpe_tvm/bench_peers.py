"""Which peers of the forward pass a benchmark runs: those that fit into memory, ready to be called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from rpe_tvm import bench_machine
from rpe_tvm.bench_problem import Inputs

if TYPE_CHECKING:
    import torch

Calls = dict[str, "Callable[[], torch.Tensor]"]

# How many features at a time the leaner form of the torch.fft formula transforms on a GPU, which one does not fill.
GPU_CHUNK = 8

# The peers by name, with their headings.
PEERS = {
    "torch_fft": "torch.fft",
    "torch_fft_by_feature": "torch.fft by feature",
    "sdpa": "SDPA",
    "sdpa_bias": "SDPA + bias",
}
GPU_PEERS = {
    **PEERS,
    "torch_fft_by_feature": f"torch.fft by {GPU_CHUNK} features",
    "sdpa_bias_cudnn": "SDPA + bias, cuDNN",
    "flex_bias": "FlexAttention + bias",
}


def peer_calls(inputs: Inputs, is_causal: bool, free: int, chunk: int = 1) -> tuple[Calls, dict[str, str]]:
    """The peers that fit into `free` bytes, ready to be called, and for the others why they are skipped.

    The formula through torch.fft computes in float32, since torch.fft has no bfloat16, and gives the dtype of query.
    `chunk` is how many features its leaner form transforms at a time.
    """
    from rpe_tvm import peers

    q, k, v, b, w = inputs.query, inputs.key, inputs.value, inputs.rpe_bias, inputs.projection
    (batch, heads, n, head_dim), num_features = q.shape, w.shape[0]
    mask_bytes = q.element_size() * heads * n * n
    calls: Calls = {}
    skipped: dict[str, str] = {}

    def fft(chunk: int | None) -> torch.Tensor:
        out = peers.torch_fft_attention(q.float(), k.float(), v.float(), b, w, is_causal=is_causal, chunk=chunk)
        return out.to(q.dtype)

    def fits(name: str, needed: int) -> bool:
        shortage = bench_machine.shortage(needed, free)
        if shortage is not None:
            skipped[name] = shortage
        return shortage is None

    with_mask = fits("sdpa_bias", mask_bytes)
    if with_mask:
        free -= mask_bytes
    if fits("torch_fft", peers.torch_fft_bytes(batch, heads, n, n, num_features, head_dim)):
        calls["torch_fft"] = functools.partial(fft, None)
    calls["torch_fft_by_feature"] = functools.partial(fft, chunk)
    calls["sdpa"] = functools.partial(peers.sdpa, q, k, v, is_causal=is_causal)
    if with_mask:
        mask = peers.bias_mask(b.to(q.dtype), n, n, is_causal=is_causal)
        calls["sdpa_bias"] = functools.partial(peers.sdpa_with_bias, q, k, v, mask)
    return calls, skipped


def gpu_peer_calls(inputs: Inputs, is_causal: bool, free: int) -> tuple[Calls, dict[str, str]]:
    """`peer_calls` with the peers that only GPUs have. Whether these run there shows when they are called."""
    from rpe_tvm import peers

    calls, skipped = peer_calls(inputs, is_causal, free, GPU_CHUNK)
    if "sdpa_bias" in calls:
        calls["sdpa_bias_cudnn"] = functools.partial(peers.by_cudnn, calls["sdpa_bias"])
    else:
        skipped["sdpa_bias_cudnn"] = skipped["sdpa_bias"]
    calls["flex_bias"] = peers.flex_with_bias(
        inputs.query, inputs.key, inputs.value, inputs.rpe_bias, is_causal=is_causal
    )
    return calls, skipped
