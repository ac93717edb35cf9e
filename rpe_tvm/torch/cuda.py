"""Attention on GPUs: the sequence of compiled functions. Buffers are torch's, on the caller's stream; nothing waits."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rpe_tvm.plan import gpu, gpu_buffers, gpu_direct, gpu_workspace
from rpe_tvm.plan.gpu import GpuAttentionConfig
from rpe_tvm.plan.gpu_direct import TensorCoreConfig
from rpe_tvm.plan.gpu_tiles import TileConfig
from rpe_tvm.plan.gpu_wisdom import GpuConfig
from rpe_tvm.runtime import GpuInstance
from rpe_tvm.runtime.gpu import gpus


def attention(
    instance: GpuInstance,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor,
    out: Tensor,
    *,
    feature_map: str,
    is_causal: bool,
) -> None:
    """Write attention to `out`, features included, on arguments that are known to fit.

    Parameters
    ----------
    instance : GpuInstance
        The compiled operator for these lengths.
    query, key, value, out : Tensor
        ``[B, H, n_q, d]``, ``[B, H, n_k, d]`` twice, ``[B, H, n_q, d]``; contiguous in the last axis; not empty; of the
        config's dtype.
    rpe_bias, projection : Tensor
        ``[H, n_q + n_k - 1]``, ``[m, d]``; contiguous float32.
    feature_map : str
        ``"nprf"`` or ``"prf"``.
    is_causal : bool
        Whether query i sees only keys j <= i.
    """
    with current_gpu(query):
        if isinstance(instance.config, TensorCoreConfig):
            query, key, value = (in_whole_pieces(x) for x in (query, key, value))
        launch(instance, query, key, feature_map, is_causal)(query, key, value, rpe_bias, projection, out)


Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]  # query, key, value, bias, projection, out


def launch(instance: GpuInstance, query: Tensor, key: Tensor, feature_map: str, is_causal: bool) -> Launch:
    """What serves calls of `attention` with tensors of these shapes, in whole pieces where tensor cores read them."""
    config, functions, causal = instance.config, instance.functions, int(is_causal)
    if isinstance(config, TensorCoreConfig):
        kind = _one_launch(config, query)
        if kind is not None:
            whole = functions[f"{kind}_{feature_map}"]
            return lambda q, k, v, b, w, out: whole(q, k, v, b, w, causal, out)
    if f"forward_{feature_map}" in functions:
        forward, size = functions[f"forward_{feature_map}"], _workspace_bytes(config, query.shape, key.shape[2])
        tables = (constant_tables(config, query.device),) if isinstance(config, GpuAttentionConfig) else ()

        def call(q: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor, out: Tensor) -> None:
            forward(q, k, v, b, w, *tables, causal, torch.empty(size, dtype=torch.uint8, device=q.device), out)

        return call
    features, fft = functions[f"features_{feature_map}"], _fft_config(instance)

    def call_one_by_one(q: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor, out: Tensor) -> None:
        phi_q, phi_k = (q.new_empty(gpu_buffers.features(fft, q.shape[0], q.shape[1])) for _ in range(2))
        features(q, k, w, phi_q, phi_k)
        _on_features(instance, phi_q, phi_k, v, b, out, is_causal)

    return call_one_by_one


# as `Launch`; returns what `torch.cuda_backward.attention_backward` takes as denominators
Recorded = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]


def launch_recorded(instance: GpuInstance, query: Tensor, key: Tensor, feature_map: str, is_causal: bool) -> Recorded:
    """`launch`, for calls whose gradients will be asked for."""
    config, causal = instance.config, int(is_causal)
    is_one_launch = isinstance(config, TensorCoreConfig) and _one_launch(config, query) is not None
    if isinstance(config, GpuAttentionConfig) or is_one_launch:
        without = launch(instance, query, key, feature_map, is_causal)
        return lambda q, k, v, b, w, out: without(q, k, v, b, w, out)
    forward, size = instance.functions[f"recorded_{feature_map}"], _workspace_bytes(config, query.shape, key.shape[2])

    def call(q: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor, out: Tensor) -> Tensor:
        denominators = w.new_empty(q.shape[:3])
        forward(q, k, v, b, w, causal, torch.empty(size, dtype=torch.uint8, device=q.device), denominators, out)
        return denominators

    return call


def attention_on_features(
    instance: GpuInstance,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    *,
    is_causal: bool,
) -> None:
    """Write attention on ready features to `out`; as `attention`, with phi_q ``[B, H, n_q, m]``, phi_k
    ``[B, H, n_k, m]``.
    """
    with current_gpu(phi_q):
        packed = [_pack(instance, phi) for phi in (phi_q, phi_k)]
        if isinstance(instance.config, TileConfig):
            _by_tiles(instance, instance.config, packed, value, rpe_bias, out, is_causal)
            return
        _on_features(instance, packed[0], packed[1], value, rpe_bias, out, is_causal)


def current_gpu(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one for a while: the functions do that, and would leave it so."""
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


def _one_launch(config: TensorCoreConfig, query: Tensor) -> str | None:
    """The function that does all of a call in one launch, if there is one for it: the faster of two."""
    of_call = config, *query.shape[:3]
    for kind, serves, config_of in (
        ("clustered", gpu_direct.is_clustered, gpu_direct.clustered),
        ("fused", gpu_direct.is_fused, gpu_direct.fused),
    ):
        found = config_of(config) if serves(*of_call) else None
        if found is not None and _runs(found, query.get_device()):
            return kind
    return None


@functools.cache
def _runs(one_launch: TensorCoreConfig, device: int) -> bool:
    """Whether a GPU has what the kernel of this config needs: its library also runs on GPUs that do not."""
    gpu = gpus()[device]
    has_clusters = int(gpu.arch.removeprefix("sm_")) >= gpu_direct.CLUSTER_ARCH
    return one_launch.shared_bytes <= gpu.shared_bytes and (one_launch.cluster == 1 or has_clusters)


@functools.lru_cache(maxsize=256)
def _workspace_bytes(config: GpuConfig, shape: torch.Size, n_key: int) -> int:
    batch, heads, n_query, _ = shape
    _, size = gpu_workspace.places(config, batch, heads, n_query, n_key)
    return int(size)


def in_whole_pieces(x: Tensor) -> Tensor:
    """x as tensor cores' kernels load it, copied where its rows are no whole pieces of 16 bytes."""
    return x if is_in_whole_pieces(x) else x.clone(memory_format=torch.contiguous_format)


def is_in_whole_pieces(x: Tensor) -> bool:
    """Whether the rows of x are whole pieces of 16 bytes."""
    if gpu_direct.is_readable(x.data_ptr(), x.stride()):
        return True
    # the stride of an axis of size 1 may be anything
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    return gpu_direct.is_readable(x.data_ptr(), [*strides, x.stride(-1)])


def _on_features(
    instance: GpuInstance,
    phi_q: Tensor,
    phi_k: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    is_causal: bool,
) -> None:
    config, functions = _fft_config(instance), instance.functions
    batch, heads, n_q, _ = out.shape
    n_k = value.shape[2]
    largest = value.new_empty(heads)
    functions["largest"](rpe_bias, n_q, n_k, int(is_causal), largest)
    weights = rpe_bias, largest, n_q, n_k, int(is_causal)
    partial = value.new_empty(gpu_buffers.partial(config, batch, heads))
    if config.columns == 1:
        _in_shared_memory(instance, phi_q, phi_k, value, weights, partial)
    else:
        _by_columns_and_rows(instance, phi_q, phi_k, value, weights, partial)
    functions["normalise"](partial, constant_tables(config, value.device), out)


def _by_tiles(
    instance: GpuInstance,
    config: TileConfig,
    phi: list[Tensor],
    value: Tensor,
    rpe_bias: Tensor,
    out: Tensor,
    is_causal: bool,
) -> None:
    heads, n_q, n_k, causal = out.shape[1], out.shape[2], value.shape[2], int(is_causal)
    table = value.new_empty(config.table_shape(heads, n_q, n_k))
    instance.functions["weights"](rpe_bias, n_q, n_k, causal, gpu_direct.round_up(n_q, config.tile_q), table)
    instance.functions["attention"](*phi, value, table, causal, value.new_empty(out.shape[:3]), out)


Weights = tuple[Tensor, Tensor, int, int, int]  # rpe_bias, its largest entry of each head, n_q, n_k, whether causal


def _in_shared_memory(
    instance: GpuInstance, phi_q: Tensor, phi_k: Tensor, value: Tensor, weights: Weights, partial: Tensor
) -> None:
    config, functions = _fft_config(instance), instance.functions
    tables = constant_tables(config, value.device)
    spectrum = value.new_empty(gpu_buffers.spectrum(config, phi_q.shape[1]))
    functions["spectrum"](*weights, tables, spectrum)
    by_first_radix = torch.unflatten(partial, 4, (config.folds, config.radices[0], -1))
    functions["attention"](phi_q, phi_k, value, spectrum, tables, by_first_radix)


def _by_columns_and_rows(
    instance: GpuInstance, phi_q: Tensor, phi_k: Tensor, value: Tensor, weights: Weights, partial: Tensor
) -> None:
    config, functions = _fft_config(instance), instance.functions
    tables = constant_tables(config, value.device)
    batch, heads = phi_q.shape[:2]
    first_radix = (config.radices[0], -1)
    columns = value.new_empty(gpu_buffers.spectrum_columns(config, heads))
    spectrum = value.new_empty(gpu_buffers.spectrum(config, heads))
    functions["spectrum_columns"](*weights, tables, columns)
    functions["spectrum_rows"](torch.unflatten(columns, 3, first_radix), tables, spectrum)

    at_once = gpu_buffers.pairs_at_once(config)
    transformed, product = (value.new_empty(gpu_buffers.between(config, at_once)) for _ in range(2))
    for b, h, first in itertools.product(range(batch), range(heads), range(0, config.pairs, at_once)):
        sums = torch.unflatten(partial[b, h, first : first + at_once], 2, (config.columns, config.row))
        there, back = transformed[: len(sums)], product[: len(sums)]
        functions["columns"](phi_k[b, h], value[b, h], tables, first, there)
        functions["rows"](
            torch.unflatten(there, 4, first_radix), spectrum[h], tables, torch.unflatten(back, 4, first_radix)
        )
        functions["back_columns"](back, phi_q[b, h], tables, sums)


def _pack(instance: GpuInstance, phi: Tensor) -> Tensor:
    batch, heads, n, _ = phi.shape
    config = instance.config if isinstance(instance.config, TileConfig) else _fft_config(instance)
    packed = phi.new_empty(gpu_buffers.features(config, batch, heads))
    packed[..., :n] = phi.mT
    packed[..., n:] = 0.0
    return packed


def _fft_config(instance: GpuInstance) -> GpuAttentionConfig:
    if isinstance(instance.config, GpuAttentionConfig):
        return instance.config
    raise TypeError(f"Invalid operator: expected one by FFT for features that are given, got {instance.config}.")


@functools.cache
def constant_tables(config: GpuAttentionConfig, device: torch.device) -> Tensor:
    """The constant tables on a device, copied there once."""
    return torch.from_numpy(gpu.tables(config)).to(device)
