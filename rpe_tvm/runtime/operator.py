"""The compiled operator as a callable: checks its arguments, picks the compiled length, calls the kernels."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tvm_ffi

from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig

FloatArray = npt.NDArray[np.float32]
Functions = Mapping[str, Callable[..., Any]]

# Names of the kernels are features_<map>, weights and attention.
FEATURE_MAPS = ("nprf", "prf")
FUNCTIONS = (*(f"features_{name}" for name in FEATURE_MAPS), "weights", "attention")

_ALIGNMENT = 64  # a cache line: kernels accept any address and run fastest from here
_SCRATCH_BYTES = 64 << 20  # a thread keeps at most this much of each intermediate
_MOST_VIEWS = 256  # on that memory, for each thread: those of a model with a few lengths. More begin anew.

T = TypeVar("T")


def backward_functions(config: AttentionConfig) -> tuple[str, ...]:
    """Names of the kernels of the gradients by a config's algorithm."""
    shared = (*FUNCTIONS[:-1], *(f"features_{name}_backward" for name in FEATURE_MAPS), "backward")
    if config.algorithm == "fft":
        return (*shared, "row_weights", "denominator_backward")
    return shared


@dataclass(frozen=True)
class Instance:
    """One compiled length.

    Attributes
    ----------
    config
        What was compiled.
    functions
        The kernels by name, see `FUNCTIONS`.
    tables
        Constant tables that the kernels take, from `rpe_tvm.plan.twiddles.tables`.
    """

    config: AttentionConfig
    functions: Functions
    tables: FloatArray

    @classmethod
    def of(cls, config: AttentionConfig, functions: Functions) -> Instance:
        """An instance with the tables of `config`."""
        return cls(config, functions, aligned_copy(twiddles.tables(config)))


class Attention:
    """Kernelized attention with relative positional encoding, compiled for one or more lengths.

    Made by `rpe_tvm.runtime.load`. Safe to call from several threads at once.

    Parameters
    ----------
    instances
        The compiled lengths; all have the same `num_features` and `head_dim`.
    """

    def __init__(self, instances: Iterable[Instance]) -> None:
        self._instances = sorted(instances, key=lambda instance: instance.config.length)
        kinds = {(i.config.num_features, i.config.head_dim) for i in self._instances}
        if len(kinds) != 1:
            found = ", ".join(f"m={m} d={d}" for m, d in sorted(kinds)) or "none"
            raise ValueError(f"Expected compiled lengths of one num_features m and head_dim d, got {found}.")
        ((self.num_features, self.head_dim),) = kinds

    @property
    def lengths(self) -> tuple[int, ...]:
        """The compiled lengths, ascending. A call takes the smallest that holds its queries and its keys."""
        return tuple(instance.config.length for instance in self._instances)

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.lengths))
        return f"Attention(num_features={self.num_features}, head_dim={self.head_dim}, lengths=[{lengths}])"

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        rpe_bias: Any,
        projection: Any,
        *,
        feature_map: str = "nprf",
        is_causal: bool = False,
        out: Any = None,
    ) -> Any:
        """Attention of `query` over `key` and `value` (Luo 2021, Eq. 10).

        ``out_i = sum_j c[j-i] (phi(q_i) . phi(k_j)) v_j / sum_j c[j-i] (phi(q_i) . phi(k_j))`` with
        ``c = exp(rpe_bias)``.

        Arrays are float32, on the CPU, of any library that speaks DLPack (NumPy, PyTorch, ...). They are read
        in place where their last axis is contiguous, and copied otherwise. There are no gradients.

        Parameters
        ----------
        query
            ``[B, H, n_q, d]``.
        key, value
            ``[B, H, n_k, d]``.
        rpe_bias
            ``[H, n_q + n_k - 1]``; entry ``(j - i) + n_q - 1`` belongs to query i and key j.
        projection
            ``[m, d]``, the random projection of the feature map.
        feature_map
            ``"nprf"`` (queries and keys scaled to length 1) or ``"prf"``.
        is_causal
            Whether query i sees only keys j <= i.
        out
            ``[B, H, n_q, d]`` to write to, contiguous in the last axis, sharing no memory with `value`.

        Returns
        -------
        array
            `out` if given, else a new array ``[B, H, n_q, d]``: a torch tensor if `query` is one, else a
            NumPy array.

        Raises
        ------
        ShapeError, DTypeError, ValueError
            If an argument does not fit; the message says what was expected.
        """
        if feature_map not in FEATURE_MAPS:
            known = " or ".join(map(repr, FEATURE_MAPS))
            raise ValueError(f"Unknown feature map {feature_map!r}: expected {known}.")
        tensors = {
            "query": as_tensor("query", query),
            "key": as_tensor("key", key),
            "value": as_tensor("value", value),
            "rpe_bias": as_tensor("rpe_bias", rpe_bias),
            "projection": as_tensor("projection", projection),
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._check_shapes(shapes)
        shape = shapes["query"]
        if out is None:
            # torch tensors make one of their own kind; they are recognised without importing torch.
            new = getattr(query, "new_empty", None)
            result = aligned_empty(shape) if new is None else new(shape)
        else:
            result = out
        target = as_tensor("out", result, writable=True)
        if out is not None:
            _check_out(target, shape, tensors["value"])
        if math.prod(shape) == 0:
            return result
        instance = self.instance(max(shape[2], shapes["key"][2]))
        run(
            instance.functions,
            instance.config,
            instance.tables,
            _last_axis_contiguous(tensors["query"]),
            _last_axis_contiguous(tensors["key"]),
            _last_axis_contiguous(tensors["value"]),
            _contiguous(tensors["rpe_bias"]),
            _contiguous(tensors["projection"]),
            target,
            feature_map=feature_map,
            is_causal=is_causal,
        )
        return result

    def instance(self, n: int) -> Instance:
        """The smallest compiled length that holds n positions; `ShapeError` if there is none."""
        for instance in self._instances:
            if instance.config.length >= n:
                return instance
        raise ShapeError(
            f"Invalid length: expected at most {self.lengths[-1]} queries and keys (compiled: "
            f"{', '.join(map(str, self.lengths))}), got {n}. Compile a larger one: python -m rpe_tvm compile "
            f"--op attention --features {self.num_features} --head-dim {self.head_dim} --lengths {n} "
            f"--out DIR"
        )

    def _check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        d, m = self.head_dim, self.num_features

        def expect(name: str, expected: str, fits: bool) -> None:
            if not fits:
                raise ShapeError(f"Invalid shape of {name}: expected {expected}, got {list(shapes[name])}.")

        query, key, value = shapes["query"], shapes["key"], shapes["value"]
        expect("query", f"[B, H, n_q, {d}]", len(query) == 4 and query[3] == d)
        batch, heads, n_q, _ = query
        expect(
            "key",
            f"[{batch}, {heads}, n_k, {d}] to fit query",
            len(key) == 4 and (key[0], key[1], key[3]) == (batch, heads, d),
        )
        n_k = key[2]
        expect("value", f"{list(key)} to fit key", value == key)
        expect("key", "at least one position for query to attend to", n_k > 0 or n_q == 0)
        offsets = max(n_q + n_k - 1, 0)
        expect(
            "rpe_bias",
            f"[H, n_q + n_k - 1] = [{heads}, {offsets}]",
            len(shapes["rpe_bias"]) == 2 and tuple(shapes["rpe_bias"]) == (heads, offsets),
        )
        expect("projection", f"[m, d] = [{m}, {d}]", tuple(shapes["projection"]) == (m, d))


def run(
    functions: Functions,
    config: AttentionConfig,
    tables: Any,
    query: Any,
    key: Any,
    value: Any,
    rpe_bias: Any,
    projection: Any,
    out: Any,
    *,
    feature_map: str,
    is_causal: bool,
    phi: tuple[Any, Any] | None = None,
) -> None:
    """Call the kernels of one compiled length on arguments that are known to fit; `Attention` checks them
    first.

    Parameters
    ----------
    functions
        The kernels by name, see `FUNCTIONS`: of a loaded library, or of `rpe_tvm.build.in_memory`.
    config
        What was compiled.
    tables
        `rpe_tvm.plan.twiddles.tables(config)`.
    query, key, value, out
        ``[B, H, n_q, d]``, ``[B, H, n_k, d]`` twice, ``[B, H, n_q, d]``; contiguous in the last axis; not
        empty.
    rpe_bias, projection
        ``[H, n_q + n_k - 1]``, ``[m, d]``; contiguous.
    feature_map
        ``"nprf"`` or ``"prf"``.
    is_causal
        Whether query i sees only keys j <= i.
    phi
        Memory for the features of queries and of keys, each of `twiddles.feature_shape`; None: this thread's.
    """
    batch, heads, n_q, _ = query.shape
    n_k = key.shape[2]
    if phi is None:
        phi_shape = twiddles.feature_shape(config, batch, heads, n_q, n_k)
        phi = scratch("phi_q", phi_shape), scratch("phi_k", phi_shape)
    phi_q, phi_k = phi
    table = scratch("table", twiddles.weight_table_shape(config, heads, n_q, n_k))
    features = functions[f"features_{feature_map}"]
    features(query, projection, phi_q)
    features(key, projection, phi_k)
    functions["weights"](rpe_bias, n_q, n_k, int(is_causal), tables, table)
    functions["attention"](phi_q, phi_k, value, table, tables, out)


def aligned_empty(shape: Sequence[int]) -> FloatArray:
    """An uninitialised float32 array whose data starts at a cache line (NumPy's own promise 16 bytes)."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(np.float32).reshape(shape)


def aligned_copy(values: FloatArray) -> FloatArray:
    """A copy of an array that starts at a cache line."""
    copy = aligned_empty(values.shape)
    copy[...] = values
    return copy


class _Scratch(threading.local):
    """Memory of the intermediates, kept from call to call in each thread.

    Fresh memory costs a page fault for every page at its first use: measured, a tenth of a call at n = 4096
    and more below. A thread keeps one block per intermediate, grown to the largest call up to
    `_SCRATCH_BYTES`, until it ends, and what was made of it for each shape.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, FloatArray] = {}
        self._views: dict[tuple[str, tuple[int, ...], Any], Any] = {}

    def take(self, name: str, shape: tuple[int, ...], view_as: Callable[[FloatArray], T]) -> T:
        known: T | None = self._views.get((name, shape, view_as))
        return self._view(name, shape, view_as) if known is None else known

    def _view(self, name: str, shape: tuple[int, ...], view_as: Callable[[FloatArray], T]) -> T:
        size = math.prod(shape)
        block = self._blocks.get(name)
        if block is None or block.size < size:
            block = aligned_empty((size,))
            if block.nbytes > _SCRATCH_BYTES:
                return view_as(block.reshape(shape))
            self._blocks[name] = block
            self._views = {at: view for at, view in self._views.items() if at[0] != name}
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        view = self._views[name, shape, view_as] = view_as(block[:size].reshape(shape))
        return view


_scratch = _Scratch()


def _as_array(array: FloatArray) -> FloatArray:
    return array


def scratch(name: str, shape: tuple[int, ...]) -> FloatArray:
    """Uninitialised memory of this thread, valid until its next call with the same name."""
    return _scratch.take(name, shape, _as_array)


def scratch_view(name: str, shape: tuple[int, ...], view_as: Callable[[FloatArray], T]) -> T:
    """As `scratch`, what `view_as` makes of the array. It is kept: to make it takes longer than to start a kernel."""
    return _scratch.take(name, shape, view_as)


def as_tensor(name: str, array: Any, *, writable: bool = False) -> tvm_ffi.Tensor:
    """View `array` as a float32 CPU tensor, without a copy if DLPack can express it.

    Parameters
    ----------
    name
        Name of the argument, for messages.
    array
        Anything that speaks DLPack.
    writable
        Whether the tensor will be written to; then it is never a copy.
    """
    # torch keeps conjugation and negation as flags that DLPack does not carry.
    for resolve in ("resolve_conj", "resolve_neg"):
        method = getattr(array, resolve, None)
        resolved = array if method is None else method()
        if writable and resolved is not array:
            raise ValueError(f"Invalid {name}: expected plain memory, got a lazily conjugated or negated tensor.")
        array = resolved
    try:
        tensor = tvm_ffi.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        tensor = _convert(name, array, writable, error)
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        dtype = tensor.dtype
    if not _is_float32(dtype):
        raise _dtype_error(name, dtype)
    if tensor.device.type != "cpu":
        raise ValueError(f"Invalid device of {name}: expected the CPU, got {tensor.device}. Copy it to the CPU first.")
    if tensor.data_ptr() == 0 and tensor.numel() != 0:
        raise ValueError(f"Invalid {name}: expected an array with data, got a {type(array).__name__} without.")
    return tensor


def _convert(name: str, array: Any, writable: bool, error: Exception) -> tvm_ffi.Tensor:
    """What to do about an array that DLPack refused with `error`: say what is wrong with it, or copy it."""
    if not hasattr(array, "__dlpack__"):
        raise DTypeError(
            f"Invalid type of {name}: expected a float32 array that speaks DLPack (NumPy, PyTorch, ...), got "
            f"{type(array).__name__}."
        ) from error
    dtype = getattr(array, "dtype", "float32")
    if not _is_float32(dtype):
        raise _dtype_error(name, dtype) from error
    if writable or not isinstance(array, np.ndarray):
        device = getattr(array, "device", "unknown")
        raise ValueError(
            f"Invalid {name}: expected an array on the CPU that DLPack can share, got a "
            f"{type(array).__name__} on device {device}: {error}"
        ) from error
    # A read-only array, or strides that are no multiple of 4 bytes.
    return tvm_ffi.from_dlpack(np.array(array, np.float32, order="C"))


@functools.cache
def _is_float32(dtype: object) -> bool:
    return str(dtype).rpartition(".")[2] == "float32"  # torch's name is torch.float32


def _dtype_error(name: str, dtype: object) -> DTypeError:
    return DTypeError(f"Invalid dtype of {name}: expected float32, got {dtype}. Convert it first.")


def _check_out(out: tvm_ffi.Tensor, shape: Sequence[int], value: tvm_ffi.Tensor) -> None:
    if tuple(out.shape) != shape:
        raise ShapeError(f"Invalid shape of out: expected {list(shape)} as query has, got {list(out.shape)}.")
    if math.prod(shape) == 0:
        return
    strides = tuple(out.strides)
    if strides[-1] != 1 or any(s == 0 for n, s in zip(shape, strides, strict=True) if n > 1):
        raise ShapeError(
            f"Invalid strides of out: expected distinct elements and a contiguous last axis, got {list(strides)}."
        )
    if np.shares_memory(np.from_dlpack(out), np.from_dlpack(value)):
        raise ValueError("Invalid out: expected memory of its own, got memory that value uses too.")


def _last_axis_contiguous(tensor: tvm_ffi.Tensor) -> tvm_ffi.Tensor:
    return tensor if tensor.strides[-1] == 1 else _copy(tensor)


def _contiguous(tensor: tvm_ffi.Tensor) -> tvm_ffi.Tensor:
    return tensor if tensor.is_contiguous() else _copy(tensor)


def _copy(tensor: tvm_ffi.Tensor) -> tvm_ffi.Tensor:
    copy = aligned_empty(tuple(tensor.shape))
    copy[...] = np.from_dlpack(tensor)
    return tvm_ffi.from_dlpack(copy)
