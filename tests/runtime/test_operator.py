"""The operator as a callable: right for every layout of its arguments, clear about what does not fit."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm_ffi

from rpe_tvm import reference
from rpe_tvm.errors import DTypeError, ShapeError
from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.runtime import Attention, Instance, load, run
from rpe_tvm.runtime import operator as operators

Array = npt.NDArray[np.float32]
M, D = 3, 8


@pytest.fixture(scope="module")
def operator(artefacts: Path) -> Attention:
    return load(artefacts)


def _arguments(batch: int = 2, heads: int = 2, n_q: int = 20, n_k: int = 20) -> list[Array]:
    rng = np.random.default_rng(n_q * 1000 + n_k)
    shapes = [(batch, heads, n, D) for n in (n_q, n_k, n_k)]
    shapes += [(heads, max(n_q + n_k - 1, 0)), (M, D)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _expected(arguments: list[Array], **options: Any) -> Array:
    return reference.attention(*arguments, **options)[2].astype(np.float32)


def _close(got: Any, expected: Array) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_map", ["nprf", "prf"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(20, 20), (1, 1), (1, 30), (50, 7), (64, 64), (65, 3), (2, 96)])
def test_matches_the_reference(operator: Attention, feature_map: str, is_causal: bool, n_q: int, n_k: int) -> None:
    arguments = _arguments(n_q=n_q, n_k=n_k)
    got = operator(*arguments, feature_map=feature_map, is_causal=is_causal)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    _close(got, _expected(arguments, feature_map=feature_map, is_causal=is_causal))


def test_takes_the_smallest_length_that_fits(operator: Attention) -> None:
    assert operator.lengths == (64, 96)
    assert (operator.num_features, operator.head_dim) == (M, D)
    lengths = [operator.instance(n).config.length for n in (1, 64, 65, 96)]
    assert lengths == [64, 64, 96, 96]
    assert repr(operator) == "Attention(num_features=3, head_dim=8, lengths=[64, 96])"
    assert not np.shares_memory(operator(*_arguments()), operator(*_arguments()))


def test_too_long(operator: Attention) -> None:
    with pytest.raises(ShapeError, match=r"at most 96 .*compiled: 64, 96.*got 97.*compile .*--lengths 97"):
        operator(*_arguments(n_q=97, n_k=2))


@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        (0, (2, 20, D), r"query: expected \[B, H, n_q, 8\], got \[2, 20, 8\]"),
        (0, (2, 2, 20, D + 1), r"query: expected \[B, H, n_q, 8\], got \[2, 2, 20, 9\]"),
        (1, (2, 2, 20, 4), r"key: expected \[2, 2, n_k, 8\] to fit query, got \[2, 2, 20, 4\]"),
        (1, (2, 3, 20, D), r"key: expected \[2, 2, n_k, 8\]"),
        (1, (1, 2, 20, D), r"key: expected \[2, 2, n_k, 8\]"),
        (1, (20, D), r"key: expected \[2, 2, n_k, 8\]"),
        (1, (2, 2, 0, D), r"value: expected \[2, 2, 0, 8\] to fit key"),
        (2, (2, 2, 19, D), r"value: expected \[2, 2, 20, 8\] to fit key, got \[2, 2, 19, 8\]"),
        (3, (2, 38), r"rpe_bias: expected \[H, n_q \+ n_k - 1\] = \[2, 39\], got \[2, 38\]"),
        (3, (1, 39), r"rpe_bias: expected .* \[2, 39\], got \[1, 39\]"),
        (3, (39,), r"rpe_bias: expected .* \[2, 39\], got \[39\]"),
        (4, (M + 1, D), r"projection: expected \[m, d\] = \[3, 8\], got \[4, 8\]"),
        (4, (M * D,), r"projection: expected \[m, d\] = \[3, 8\], got \[24\]"),
    ],
)
def test_wrong_shapes(operator: Attention, argument: int, shape: tuple[int, ...], message: str) -> None:
    arguments = _arguments()
    arguments[argument] = np.zeros(shape, np.float32)
    with pytest.raises(ShapeError, match=f"Invalid shape of {message}"):
        operator(*arguments)


@pytest.mark.parametrize("argument", range(5))
def test_wrong_dtypes(operator: Attention, argument: int) -> None:
    names = ["query", "key", "value", "rpe_bias", "projection"]
    for dtype in ("float64", "float16", "int32", "bool", "complex64", ">f4"):
        arguments = _arguments()
        arguments[argument] = np.zeros(arguments[argument].shape, dtype)  # type: ignore[assignment]
        with pytest.raises(DTypeError, match=f"Invalid dtype of {names[argument]}: expected float32, got {dtype}"):
            operator(*arguments)
    for nothing in (None, 1.0, [[1.0]], "text"):
        arguments = _arguments()
        arguments[argument] = nothing  # type: ignore[assignment]
        with pytest.raises(DTypeError, match=f"Invalid type of {names[argument]}: .*DLPack"):
            operator(*arguments)


def test_unknown_feature_map(operator: Attention) -> None:
    with pytest.raises(ValueError, match="Unknown feature map 'relu': expected 'nprf' or 'prf'"):
        operator(*_arguments(), feature_map="relu")


class _OnAnotherDevice:
    """An array that says it lies on a GPU."""

    dtype = "float32"
    device = "cuda:0"

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("cannot share memory of device 2")


def test_wrong_device(operator: Attention) -> None:
    arguments: list[Any] = list(_arguments())
    arguments[1] = _OnAnotherDevice()
    with pytest.raises(ValueError, match=r"Invalid key: expected an array on the CPU.* on device cuda:0"):
        operator(*arguments)


def test_wrong_device_of_torch(operator: Attention) -> None:
    torch = pytest.importorskip("torch")
    arguments: list[Any] = list(_arguments())
    arguments[2] = torch.zeros(2, 2, 20, D, device="meta")
    with pytest.raises(ValueError, match=r"Invalid value: expected an array on the CPU.* on device meta"):
        operator(*arguments)


@pytest.mark.parametrize(("batch", "heads", "n_q", "n_k"), [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 0, 0)])
def test_nothing_to_compute(operator: Attention, batch: int, heads: int, n_q: int, n_k: int) -> None:
    assert operator(*_arguments(batch, heads, n_q, n_k)).shape == (batch, heads, n_q, D)


def test_no_keys(operator: Attention) -> None:
    with pytest.raises(ShapeError, match=r"Invalid shape of key: expected at least one position.*\[2, 2, 0, 8\]"):
        operator(*_arguments(n_k=0))


def _views(x: Array) -> dict[str, Array]:
    """The same values in other places and layouts."""
    rest = tuple(range(2, x.ndim))
    packed = np.empty((*x.shape[:-1], 3 * x.shape[-1]), np.float32)
    packed[..., x.shape[-1] : -x.shape[-1]] = x
    shifted = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    shifted[...] = x
    every_other = np.empty((*x.shape[:-1], 2 * x.shape[-1]), np.float32)[..., ::2]
    every_other[...] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    fields = np.zeros(x.shape, [("flag", "i1"), ("x", "f4")])
    fields["x"] = x
    return {
        "first axes swapped": np.ascontiguousarray(x.transpose(1, 0, *rest)).transpose(1, 0, *rest),
        "last axes swapped": np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2),
        "slice of a wider array": packed[..., x.shape[-1] : -x.shape[-1]],
        "four bytes past a boundary": shifted,
        "every other element": every_other,
        "backwards": np.ascontiguousarray(x[::-1])[::-1],
        "last axis backwards": np.ascontiguousarray(x[..., ::-1])[..., ::-1],
        "read-only": read_only,
        "field of records": fields["x"],
    }


@pytest.mark.parametrize("layout", list(_views(np.zeros((2, 2), np.float32))))
def test_any_layout(operator: Attention, layout: str) -> None:
    arguments = _arguments(n_q=20, n_k=17)
    expected = operator(*arguments)
    for i, argument in enumerate(arguments):
        view = _views(argument)[layout]
        assert np.array_equal(view, argument)
        assert np.array_equal(operator(*arguments[:i], view, *arguments[i + 1 :]), expected)
    assert np.array_equal(operator(*(_views(each)[layout] for each in arguments)), expected)


def test_repeated_rows_without_a_copy(operator: Attention) -> None:
    arguments = _arguments(batch=3)
    arguments[2] = np.broadcast_to(arguments[2][:1], arguments[2].shape)
    _close(operator(*arguments), _expected(arguments))


def test_not_finite_stays_not_finite(operator: Attention) -> None:
    for argument in range(3):
        arguments = _arguments()
        arguments[argument][0, 0, 0, 0] = np.nan
        expected = _expected(arguments)
        assert np.isnan(expected).any()
        assert np.array_equal(np.isnan(operator(*arguments)), np.isnan(expected))


def test_writes_to_out(operator: Attention) -> None:
    arguments = _arguments()
    expected = operator(*arguments)
    out = np.full((2, 2, 20, D), np.nan, np.float32)
    assert operator(*arguments, out=out) is out
    assert np.array_equal(out, expected)
    by_position = np.full((2, 20, 2, D), np.nan, np.float32)
    operator(*arguments, out=by_position.transpose(0, 2, 1, 3))
    assert np.array_equal(by_position.transpose(0, 2, 1, 3), expected)
    packed = np.full((2, 2, 20, 2 * D), 7, np.float32)
    operator(*arguments, out=packed[..., :D])
    assert np.array_equal(packed[..., :D], expected) and (packed[..., D:] == 7).all()
    on_query = [each.copy() for each in arguments]
    operator(*on_query, out=on_query[0])  # query is done with before out is written
    assert np.array_equal(on_query[0], expected)


def test_wrong_out(operator: Attention) -> None:
    arguments = _arguments()
    shape = (2, 2, 20, D)
    read_only = np.zeros(shape, np.float32)
    read_only.flags.writeable = False
    one = np.zeros((1, 1, 1, D), np.float32)
    repeated = np.lib.stride_tricks.as_strided(one, shape, (0, 0, 0, 4))
    packed = np.zeros((2, 2, 20, 2, D), np.float32)
    arguments[2] = packed[:, :, :, 0]
    operator(*arguments, out=packed[:, :, :, 1])  # beside value, not on it
    for out, error, message in [
        (np.zeros((2, 2, 19, D), np.float32), ShapeError, r"shape of out: expected \[2, 2, 20, 8\]"),
        (np.zeros(shape), DTypeError, "dtype of out: expected float32, got float64"),
        (np.zeros((2, 2, 20, 2 * D), np.float32)[..., ::2], ShapeError, "strides of out"),
        (repeated, ShapeError, "strides of out: expected distinct elements"),
        (read_only, ValueError, "out: expected an array .*can share.*readonly"),
        (packed[:, :, :, 0], ValueError, "out: expected memory of its own"),
        ([[0.0]], DTypeError, "type of out"),
    ]:
        with pytest.raises(error, match=f"Invalid {message}"):
            operator(*arguments, out=out)


def test_torch_tensors(operator: Attention) -> None:
    torch = pytest.importorskip("torch")
    arguments = _arguments()
    expected = operator(*arguments)
    tensors = [torch.from_numpy(each) for each in arguments]
    got = operator(*tensors)
    assert isinstance(got, torch.Tensor) and np.array_equal(got, expected)
    out = torch.empty(2, 20, 2, D).transpose(1, 2)
    assert operator(*tensors, out=out) is out
    assert np.array_equal(out, expected)
    tensors[0].requires_grad_()
    assert not operator(*tensors).requires_grad
    with pytest.raises(DTypeError, match="dtype of query: expected float32, got torch.bfloat16"):
        operator(tensors[0].bfloat16(), *tensors[1:])


def test_lazy_bits_of_torch(operator: Attention) -> None:
    torch = pytest.importorskip("torch")
    arguments = _arguments()
    negated: list[Any] = []
    for each in arguments:
        view = torch.complex(torch.zeros(each.shape), torch.from_numpy(-each)).conj().imag
        assert view.is_neg() and torch.equal(view, torch.from_numpy(each))
        negated.append(view)
    assert np.array_equal(operator(*negated), operator(*arguments))
    conjugated = torch.zeros(2, 2, 20, D, dtype=torch.complex64).conj()
    with pytest.raises(DTypeError, match="dtype of key: expected float32, got .*complex64"):
        operator(negated[0], conjugated, *negated[2:])
    out = torch.zeros(2, 2, 20, D, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match="Invalid out: expected plain memory"):
        operator(*arguments, out=out)


def test_tensors_of_tvm_ffi(operator: Attention) -> None:
    arguments = _arguments()
    tensors = [tvm_ffi.from_dlpack(each) for each in arguments]
    assert np.array_equal(operator(*tensors), operator(*arguments))


def test_threads_do_not_share_intermediates(operator: Attention) -> None:
    inputs = [_arguments(n_q=n, n_k=96 - n) for n in (10, 30, 50, 70)]
    expected = [operator(*each) for each in inputs]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal(operator(*inputs[i]), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_calls_in_order_with_shapes_and_aligned_buffers() -> None:
    calls: list[tuple[str, list[Any]]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: calls.append((name, list(arguments)))

    functions = {name: note(name) for name in operators.FUNCTIONS}
    config = AttentionConfig(M, D, 64, "fft", outer=(8,), inner=(8,), lanes=8)
    instance = Instance.of(config, functions)
    query, key, value, bias, projection = _arguments(n_q=20, n_k=17)
    out = np.empty_like(query)
    run(
        *(functions, config, instance.tables, query, key, value, bias, projection, out),
        feature_map="prf",
        is_causal=True,
    )
    (_, q), (_, k), (_, w), (_, a) = calls
    assert [name for name, _ in calls] == ["features_prf", "features_prf", "weights", "attention"]
    assert q[0] is query and k[0] is key and q[1] is k[1] is projection
    phi_q, phi_k, table = q[2], k[2], w[5]
    assert phi_q.shape == phi_k.shape == twiddles.feature_shape(config, 2, 2, 20, 17)
    assert table.shape == twiddles.weight_table_shape(config, 2, 20, 17)
    assert w[0] is bias and w[1:4] == [20, 17, 1] and w[4] is instance.tables
    assert [id(each) for each in a] == [id(x) for x in (phi_q, phi_k, value, table, instance.tables, out)]
    assert not np.shares_memory(phi_q, phi_k) and not np.shares_memory(phi_q, table)
    for buffer in (phi_q, phi_k, table, instance.tables):
        assert buffer.ctypes.data % 64 == 0
    assert np.array_equal(instance.tables, twiddles.tables(config))


def test_intermediates_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_SCRATCH_BYTES", 4000)
    monkeypatch.setattr(operators, "_MOST_VIEWS", 3)
    monkeypatch.setattr(operators, "_scratch", operators._Scratch())
    small, large = operators.scratch("phi", (10, 10)), operators.scratch("phi", (30, 30))
    assert np.shares_memory(large, operators.scratch("phi", (5,)))  # grown
    assert not np.shares_memory(small, large)
    huge = operators.scratch("phi", (40, 40))  # over the limit
    assert huge.shape == (40, 40) and not np.shares_memory(huge, operators.scratch("phi", (40, 40)))
    assert np.shares_memory(large, operators.scratch("phi", (30, 30)))

    views = [operators.scratch_view("view", (size,), bytes) for size in (1, 1, 2, 3, 4)]
    assert views[0] is views[1] and len(operators._scratch._views) <= 3


def test_instances_must_be_of_one_kind() -> None:
    configs = [AttentionConfig(m, D, 64, "direct", tile=(64, 64)) for m in (3, 4)]
    with pytest.raises(ValueError, match="one num_features m and head_dim d, got m=3 d=8, m=4 d=8"):
        Attention([Instance.of(config, {}) for config in configs])
    with pytest.raises(ValueError, match="got none"):
        Attention([])


def test_runs_with_numpy_and_tvm_ffi_alone(
    artefacts: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = (
        "import sys\n"
        "for name in ('tvm', 'torch', 'filelock', 'psutil', 'xgboost'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from rpe_tvm.runtime import load\n"
        "x = np.ones((1, 2, 10, 8), 'float32')\n"
        "out = load(sys.argv[1])(x, x, x, np.zeros((2, 19), 'float32'), np.ones((3, 8), 'float32'))\n"
        "assert np.allclose(out, 1)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules if sys.modules[name]} & {'tvm', 'torch'}))"
    )
    assert run_python(code, str(artefacts)).stdout.strip() == "[]"
