"""Elements of every dtype in Triton: loaded as numbers, rounded once, checked, and stored.

Kernels see the bits of a tensor as integers and are told what they mean by a dtype code, as the
CPU's kernels are. Conversions of bf16 and of the 8-bit formats are integer arithmetic: it gives the
same bits on every target and in Triton's interpreter, whose own conversions truncate, lose
denormals and misread 8-bit NaNs; and the compiler has no E4M3 for an A100.

Two more codes stand for packed vectors (`kernels.reference_packed`): INT8 and INT4, a number for
each element and a bf16 scale for each GROUP of 64. Such a source is a pair of pointers. Its numbers
are decoded in registers and never lie in memory as fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import reference
from .reference_packed import GROUP

INT8, INT4 = 6, 7
"""Codes of packed sources, beside those of `kernels.reference`."""

ITEM_BYTES = (*(storage.itemsize for storage in reference.STORAGE), 1, 1)
"""Bytes that a thread loads for one element, by code; INT4's bytes are loaded twice, by two."""

_BF16, _F16, _F32, _F64 = map(
    tl.constexpr, (reference.BF16, reference.F16, reference.F32, reference.F64)
)
_E4M3, _E5M2 = map(tl.constexpr, (reference.F8_E4M3, reference.F8_E5M2))
_INT8, _INT4, _GROUP = map(tl.constexpr, (INT8, INT4, GROUP))


_plus = tl.standard._sum_combine
"""What `tl.sum` adds with. That itself is interpreted only if Triton was, when it was imported."""


@triton.jit
def total_of(values):
    """The sum of a block, in a fixed order."""
    return tl.reduce(values, 0, _plus)


@triton.jit
def upcast(stored, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """Stored bits as numbers, exactly, in DTYPE (fp32 or fp64)."""
    if CODE == _BF16:
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    elif CODE == _F16:
        value = stored.to(tl.float16, bitcast=True)
    elif CODE == _F32:
        value = stored.to(tl.float32, bitcast=True)
    elif CODE == _F64:
        value = stored.to(tl.float64, bitcast=True)
    elif CODE == _E5M2:
        value = (stored.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    else:
        byte = stored.to(tl.uint16)
        # As a half with its three mantissa bits, whose exponent counts from 15 instead of 7.
        half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 256.0
        value = tl.where((byte & 0x7F) == 0x7F, float("nan"), value)
    return value.to(DTYPE)


@triton.jit
def load(source, CODE: tl.constexpr, start, ELEMS: tl.constexpr, HELD: tl.constexpr, DTYPE):
    """ELEMS elements from `start` on, as DTYPE; all are there."""
    lane = tl.arange(0, ELEMS)
    if CODE < _INT8:
        stored = tl.load(source + start + lane, eviction_policy="evict_first")
        return upcast(stored, CODE, DTYPE)
    else:
        everywhere = tl.full((ELEMS,), 1, tl.int1)
        return _load_packed(source, CODE, start, everywhere, True, ELEMS, HELD, DTYPE)


@triton.jit
def load_where(
    source, CODE: tl.constexpr, start, inside, some, ELEMS: tl.constexpr, HELD: tl.constexpr, DTYPE
):
    """As `load`, with 0 where `inside` is not set; `some`: whether it is set anywhere.

    Where HELD is more than 1 it is set for all elements or for none.
    """
    if CODE < _INT8:
        at = source + start + tl.arange(0, ELEMS)
        return upcast(tl.load(at, inside, 0, eviction_policy="evict_first"), CODE, DTYPE)
    else:
        return _load_packed(source, CODE, start, inside, some, ELEMS, HELD, DTYPE)


@triton.jit
def _load_packed(
    source, CODE: tl.constexpr, start, inside, some, ELEMS: tl.constexpr, HELD: tl.constexpr, DTYPE
):
    """`start` is a multiple of GROUP. A thread's HELD elements share a scale, and load it once."""
    numbers, scales = source
    lane = tl.arange(0, ELEMS)
    if CODE == _INT8:
        at = numbers + start + lane
        number = tl.load(at, inside, 0, eviction_policy="evict_first").to(tl.int32)
    else:
        half: tl.constexpr = _GROUP // 2
        at = numbers + start // 2 + lane // _GROUP * half + lane % half
        byte = tl.load(at, inside, 0).to(tl.int32)
        number = (((byte >> (lane // half % 2 * 4)) & 15) ^ 8) - 8
    threads: tl.constexpr = ELEMS // HELD
    group = start // _GROUP + tl.arange(0, threads) * HELD // _GROUP
    if HELD == 1:
        scale = tl.load(scales + group, inside, 0)
    else:
        scale = tl.load(scales + group, tl.full((threads,), 0, tl.int32) < some, 0)
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (threads, HELD)), (ELEMS,))
    return (number.to(tl.float32) * upcast(scale, _BF16, tl.float32)).to(DTYPE)


@triton.jit
def _to_odd(value):
    """fp64 as fp32 rounded to odd, so that the next rounding is the only one that counts.

    Truncate towards zero and set the last bit if anything was lost (Boldo and Melquiond, 2008).
    """
    single = value.to(tl.float32)
    difference = value - single.to(tl.float64)
    bits = single.to(tl.uint32, bitcast=True)
    away = (difference < 0.0) == (single > 0.0)
    odd = tl.where(away, bits - 1, bits) | 1
    inexact = (difference == difference) & (difference != 0.0)
    return tl.where(inexact, odd, bits).to(tl.float32, bitcast=True)


@triton.jit
def _to_f8(value, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, END: tl.constexpr):
    """fp32 rounded to nearest even as sign, exponent from 2**LOWEST on and MANTISSA bits.

    END: the byte of what is too large.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    shift: tl.constexpr = 23 - MANTISSA
    half: tl.constexpr = (1 << (shift - 1)) - 1
    nearest = (magnitude + half + ((magnitude >> shift) & 1)) >> shift
    normal = tl.minimum(nearest, END + ((LOWEST + 126) << MANTISSA)) - ((LOWEST + 126) << MANTISSA)
    # Denormals are multiples of one step: an fp32 whose last bit is worth it counts them.
    counter: tl.constexpr = (127 + LOWEST - MANTISSA + 23) << 23
    counted = magnitude.to(tl.float32, bitcast=True) + tl.full(value.shape, counter, tl.uint32).to(
        tl.float32, bitcast=True
    )
    denormal = counted.to(tl.uint32, bitcast=True) - counter
    byte = tl.where(magnitude < ((127 + LOWEST) << 23), denormal, normal)
    byte = tl.where(magnitude > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def rounded(value, CODE: tl.constexpr):
    """The bits of fp32 or fp64 rounded once, to nearest even, to the dtype of CODE."""
    if CODE != _F32 and CODE != _F64 and value.dtype == tl.float64:
        value = _to_odd(value)
    if CODE == _BF16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        top = tl.where(value != value, quiet_nan, nearest)
        return top.to(tl.uint16).to(tl.int16, bitcast=True)
    elif CODE == _F16:
        return value.to(tl.float16).to(tl.int16, bitcast=True)
    elif CODE == _F32:
        return value.to(tl.float32).to(tl.int32, bitcast=True)
    elif CODE == _F64:
        return value.to(tl.float64).to(tl.int64, bitcast=True)
    elif CODE == _E5M2:
        return _to_f8(value, 2, -14, 0x7C)
    else:
        return _to_f8(value, 3, -6, 0x7F)


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def report_nonfinite(stored, CODE: tl.constexpr, flag, HELD: tl.constexpr):
    """Set *flag if any element is NaN or infinite: its exponent bits are all ones.

    Only the HELD neighbours that one thread holds are reduced: no exchange between threads, no
    barrier. The atomic is never executed on finite results.
    """
    if CODE == _F64:
        exponent = (stored.to(tl.uint64, bitcast=True) >> 32).to(tl.int32) & 0x7FF00000
        top = 0x7FF00000
    elif CODE == _F32:
        exponent = stored & 0x7F800000
        top = 0x7F800000
    elif CODE == _BF16 or CODE == _F16:  # noqa: SIM109
        top = 0x7F80 if CODE == _BF16 else 0x7C00
        exponent = stored.to(tl.int32) & top
    else:
        top = 0x7C if CODE == _E5M2 else 0x7F  # E4M3's one NaN
        exponent = stored.to(tl.int32) & top
    raise_where(exponent, top, flag, HELD)


@triton.jit
def raise_where(value, least, flag, HELD: tl.constexpr):
    """Set *flag if any integer is `least` or more; see `report_nonfinite`."""
    threads: tl.constexpr = value.shape[0] // HELD
    largest = tl.reduce(tl.reshape(value, (threads, HELD)), 1, _larger)
    same_place = flag + tl.full((threads,), 0, tl.int32)
    tl.atomic_or(same_place, 1, mask=largest >= least, sem="relaxed")


@triton.jit
def weight(packed, WIDE: tl.constexpr):
    """A weight as `triton_launch.packed_weights` hands it over."""
    if WIDE:
        high, low = packed
        return (((high >> 1) << 32) | ((low >> 1) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return packed
