# mypy: disable-error-code="call-arg, var-annotated"
"""Moves of bits and marked elements, each for one instruction. Imports numba: compiling only.

Narrow integer shifts are spelled out, since the compiler would widen them to 64 bits; moves of a
whole row of elements are one vector each, whatever the machine's vectors are. Where a processor
lacks an instruction, a loop stands in its place, or the caller asks HAS_BIT_MOVES.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .reference_packed import BLOCK

loop = njit(error_model="numpy")


HAS_COMPRESS = llvm.llvm_version_info[0] >= 19 and llvm.get_host_cpu_features().get(
    "avx512vbmi2", False
)
"""Whether this processor gathers marked elements of a vector by one instruction, and LLVM knows it.
Without, the compiler's way around is slower than a plain loop over the marks."""


HAS_BIT_MOVES = llvm.get_host_cpu_features().get("bmi2", False)
if llvm.get_host_cpu_name() in ("znver1", "znver2"):  # these spell the instructions out
    HAS_BIT_MOVES = False
"""Whether this processor moves the bits of a word under a mask by one quick instruction: then as
many values as fit into a word go into a bit string, or come out of it, at once."""


def _binary(name):
    """An intrinsic for one instruction on two integers of one type: no widening."""

    @intrinsic
    def operate(_context, left, right):
        def generate(_target_context, builder, _signature, args):
            return getattr(builder, name)(args[0], args[1])

        return left(left, left), generate

    return operate


shl, shr = _binary("shl"), _binary("lshr")


@intrinsic
def width_of(_context, value):
    """The width of the type of `value`, known to the compiler (an array's itemsize is not)."""

    def generate(context, _builder, _signature, _args):
        return context.get_constant(types.int64, value.bitwidth)

    return types.int64(value), generate


@intrinsic
def trailing_zeros(_context, value):
    """Of a uint64 that is not zero."""

    def generate(_target_context, builder, _signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def count_ones(_context, value):
    """How many bits of a uint64 are set."""

    def generate(_target_context, builder, _signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def flags_above(_context, address, limit):
    """Bit j: whether element j of the 64 at `address` is greater than `limit`, unsigned."""

    def generate(_target_context, builder, _signature, args):
        vector = ir.VectorType(ir.IntType(limit.bitwidth), 64)
        values = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=1)
        flags = builder.icmp_unsigned(">", values, _spread(builder, args[1], 64))
        return builder.bitcast(flags, ir.IntType(64))

    return types.uint64(types.int64, limit), generate


def _spread(builder, value, lanes):
    """LLVM steps: a vector of `lanes` times `value`."""
    vector = ir.VectorType(value.type, lanes)
    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    first = ir.Constant(ir.IntType(32), 0)
    alone = builder.insert_element(ir.Constant(vector, ir.Undefined), value, first)
    return builder.shuffle_vector(alone, alone, places)


def _bit_move(name):
    """An intrinsic for pext or pdep: the bits of `word` under `mask` gathered, or spread."""

    @intrinsic
    def operate(_context, word, mask):
        def generate(_target_context, builder, _signature, args):
            wide = ir.IntType(64)
            signature = ir.FunctionType(wide, [wide, wide])
            instruction = f"llvm.x86.bmi.{name}.64"
            function = cgutils.get_or_insert_function(builder.module, signature, instruction)
            return builder.call(function, args)

        return types.uint64(types.uint64, types.uint64), generate

    return operate


@loop
def _unmoved(word, mask):
    """Stands where a processor cannot move bits, and is not called."""
    return word


gather_bits = _bit_move("pext") if HAS_BIT_MOVES else _unmoved
spread_bits = _bit_move("pdep") if HAS_BIT_MOVES else _unmoved


@intrinsic
def load64(_context, address):
    """The little-endian uint64 at any address."""

    def generate(_target_context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.int64), generate


@intrinsic
def store64(_context, address, value):
    """Write a little-endian uint64 to any address."""

    def generate(context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store(args[1], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), generate


def _row(steps):
    """An intrinsic on one row of lanes as a single vector, whatever the machine's vectors are.

    As a loop this would be unrolled, not vectorised. `steps` makes the new row at `target` from
    the builder, the rows at `target`, `source` and `other`, and the spread-out shifts and mask.
    """

    @intrinsic
    def operate(_context, target, source, other, by, back, mask):
        def generate(context, builder, _signature, args):
            lanes = BLOCK // mask.bitwidth
            vector = ir.VectorType(ir.IntType(mask.bitwidth), lanes)
            rows = [builder.inttoptr(address, vector.as_pointer()) for address in args[:3]]

            def load(row):
                return builder.load(rows[row], align=1)

            result = steps(builder, load, *(_spread(builder, arg, lanes) for arg in args[3:]))
            builder.store(result, rows[0], align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, mask, mask, mask), generate

    return operate


get_row = _row(lambda b, load, by, back, mask: b.and_(b.lshr(load(1), by), mask))
get_split_row = _row(
    lambda b, load, by, back, mask: b.and_(b.or_(b.lshr(load(1), by), b.shl(load(2), back)), mask)
)
put_row = _row(lambda b, load, by, back, mask: b.and_(load(1), mask))
add_row = _row(lambda b, load, by, back, mask: b.or_(load(0), b.shl(b.and_(load(1), mask), by)))
put_rest_of_row = _row(lambda b, load, by, back, mask: b.lshr(b.and_(load(1), mask), back))


@intrinsic
def _compress(_context, target, source, word, by):
    """target[k] = source[j] >> by for the k-th set bit j of `word`; then 64 bytes of rubbish."""

    def generate(context, builder, _signature, args):
        width = by.bitwidth
        lanes = 512 // width
        vector = ir.VectorType(ir.IntType(width), lanes)
        flags = ir.VectorType(ir.IntType(1), lanes)
        signature = ir.FunctionType(vector, [vector, flags, vector])
        name = f"llvm.experimental.vector.compress.v{lanes}i{width}"
        compress = cgutils.get_or_insert_function(builder.module, signature, name)
        write, read, word = args[:3]
        shifts = _spread(builder, args[3], lanes)
        for start in range(0, 64, lanes):
            bits = builder.lshr(word, ir.Constant(word.type, start))
            bits = builder.trunc(bits, ir.IntType(lanes)) if lanes < 64 else bits
            place = builder.add(read, ir.Constant(read.type, start * width // 8))
            values = builder.load(builder.inttoptr(place, vector.as_pointer()), align=1)
            values = builder.lshr(values, shifts)
            wanted = builder.bitcast(bits, flags)
            chosen = builder.call(compress, [values, wanted, ir.Constant(vector, ir.Undefined)])
            builder.store(chosen, builder.inttoptr(write, vector.as_pointer()), align=1)
            ones = builder.ctpop(bits)
            ones = builder.zext(ones, write.type) if lanes < 64 else ones
            write = builder.add(write, builder.mul(ones, ir.Constant(write.type, width // 8)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64, by), generate


def _gatherer():
    """A jitted (target, to, source, begin, word, by): target[to + k] = source[begin + j] >> by for
    the k-th set bit j of `word`; 64 bytes behind them may change."""
    if HAS_COMPRESS:

        @loop
        def gather(target, to, source, begin, word, by):
            size = target.itemsize
            _compress(target.ctypes.data + to * size, source.ctypes.data + begin * size, word, by)

    else:

        @loop
        def gather(target, to, source, begin, word, by):
            k = to
            while word:
                target[k] = shr(source[begin + np.int64(trailing_zeros(word))], by)
                k += 1
                word = np.uint64(word & np.uint64(word - np.uint64(1)))

    return gather


gather_marked = _gatherer()


@intrinsic
def _expand(_context, target, source, word, by):
    """target[j] |= source[k] << by for the k-th set bit j of `word`; 64 elements at target."""

    def generate(context, builder, _signature, args):
        width = by.bitwidth
        lanes = 512 // width
        vector = ir.VectorType(ir.IntType(width), lanes)
        flags = ir.VectorType(ir.IntType(1), lanes)
        signature = ir.FunctionType(vector, [vector.as_pointer(), flags, vector])
        name = f"llvm.masked.expandload.v{lanes}i{width}"
        expand = cgutils.get_or_insert_function(builder.module, signature, name)
        at, read, word = args[:3]
        shifts = _spread(builder, args[3], lanes)
        for start in range(0, 64, lanes):
            bits = builder.lshr(word, ir.Constant(word.type, start))
            bits = builder.trunc(bits, ir.IntType(lanes)) if lanes < 64 else bits
            pointer = builder.inttoptr(read, vector.as_pointer())
            none = ir.Constant(vector, [0] * lanes)
            new = builder.call(expand, [pointer, builder.bitcast(bits, flags), none])
            place = builder.inttoptr(
                builder.add(at, ir.Constant(at.type, start * width // 8)), vector.as_pointer()
            )
            held = builder.load(place, align=1)
            builder.store(builder.or_(held, builder.shl(new, shifts)), place, align=1)
            ones = builder.ctpop(bits)
            ones = builder.zext(ones, at.type) if lanes < 64 else ones
            read = builder.add(read, builder.mul(ones, ir.Constant(at.type, width // 8)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint64, by), generate


def _spreader():
    """A jitted (target, to, source, begin, word, by): target[to + j] |= source[begin + k] << by for
    the k-th set bit j of `word`."""
    if HAS_COMPRESS:

        @loop
        def spread_out(target, to, source, begin, word, by):
            size = target.itemsize
            _expand(target.ctypes.data + to * size, source.ctypes.data + begin * size, word, by)

    else:

        @loop
        def spread_out(target, to, source, begin, word, by):
            unsigned = target.dtype.type
            k = begin
            while word:
                j = to + np.int64(trailing_zeros(word))
                target[j] = unsigned(target[j] | shl(source[k], by))
                k += 1
                word = np.uint64(word & np.uint64(word - np.uint64(1)))

    return spread_out


spread_marked = _spreader()
