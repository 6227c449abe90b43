"""Elements of every dtype, as numba kernels read and write them. Imports numba: compiling only.

Memory is reached by address (int64). What is loaded and what is stored are declared never to
overlap, so that loops vectorise without checking: never `load` what the same call has stored. An
output that is exactly one of the inputs is safe, as long as each element is loaded once and what is
stored there is computed from it. Addresses need no alignment.

What a loop takes from tables of addresses or weights should be loaded before it where the loop
writes an `array`: only stores by `store` are known to leave tables alone.

Everything here is free of branches, so that the compiler can vectorise it. numba widens what it
computes from 32-bit integers to 64 bits, which halves the speed of a loop: hence the many casts.
"""

from __future__ import annotations

from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.np import arrayobj

from .reference import BF16, F8_E4M3, F8_E5M2, F16, F32, F64

_U = np.uint32

intrinsic: Any = numba.extending.intrinsic
"""Untyped: what it makes takes one argument fewer than is declared."""


def _mark(builder, instruction, own: str, other: str):
    """Say of a load or store that it shares no memory with the `other` kind."""
    module = builder.module
    domain = module.add_metadata(["optimer"])
    scopes = {name: module.add_metadata([name, domain]) for name in (own, other)}
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[own]]))
    instruction.set_metadata("noalias", module.add_metadata([scopes[other]]))
    return instruction


@intrinsic
def load(_context, address, dtype, index):
    """Number `index` of the elements of `dtype` (a numpy scalar type) at `address`."""
    element = dtype.instance_type

    def generate(context, builder, _signature, args):
        start = builder.inttoptr(args[0], context.get_data_type(element).as_pointer())
        value = builder.load(builder.gep(start, [args[2]]), align=1)
        return _mark(builder, value, "loaded", "stored")

    return element(types.int64, dtype, types.int64), generate


@intrinsic
def store(_context, address, dtype, index, value):
    """Set number `index` of the elements of `dtype` (a numpy scalar type) at `address`."""
    element = dtype.instance_type

    def generate(context, builder, _signature, args):
        start = builder.inttoptr(args[0], context.get_data_type(element).as_pointer())
        done = builder.store(args[3], builder.gep(start, [args[2]]), align=1)
        _mark(builder, done, "stored", "loaded")
        return context.get_dummy_value()

    return types.void(types.int64, dtype, types.int64, element), generate


@intrinsic
def array(_context, address, dtype, elems):
    """Memory that is both read and written, as an array: what `load` and `store` must not be used
    for. `address` is aligned to the elements; elems: their number, or a shape.

    As numba's `carray`, which however compiles two functions for each dtype and shape.
    """
    element = dtype.instance_type
    several = isinstance(elems, types.BaseTuple)
    lengths = list(elems) if several else [elems]
    result = types.Array(element, len(lengths), "C")

    def generate(context, builder, _signature, args):
        given = cgutils.unpack_tuple(builder, args[2]) if several else [args[2]]
        shape = [
            context.cast(builder, value, length, types.intp)
            for value, length in zip(given, lengths, strict=True)
        ]
        size = context.get_constant(
            types.intp, context.get_abi_sizeof(context.get_data_type(element))
        )
        strides = [size]
        for length in reversed(shape[1:]):
            strides.insert(0, builder.mul(strides[0], length))
        made = arrayobj.make_array(result)(context, builder)
        data = builder.inttoptr(args[0], context.get_data_type(element).as_pointer())
        arrayobj.populate_array(made, data, shape, strides, size, None)
        return made._getvalue()

    return result(types.int64, dtype, elems), generate


def _conversion(source: types.Type, target: types.Type, steps):
    """An intrinsic that turns a `source` value into a `target` value by the LLVM `steps`."""

    @intrinsic
    def convert(_context, value):
        def generate(_target_context, builder, _signature, args):
            return steps(builder, args[0])

        return target(source), generate

    return convert


_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
f32_of_bits = _conversion(types.uint32, types.float32, lambda b, v: b.bitcast(v, _FLOAT))
bits_of_f32 = _conversion(types.float32, types.uint32, lambda b, v: b.bitcast(v, ir.IntType(32)))
bits_of_f64 = _conversion(types.float64, types.uint64, lambda b, v: b.bitcast(v, ir.IntType(64)))
f64_of_bits = _conversion(types.uint64, types.float64, lambda b, v: b.bitcast(v, ir.DoubleType()))
# IEEE half precision goes through LLVM's own type: one hardware instruction each way, exact up,
# to nearest even down.
f32_of_half = _conversion(
    types.uint16, types.float32, lambda b, v: b.fpext(b.bitcast(v, _HALF), _FLOAT)
)
half_of_f32 = _conversion(
    types.float32, types.uint16, lambda b, v: b.bitcast(b.fptrunc(v, _HALF), ir.IntType(16))
)


@njit(error_model="numpy")
def odd_f32(value):
    """fp64 as fp32 rounded to odd, so that the next rounding is the only one that counts.

    Truncate towards zero and set the last bit if anything was lost (Boldo and Melquiond, 2008).
    """
    single = np.float32(value)
    difference = value - np.float64(single)
    bits = bits_of_f32(single)
    away = (difference < 0.0) == (single > 0.0)
    odd = _U(_U(bits - _U(1) if away else bits) | _U(1))
    return f32_of_bits(odd if difference == difference and difference != 0.0 else bits)


@njit
def _as_it_is(value):
    return value


@njit(error_model="numpy")
def nearest_bf16(value):
    """The bits of fp32 `value` rounded to the upper 16, to nearest even. The lower 16 are rubbish.

    Right for all but NaN, and for a NaN whose lower 16 bits are zero.
    """
    bits = bits_of_f32(value)
    return _U(_U(bits + _U(0x7FFF)) + _U(_U(bits >> _U(16)) & _U(1)))


def reader(code: int):
    """A jitted (address, index) -> the element's value, exact: fp32, or fp64 for F64."""
    if code == BF16:

        @njit
        def read(address, index):
            return f32_of_bits(_U(_U(load(address, np.uint16, index)) << _U(16)))

    elif code == F16:

        @njit
        def read(address, index):
            return f32_of_half(load(address, np.uint16, index))

    elif code == F32:

        @njit
        def read(address, index):
            return load(address, np.float32, index)

    elif code == F64:

        @njit
        def read(address, index):
            return load(address, np.float64, index)

    elif code == F8_E5M2:

        @njit
        def read(address, index):
            # The upper byte of a half.
            return f32_of_half(np.uint16(_U(load(address, np.uint8, index)) << _U(8)))

    else:

        @njit
        def read(address, index):
            bits = _U(load(address, np.uint8, index))
            magnitude = _U(bits & _U(0x7F))
            # As exponent and mantissa of a half it is 2^8 times too small, denormals too.
            half = np.uint16(_U(_U(bits & _U(0x80)) << _U(8)) | _U(magnitude << _U(7)))
            value = f32_of_half(half) * np.float32(256)
            return np.float32(np.nan) if magnitude == _U(0x7F) else value

    return read


def writer(code: int, wide: bool):
    """A jitted (address, index, value) that rounds once, to nearest even, and stores.

    The value is fp64 if `wide`, else fp32. It returns uint32 1 if what it stored is NaN or
    infinite, else 0.
    """
    narrow = odd_f32 if wide else _as_it_is
    if code == BF16:

        @njit
        def write(address, index, value):
            single = narrow(value)
            bits = bits_of_f32(single)
            quiet = _U(_U(bits >> _U(16)) | _U(0x40))
            result = _U(nearest_bf16(single) >> _U(16)) if single == single else quiet
            store(address, np.uint16, index, np.uint16(result))
            return _U(_U(result & _U(0x7FFF)) >= _U(0x7F80))

    elif code == F16:

        @njit
        def write(address, index, value):
            half = half_of_f32(narrow(value))
            store(address, np.uint16, index, half)
            return _U(_U(half & np.uint16(0x7FFF)) >= _U(0x7C00))

    elif code == F32:

        @njit
        def write(address, index, value):
            single = np.float32(value)
            store(address, np.float32, index, single)
            return _U(_U(bits_of_f32(single) & _U(0x7FFFFFFF)) >= _U(0x7F800000))

    elif code == F64:

        @njit
        def write(address, index, value):
            double = np.float64(value)
            store(address, np.float64, index, double)
            return _U(not (abs(double) < np.inf))

    else:
        return _writer_of_f8(code, narrow)
    return write


def _writer_of_f8(code: int, narrow):
    """`writer` for 8 bits: a sign, then an exponent of that `bias` and `mantissa` bits."""
    is_e4m3 = code == F8_E4M3
    mantissa, bias = (3, 7) if is_e4m3 else (2, 15)
    dropped = _U(23 - mantissa)
    half = _U((1 << (22 - mantissa)) - 1)
    lowest_normal = _U((128 - bias) << 23)
    # Added to a denormal, it leaves the mantissa's last places in those of the sum.
    shift = np.float32(2.0 ** (24 - bias - mantissa))
    shift_bits = _U(shift.view(np.uint32))
    rebias = _U((127 - bias) << mantissa)
    # e4m3fn has no infinities and one NaN, above its largest number; e5m2 has both.
    overflow = _U(0x7F if is_e4m3 else 0x7C)

    @njit
    def write(address, index, value):
        bits = bits_of_f32(narrow(value))
        magnitude = _U(bits & _U(0x7FFFFFFF))
        small = _U(bits_of_f32(f32_of_bits(magnitude) + shift) - shift_bits)
        even = _U(_U(magnitude >> dropped) & _U(1))
        large = _U(_U(_U(_U(magnitude + half) + even) >> dropped) - rebias)
        result = small if magnitude < lowest_normal else _U(min(large, overflow))
        result = _U(0x7F) if magnitude > _U(0x7F800000) else result
        store(address, np.uint8, index, np.uint8(_U(result | _U(_U(bits >> _U(24)) & _U(0x80)))))
        return _U(result >= overflow)

    return write
