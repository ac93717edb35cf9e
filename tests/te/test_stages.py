"""DFT stages, sums over lanes and exp, compiled without any schedule, against NumPy."""

import math

import numpy as np
import pytest
import tvm
from tvm import te

from rpe_tvm.plan import twiddles
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.te import complex as cx
from rpe_tvm.te import dft
from rpe_tvm.te.elementary import exp
from rpe_tvm.te.lane_sums import step_names, summed_at_once, sums_over_lanes

pytestmark = pytest.mark.compile

LANES = 3


def run(tensors, *arrays):
    function = te.create_prim_func(tensors).with_attr("global_symbol", "main")
    compiled = tvm.compile(tvm.IRModule({"main": function}), target="llvm")
    holders = [tvm.runtime.tensor(array) for array in arrays]
    compiled["main"](*holders)
    return holders[-1].numpy()


@pytest.mark.parametrize("radices", [(2,), (3,), (4,), (5,), (8,), (8, 4), (2, 3), (5, 8), (3, 4, 2), (4, 4)])
def test_forward_and_inverse_transforms(radices):
    size = math.prod(radices)
    config = AttentionConfig(1, 1, size * size, "fft", radices, radices)
    layout = twiddles.layout(config)
    constants = te.placeholder((cx.int64(layout.size),), cx.FLOAT, "tables")
    tables = dft.Tables(constants, layout)
    x = te.placeholder(tuple(map(cx.int64, (2, size, 2, LANES))), cx.FLOAT, "x")
    forward = dft.forward(
        "forward",
        radices,
        (),
        2,
        LANES,
        tables,
        lambda where, b, q, s, lane: cx.load_lanes(x, (b, s * (size // radices[0]) + q), lane),
        lambda where, b, position, value: value,
    )

    def load(where, b, position, lane):
        return cx.load_lanes(forward, (b, position // radices[-1], 0, position % radices[-1]), lane)

    inverse = dft.inverse("inverse", radices, (), 2, LANES, tables, load)
    rest = size // radices[0]
    spectrum = cx.compute(
        (2, size, 2, LANES),
        lambda b, k, c, lane: forward[b, k // radices[-1], 0, k % radices[-1], c, lane],
        "spectrum",
    )
    back = cx.compute((2, size, 2, LANES), lambda b, j, c, lane: inverse[b, 0, j % rest, j // rest, c, lane], "back")
    data = np.random.default_rng(0).standard_normal((2, size, 2, LANES)).astype("f4")
    table = twiddles.tables(config)
    expected = np.fft.fft(data[:, :, 0] + 1j * data[:, :, 1], axis=1)[:, twiddles.digit_order(radices)]
    got = run([x, constants, spectrum], data, table, np.zeros_like(data))
    scale = np.abs(expected).max()
    assert np.abs(got[:, :, 0] + 1j * got[:, :, 1] - expected).max() < 1e-6 * scale
    got = run([x, constants, back], data, table, np.zeros_like(data))
    assert np.abs(got / size - data).max() < 2e-6


def test_exp_is_right_to_two_units_in_the_last_place_and_keeps_what_is_not_finite():
    x = np.concatenate([np.linspace(-87, 88, 20001), np.linspace(-1e-3, 1e-3, 1001)]).astype("f4")
    special = np.array([np.nan, np.inf, -np.inf, 89.0, -88.0, 0.0], "f4")
    values = np.concatenate([x, special])
    argument = te.placeholder((cx.int64(len(values)),), cx.FLOAT, "x")
    result = te.compute(argument.shape, lambda i: exp(argument[i]), name="y")
    got = run([argument, result], values, np.zeros_like(values))
    expected = np.exp(x.astype("f8"))
    assert (np.abs(got[: len(x)] - expected) / np.spacing(expected.astype("f4"))).max() <= 2
    np.testing.assert_array_equal(got[len(x) :], np.array([np.nan, np.inf, 0.0, np.inf, 0.0, 1.0], "f4"))


@pytest.mark.parametrize(("vectors", "lanes"), [(8, 8), (16, 4), (8, 16), (5, 8), (6, 4), (1, 2)])
def test_sums_over_lanes(vectors, lanes):
    wide = te.placeholder(tuple(map(cx.int64, (3, vectors, lanes))), cx.FLOAT, "wide")
    sums = sums_over_lanes("step", wide)
    data = np.random.default_rng(0).integers(-99, 99, (3, vectors, lanes)).astype("f4")
    tensors = [wide, cx.compute((3, vectors), sums, "sums")]
    np.testing.assert_array_equal(run(tensors, data, np.zeros((3, vectors), "f4")), data.sum(-1))
    assert len(step_names("step", lanes)) == math.log2(lanes)
    assert vectors % summed_at_once(vectors, lanes) == 0
