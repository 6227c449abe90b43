"""The CPU kernel: the reference's arithmetic, fused, without the GIL, at memory speed.

The tile is walked in blocks that stay in the first-level cache. For each block every operand is
upcast from its stored bits, the weighted deltas are summed, and the result is rounded and stored:
memory sees each input byte once and each output byte once, whatever the number of sources or the
mixture of dtypes. (The alternative, one loop body unrolled over the sources, saves cache traffic
but compiles anew for every count and every mixture of dtypes.)

numba compiles it on first use and keeps the machine code in its cache. `fastmath` stays off:
multiply and add are then never contracted, so vector bodies and scalar tails, any tile size and any
instruction set give the same bits. Buffers are passed by address; the caller keeps them alive.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from .reference import BF16, F16, F32, accumulates_in_fp64

BLOCK = 2048
"""Elements per block: three fp32 blocks are 24 KiB, inside any first-level data cache."""


@intrinsic
def _pointer(_context, address, dtype):
    """`address` (integer) as a pointer to `dtype`."""
    pointer = types.CPointer(dtype.instance_type)

    def generate(context, builder, _signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, dtype), generate


def _bitcast(source: types.Type, target: types.Type, steps):
    """An intrinsic that turns a `source` value into a `target` value by the LLVM `steps`."""

    @intrinsic
    def convert(_context, value):
        def generate(_target_context, builder, _signature, args):
            return steps(builder, args[0])

        return target(source), generate

    return convert


_bits_to_f32 = _bitcast(types.uint32, types.float32, lambda b, v: b.bitcast(v, ir.FloatType()))
_f32_to_bits = _bitcast(types.float32, types.uint32, lambda b, v: b.bitcast(v, ir.IntType(32)))
_f64_to_bits = _bitcast(types.float64, types.uint64, lambda b, v: b.bitcast(v, ir.IntType(64)))
# IEEE half precision goes through LLVM's own type: one hardware instruction each way, exact up,
# to nearest even down.
_half_to_f32 = _bitcast(
    types.uint16,
    types.float32,
    lambda b, v: b.fpext(b.bitcast(v, ir.HalfType()), ir.FloatType()),
)
_f32_to_half = _bitcast(
    types.float32,
    types.uint16,
    lambda b, v: b.bitcast(b.fptrunc(v, ir.HalfType()), ir.IntType(16)),
)


@njit(nogil=True, cache=True)
def _upcast(address, code, n, block):
    """block[:n] = the values of the n elements at `address`, exactly."""
    if code == BF16:
        bits = carray(_pointer(address, np.uint16), n)
        for j in range(n):
            block[j] = _bits_to_f32(np.uint32(np.uint32(bits[j]) << np.uint32(16)))
    elif code == F16:
        halves = carray(_pointer(address, np.uint16), n)
        for j in range(n):
            block[j] = _half_to_f32(halves[j])
    elif code == F32:
        singles = carray(_pointer(address, np.float32), n)
        for j in range(n):
            block[j] = singles[j]
    else:
        doubles = carray(_pointer(address, np.float64), n)
        for j in range(n):
            block[j] = doubles[j]


@njit(nogil=True, cache=True)
def _to_f32(value):
    """An fp64 value as fp32, rounded to odd so that the next rounding is the only one that counts.

    Truncate towards zero and set the last bit if anything was lost (Boldo and Melquiond, 2008).
    fp32 values pass through.
    """
    single = np.float32(value)
    difference = np.float64(value) - np.float64(single)
    if difference == difference and difference != 0.0:
        bits = _f32_to_bits(single)
        away = (difference < 0.0) == (single > 0.0)
        if away:
            bits = np.uint32(bits - np.uint32(1))
        return _bits_to_f32(np.uint32(bits | np.uint32(1)))
    return single


@njit(nogil=True, cache=True)
def _store(block, address, code, n):
    """Round block[:n] into the n elements at `address`; True if any is not finite."""
    if code == BF16:
        out = carray(_pointer(address, np.uint16), n)
        top = np.uint32(0)
        for j in range(n):
            bits = _f32_to_bits(_to_f32(block[j]) if block.itemsize == 8 else block[j])
            magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
            odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            quiet_nan = np.uint32(bits >> np.uint32(16)) | np.uint32(0x40)
            result = quiet_nan if magnitude > np.uint32(0x7F800000) else rounded
            out[j] = np.uint16(result)
            top = max(top, np.uint32(result & np.uint32(0x7FFF)))
        return top >= np.uint32(0x7F80)
    if code == F16:
        out = carray(_pointer(address, np.uint16), n)
        top = np.uint32(0)
        for j in range(n):
            half = _f32_to_half(_to_f32(block[j]) if block.itemsize == 8 else block[j])
            out[j] = half
            top = max(top, np.uint32(half & np.uint16(0x7FFF)))
        return top >= np.uint32(0x7C00)
    if code == F32:
        singles = carray(_pointer(address, np.float32), n)
        top = np.uint32(0)
        for j in range(n):
            single = np.float32(block[j])
            singles[j] = single
            top = max(top, np.uint32(_f32_to_bits(single) & np.uint32(0x7FFFFFFF)))
        return top >= np.uint32(0x7F800000)
    doubles = carray(_pointer(address, np.float64), n)
    widest = np.uint64(0)
    for j in range(n):
        doubles[j] = block[j]
        magnitude64 = _f64_to_bits(np.float64(block[j])) & np.uint64(0x7FFFFFFFFFFFFFFF)
        widest = max(widest, magnitude64)
    return widest >= np.uint64(0x7FF0000000000000)


@njit(nogil=True, cache=True)
def _linear(addresses, codes, is_delta, weights, elems, add_base, base, value, total):
    """The fused loop. addresses/codes: base, sources..., output; blocks: scratch of one dtype."""
    last = len(addresses) - 1
    itemsizes = (2, 2, 4, 8)
    zero = total.dtype.type(0)
    nonfinite = False
    for start in range(0, elems, BLOCK):
        n = min(BLOCK, elems - start)
        _upcast(addresses[0] + start * itemsizes[codes[0]], codes[0], n, base)
        for j in range(n):
            total[j] = zero
        for i in range(1, last):
            _upcast(addresses[i] + start * itemsizes[codes[i]], codes[i], n, value)
            weight = weights[i - 1]
            if is_delta[i - 1]:
                for j in range(n):
                    total[j] = total[j] + weight * value[j]
            else:
                for j in range(n):
                    total[j] = total[j] + weight * (value[j] - base[j])
        if add_base:
            for j in range(n):
                total[j] = base[j] if total[j] == zero else base[j] + total[j]
        nonfinite |= _store(total, addresses[last] + start * itemsizes[codes[last]], codes[last], n)
    return nonfinite


def linear(
    base: np.ndarray,
    base_code: int,
    sources: list[np.ndarray],
    source_codes: list[int],
    is_delta: list[bool],
    weights: list[float],
    out: np.ndarray,
    out_code: int,
    add_base: bool = True,
) -> bool:
    """out = round(base + sum_i w_i delta_i), as `reference.linear` specifies, into `out`.

    Args:
        base, sources: 1-D, contiguous, equal length, in the storage dtypes of their codes.
        out: 1-D, contiguous, same length; may be `base` itself when the dtypes are equal.

    Returns:
        True when any output element is NaN or infinite.
    """
    codes = [base_code, *source_codes, out_code]
    wide = accumulates_in_fp64(base_code, source_codes, out_code)
    dtype = np.float64 if wide else np.float32
    scratch = np.empty((3, BLOCK), dtype)
    return bool(
        _linear(
            np.array([a.ctypes.data for a in (base, *sources, out)], np.int64),
            np.array(codes, np.int64),
            np.array(is_delta, np.bool_),
            np.array(weights, np.float64).astype(dtype),
            base.shape[0],
            add_base,
            scratch[0],
            scratch[1],
            scratch[2],
        )
    )
