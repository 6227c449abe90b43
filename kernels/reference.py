"""The specification of every kernel, in a few lines of numpy: slow, obvious, trusted by the tests.

Fused linear merge (OptiMer, arXiv 2603.28858: theta = theta_base + sum_i w_i tau_i):

    delta_i = theta_i - base        (or the stored tau_i, when source i is a vector)
    s       = sum_i w_i * delta_i   multiply, then add, in the order given, never fused
    out     = round(base + s)       once, to nearest even; base's own bits where s is zero

The sum runs in fp32, or in fp64 when the output is fp32 or wider or any operand is fp64. Deltas are
summed and the base is added once: adding each to the base makes far more mis-roundings, and
(1 - sum w) * base + sum w * theta would move frozen parameters.
"""

from __future__ import annotations

import numpy as np

BF16, F16, F32, F64, F8_E4M3, F8_E5M2 = range(6)
"""Codes by which kernels are told the dtype of a buffer.

The 8-bit formats are those of Micikevicius et al. (arXiv 2209.05433): E5M2 is the upper byte of an
IEEE half; E4M3 has no infinities and one NaN of each sign, and ends at 448.
"""

STORAGE = tuple(map(np.dtype, ("u2", "u2", "f4", "f8", "u1", "u1")))
"""numpy dtype that carries each code's bits."""


def accumulates_in_fp64(base_code: int, source_codes: list[int], out_code: int) -> bool:
    """Whether a merge over buffers of these dtype codes sums in fp64 instead of fp32."""
    return out_code in (F32, F64) or F64 in (base_code, *source_codes)


def upcast(tile: np.ndarray, code: int, dtype: type) -> np.ndarray:
    """The values of a stored tile, exactly, as `dtype` (np.float32 or np.float64)."""
    if code == BF16:
        return (tile.astype(np.uint32) << 16).view(np.float32).astype(dtype)
    if code == F8_E5M2:
        return (tile.astype(np.uint16) << 8).view(np.float16).astype(dtype)
    if code == F8_E4M3:
        return _values_of_e4m3(dtype)[tile]
    return tile.view(np.float16).astype(dtype) if code == F16 else tile.astype(dtype)


def _values_of_e4m3(dtype: type) -> np.ndarray:
    """The value of each of the 256 bytes."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal, denormal = np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6)
    value = np.where(exponent == 0, denormal, normal)
    value = np.where(byte & 0x7F == 0x7F, np.nan, value)
    return np.copysign(value, np.where(byte & 0x80, -1.0, 1.0)).astype(dtype)


def round_to(values: np.ndarray, code: int) -> np.ndarray:
    """`values` (fp32 or fp64) rounded once, to nearest even, into the storage of `code`."""
    if code in (F8_E4M3, F8_E5M2):
        with np.errstate(invalid="ignore"):
            return _round_to_f8(values.astype(np.float64), code)
    if code != BF16:
        with np.errstate(over="ignore"):
            return values.astype((None, np.float16, np.float32, np.float64)[code]).view(
                STORAGE[code]
            )
    single = values.astype(np.float32)
    if values.dtype == np.float64:
        # Through fp32 rounded to odd (truncate, set the last bit if inexact): one rounding counts.
        with np.errstate(invalid="ignore", over="ignore"):
            toward_zero = np.where(
                np.abs(single) > np.abs(values), np.nextafter(single, np.float32(0)), single
            )
        inexact = np.isfinite(values) & (toward_zero.astype(np.float64) != values)
        single = (toward_zero.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def _round_to_f8(values: np.ndarray, code: int) -> np.ndarray:
    """fp64 values rounded once to 8 bits: to a multiple of the step that their exponent allows."""
    mantissa_bits, lowest, end = (3, -6, 0x7F) if code == F8_E4M3 else (2, -14, 0x7C)
    magnitude = np.abs(values)
    finite = upcast(np.arange(end, dtype=np.uint8), code, np.float64)
    inside = np.where(magnitude < 2 * finite[-1], magnitude, 0)
    exponent = np.maximum(np.frexp(inside)[1] - 1, lowest)
    step = np.ldexp(1.0, exponent - mantissa_bits)
    nearest = np.rint(inside / step) * step
    byte = np.where(magnitude == inside, np.searchsorted(finite, nearest), end)
    byte = np.where(np.isnan(values), 0x7F, byte)
    return (byte | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def linear(
    base: np.ndarray,
    base_code: int,
    sources: list[np.ndarray],
    source_codes: list[int],
    is_delta: list[bool],
    weights: list[float],
    out_code: int,
    add_base: bool = True,
) -> np.ndarray:
    """round(base + s), or round(s) without `add_base`; see the module docstring.

    Args:
        base: 1-D, any length, in the storage dtype of `base_code`.
        sources: arrays of the same length, each a theta_i, or a tau_i where `is_delta` is set.
        weights: one finite number per source.

    Returns:
        1-D array of the same length in the storage dtype of `out_code`.
    """
    wide = accumulates_in_fp64(base_code, source_codes, out_code)
    dtype = np.float64 if wide else np.float32
    base_values = upcast(base, base_code, dtype)
    total = np.zeros(base.shape, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        for tile, code, delta, weight in zip(sources, source_codes, is_delta, weights, strict=True):
            values = upcast(tile, code, dtype)
            total += dtype(weight) * (values if delta else values - base_values)
        if not add_base:
            return round_to(total, out_code)
        merged = np.where(total == 0, base_values, base_values + total)
    return round_to(merged, out_code)
