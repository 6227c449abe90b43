"""exp and log in fp64 as plain arithmetic, so that loops of them vectorise. Imports numba.

A call of the C library's function takes one element at a time and keeps a whole loop from being
vectorised. Both are range reductions by powers of two, done on the bits, and a short series; errors
are within two units in the last place (tests). Free of branches and of conversions between
integers and floats, which not every processor has for vectors.
"""

from __future__ import annotations

import math

import numpy as np

from .blocks import loop
from .elements import bits_of_f64, f64_of_bits

_U = np.uint64
_MANTISSA = _U(52)
_ROUNDER = 1.5 * 2.0**52
"""Added to a number below 2**51 it leaves the nearest whole number in the last bits."""
_ONE = _U(1023 << 52)
_LOG2_E = 1 / math.log(2)
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
"""ln 2 in two parts; the first has 32 bits, so that whole multiples of it are exact."""
_LEAST = -700.0
_HALF_ROOT = _U(0x3FE6A09E667F3BCD)
"""The bits of sqrt(1/2), where the range of a reduced argument of log begins."""
_BELOW, _WHOLE = _U(64 << 52), _U(0x4330 << 48)
"""64 binary exponents, and the bits of 2**52."""

_E13, _E12, _E11, _E10, _E9, _E8, _E7, _E6, _E5, _E4, _E3 = (
    1 / math.factorial(n) for n in range(13, 2, -1)
)
_L19, _L17, _L15, _L13, _L11, _L9, _L7, _L5, _L3 = (2 / n for n in range(19, 1, -2))


@loop
def exp_down(x):
    """exp(x) for x <= 0; that of -700, which is nothing, for all below and for NaN."""
    x = x if x > _LEAST else _LEAST
    shifted = x * _LOG2_E + _ROUNDER
    k = shifted - _ROUNDER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _E13 * r + _E12
    p = p * r + _E11
    p = p * r + _E10
    p = p * r + _E9
    p = p * r + _E8
    p = p * r + _E7
    p = p * r + _E6
    p = p * r + _E5
    p = p * r + _E4
    p = p * r + _E3
    p = p * r + 0.5
    p = (p * r * r + r) + 1.0
    return p * f64_of_bits((bits_of_f64(shifted) << _MANTISSA) + _ONE)


@loop
def log_near(y):
    """log(y) for y from 2**-60 to 2**60."""
    bits = bits_of_f64(y)
    k = (bits - _HALF_ROOT + _BELOW) >> _MANTISSA
    f = f64_of_bits(bits - (k << _MANTISSA) + _BELOW) - 1.0
    exponent = f64_of_bits(k | _WHOLE) - (2.0**52 + 64.0)
    s = f / (f + 2.0)
    z = s * s
    p = _L19 * z + _L17
    p = p * z + _L15
    p = p * z + _L13
    p = p * z + _L11
    p = p * z + _L9
    p = p * z + _L7
    p = p * z + _L5
    p = p * z + _L3
    # 2 s = f - f s; the rest of the series is small beside f.
    return exponent * _LN2_HIGH + (f - (f * s - s * z * p) + exponent * _LN2_LOW)
