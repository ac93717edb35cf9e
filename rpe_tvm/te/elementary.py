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
# From the first on k is 128, whose exponent bits are those of infinity; at the second -127, whose are those of 0.
_INFINITE, _ZERO = 89.0, -88.0


def exp(x: Expr) -> Expr:
    """Return exp(x) in float32, right to 2 units in the last place.

    Results under 2^-126.5 are 0, those from 2^127.5 on infinity. NaN stays NaN.
    Method: x = k ln 2 + r, a polynomial in r (Cody and Waite 1980), and k put into the exponent bits.
    """
    bounded = tirx.Select(x > real(_INFINITE), real(_INFINITE), x)
    bounded = tirx.Select(bounded < real(_ZERO), real(_ZERO), bounded)
    k = tirx.floor(bounded * real(math.log2(math.e)) + real(0.5))
    r = bounded - k * real(_LN2_HIGH) - k * real(_LN2_LOW)
    series = real(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        series = series * r + real(coefficient)
    value = series * r * r + r + real(1.0)
    # a NaN must not become an integer: its conversion is undefined
    exponent = tirx.Cast("int32", tirx.Select(x == x, k, real(0.0))) + tirx.const(127, "int32")
    power = tirx.reinterpret("float32", exponent << tirx.const(23, "int32"))
    return value * power
