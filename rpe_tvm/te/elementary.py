"""exp as plain arithmetic, because a call of the C library's expf is not vectorised."""

from __future__ import annotations

import math

from tvm import tirx

from rpe_tvm.te.complex import Expr, real

# exp(r) on |r| <= ln(2)/2: minimax polynomial of degree 6 of the Cephes library's expf.
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LARGEST, _SMALLEST = 88.3762626647949, -87.3365478515625


def exp(x: Expr) -> Expr:
    """Return exp(x) in float32, right to 2 units in the last place.

    Results under the smallest normal float32 are 0, results over the largest are infinity, NaN stays NaN.
    Method: x = k ln 2 + r, a polynomial in r (Cody and Waite 1980), and k put into the exponent bits.
    """
    bounded = tirx.Select(x > real(_LARGEST), real(_LARGEST), tirx.Select(x < real(_SMALLEST), real(_SMALLEST), x))
    k = tirx.floor(bounded * real(math.log2(math.e)) + real(0.5))
    r = bounded - k * real(_LN2_HIGH) - k * real(_LN2_LOW)
    series = real(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        series = series * r + real(coefficient)
    value = series * r * r + r + real(1.0)
    # a NaN must not become an integer: its conversion is undefined
    exponent = tirx.Cast("int32", tirx.Select(x == x, k, real(0.0))) + tirx.const(127, "int32")
    power = tirx.reinterpret("float32", exponent << tirx.const(23, "int32"))
    result = tirx.Select(x > real(_LARGEST), real(math.inf), value * power)
    return tirx.Select(x < real(_SMALLEST), real(0.0), result)
