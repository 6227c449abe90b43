# mypy: disable-error-code="call-arg, var-annotated"
"""The loops of `packed.quantise` and `packed.dequantise`. Imports numba: compiling only."""

from __future__ import annotations

import numpy as np
from numba import njit

from .elements import array, bits_of_f32, f32_of_bits
from .reference_packed import GROUP

loop = njit(error_model="numpy")


@loop
def quantise_groups(values, elems, bits, packed, scales):
    """`packed.quantise` for 8 or 4 bits."""
    level = np.float32(127 if bits == 8 else 7)
    scale_bits = array(scales, np.uint16, (elems + GROUP - 1) // GROUP)
    half = GROUP // 2
    for start in range(0, elems, GROUP):
        n = min(GROUP, elems - start)
        source = array(values + start * 4, np.float32, n)
        top = np.uint32(0)
        for j in range(n):  # magnitudes order as their bits do
            top = max(top, np.uint32(bits_of_f32(source[j]) & np.uint32(0x7FFFFFFF)))
        largest = f32_of_bits(top)
        up = np.uint32(bits_of_f32(largest / level) + np.uint32(0xFFFF)) >> np.uint32(16)
        up = max(np.uint32(up), np.uint32(largest > np.float32(0)))
        scale_bits[start // GROUP] = np.uint16(up)
        divisor = f32_of_bits(np.uint32(np.uint32(up) << np.uint32(16))) if up else np.float32(1)
        if bits == 8:
            out = array(packed + start, np.int8, GROUP)
            for j in range(n):
                quotient = min(max(source[j] / divisor, -level), level)
                out[j] = np.int8(np.int32(np.rint(quotient)))
            for j in range(n, GROUP):
                out[j] = np.int8(0)
        else:
            pairs = array(packed + start // 2, np.uint8, half)
            for j in range(min(n, half)):
                quotient = min(max(source[j] / divisor, -level), level)
                pairs[j] = np.uint8(np.int32(np.rint(quotient)) & np.int32(15))
            for j in range(n, half):
                pairs[j] = np.uint8(0)
            if n > half:
                upper = array(values + (start + half) * 4, np.float32, n - half)
                for j in range(n - half):
                    quotient = min(max(upper[j] / divisor, -level), level)
                    q = np.int32(np.rint(quotient)) << np.int32(4)
                    pairs[j] = np.uint8(np.int32(pairs[j]) | (q & np.int32(0xF0)))


@loop
def dequantise_groups(packed, scales, bits, skip, elems, out):
    """`packed.dequantise` for 8 or 4 bits."""
    groups = (skip + elems + GROUP - 1) // GROUP
    scale_bits = array(scales, np.uint16, groups)
    half = GROUP // 2
    for group in range(groups):
        scale = f32_of_bits(np.uint32(np.uint32(scale_bits[group]) << np.uint32(16)))
        begin = group * GROUP - skip
        low, high = max(0, -begin), min(GROUP, elems - begin)
        if bits == 8:
            signed = array(packed + group * GROUP + low, np.int8, high - low)
            target = array(out + (begin + low) * 4, np.float32, high - low)
            for j in range(high - low):
                target[j] = np.float32(np.int32(signed[j])) * scale
        else:
            pairs = packed + group * half
            count = min(high, half) - low
            if count > 0:
                lower = array(pairs + low, np.uint8, count)
                target = array(out + (begin + low) * 4, np.float32, count)
                for j in range(count):
                    q = np.int32(np.int32(lower[j]) & np.int32(15)) ^ np.int32(8)
                    target[j] = np.float32(np.int32(q - np.int32(8))) * scale
            low = max(low, half)
            if high > low:
                upper = array(pairs + low - half, np.uint8, high - low)
                target = array(out + (begin + low) * 4, np.float32, high - low)
                for j in range(high - low):
                    q = np.int32(np.int32(upper[j]) >> np.int32(4)) ^ np.int32(8)
                    target[j] = np.float32(np.int32(q - np.int32(8))) * scale
