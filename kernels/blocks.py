"""What the loops over blocks share. Imports numba: compiling only."""

from __future__ import annotations

from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import njit, types

from .elements import bits_of_f32

loop = njit(error_model="numpy")
"""Decorator of all loops: they neither raise nor allocate, as `native.compiled` asks."""

intrinsic: Any = numba.extending.intrinsic
"""Untyped: what it makes takes one argument fewer than is declared."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_I64 = ir.IntType(64)


def _caller(result: ir.Type):
    """An intrinsic that calls the C function of three integers at an address."""
    returned = types.void if isinstance(result, ir.VoidType) else types.int64

    @intrinsic
    def call(_context, function, address, n, block):
        def generate(context, builder, _signature, args):
            kind = ir.FunctionType(result, [_I64] * 3).as_pointer()
            done = builder.call(builder.inttoptr(args[0], kind), args[1:])
            return context.get_dummy_value() if returned == types.void else done

        return returned(*[types.int64] * 4), generate

    return call


_read, _write = _caller(ir.VoidType()), _caller(_I64)


@loop
def upcast(address, form, offset, n, block):
    """block[:n] = the values of n elements, from number `offset` of those at `address` on."""
    at = address + offset * form[1]
    _read(form[0], at, np.int64(n), np.int64(block.ctypes.data))


@loop
def store(block, address, form, offset, n):
    """Round block[:n] once into n elements; True if any is not finite."""
    at = address + offset * form[1]
    return _write(form[0], at, np.int64(n), np.int64(block.ctypes.data)) != 0


@loop
def magnitude(value):
    """The bits of |value| in fp32: an integer that orders as magnitudes do, NaN last."""
    return np.uint32(bits_of_f32(np.float32(value)) & _MAGNITUDE)
