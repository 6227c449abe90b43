# mypy: disable-error-code="call-arg, var-annotated"
"""The loops of `kernels.packed`. Imports numba: compiling only.

Blocks are typed views of scratch memory; the width of their elements is a constant of the code.
Narrow integer shifts are spelled out as instructions, since the compiler would widen them to 64
bits. A "value" below is an unsigned integer as wide as the trained dtype.
"""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .elements import array, bits_of_f32, f32_of_bits, reader, writer
from .reference import STORAGE
from .reference_packed import (
    BLOCK,
    CHUNK_BLOCKS,
    GROUP,
    HEADER_BYTES,
    MAX_LAYER_BITS,
    SAME,
)

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


_shl, _shr = _binary("shl"), _binary("lshr")


@intrinsic
def _bits(_context, value):
    """The width of the type of `value`, known to the compiler (an array's itemsize is not)."""

    def generate(context, _builder, _signature, _args):
        return context.get_constant(types.int64, value.bitwidth)

    return types.int64(value), generate


@intrinsic
def _trailing_zeros(_context, value):
    """Of a uint64 that is not zero."""

    def generate(_target_context, builder, _signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def _ones(_context, value):
    """How many bits of a uint64 are set."""

    def generate(_target_context, builder, _signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


@intrinsic
def _flags(_context, address, limit):
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


_gather_bits = _bit_move("pext") if HAS_BIT_MOVES else _unmoved
_spread_bits = _bit_move("pdep") if HAS_BIT_MOVES else _unmoved


@intrinsic
def _load64(_context, address):
    """The little-endian uint64 at any address."""

    def generate(_target_context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.int64), generate


@intrinsic
def _store64(_context, address, value):
    """Write a little-endian uint64 to any address."""

    def generate(context, builder, _signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store(args[1], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), generate


def filler(base_code: int, code: int, dtype: type):
    """A jitted (base, start, n, reference) that gives the address of the references of n elements
    of `base`, from `start` on: of `reference`, filled, or in the base.

    base_code: of the array at `base`, or SAME; code: of the trained elements, `dtype`
    their bits. See `reference_packed.reference_bits`.
    """
    itemsize = np.dtype(dtype).itemsize
    if base_code == SAME:

        @loop
        def fill(base, start, n, reference):
            return base + start * itemsize

    else:
        read, write = reader(base_code), writer(code, True)
        size = STORAGE[base_code].itemsize

        @loop
        def fill(base, start, n, reference):
            for j in range(n):
                value = np.float64(read(base + start * size, j))
                write(reference.ctypes.data, j, value if value == value else 0.0)
            return reference.ctypes.data

    return fill


@loop
def _distances(trained, reference, n, z):
    """z[:n] = distance from reference to trained; the rest of the block is 0. Returns their OR."""
    unsigned = z.dtype.type
    last = unsigned(_bits(unsigned(0)) - 1)
    top = _shl(unsigned(1), last)
    nothing, one = unsigned(0), unsigned(1)
    seen = nothing
    for j in range(n):
        new = unsigned(trained[j] ^ unsigned(unsigned(nothing - _shr(trained[j], last)) | top))
        old = unsigned(reference[j] ^ unsigned(unsigned(nothing - _shr(reference[j], last)) | top))
        steps = unsigned(new - old)
        z[j] = unsigned(_shl(steps, one) ^ unsigned(nothing - _shr(steps, last)))
        seen = unsigned(seen | z[j])
    for j in range(n, BLOCK):
        z[j] = nothing
    return seen


@loop
def _move(z, reference, n, out):
    """out[j] = reference[j] moved by the distance z[j]: the trained bits."""
    unsigned = z.dtype.type
    last = unsigned(_bits(unsigned(0)) - 1)
    top = _shl(unsigned(1), last)
    nothing, one = unsigned(0), unsigned(1)
    for j in range(n):
        steps = unsigned(_shr(z[j], one) ^ unsigned(nothing - unsigned(z[j] & one)))
        old = unsigned(reference[j] ^ unsigned(unsigned(nothing - _shr(reference[j], last)) | top))
        place = unsigned(old + steps)
        out[j] = unsigned(place ^ unsigned(unsigned(_shr(place, last) - one) | top))


@loop
def _choose(z, top, counts):
    """The layers' widths, as `reference_packed.widths` finds them."""
    unsigned = z.dtype.type
    best, w1_best, w2_best, w3_best = BLOCK * top, top, 0, 0
    counts[top] = 0
    for w1 in range(top - 1, -1, -1):
        limit = unsigned(_shl(unsigned(1), unsigned(w1)) - unsigned(1))
        total = 0
        for start in range(0, BLOCK, 64):
            total += _ones(_flags(z.ctypes.data + start * z.itemsize, limit))
        counts[w1] = total
        if total > BLOCK // 2:
            break
        for w2 in range(max(1, top - w1 - MAX_LAYER_BITS), min(MAX_LAYER_BITS, top - w1) + 1):
            n2 = counts[w1 + w2]
            w3 = top - w1 - w2
            cost = BLOCK * w1 + BLOCK + total * w2
            if n2:
                cost += total + n2 * w3
            if cost < best:
                best, w1_best, w2_best, w3_best = cost, w1, w2, w3
    return w1_best, w2_best, w3_best


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


_get_row = _row(lambda b, load, by, back, mask: b.and_(b.lshr(load(1), by), mask))
_get_split_row = _row(
    lambda b, load, by, back, mask: b.and_(b.or_(b.lshr(load(1), by), b.shl(load(2), back)), mask)
)
_put_row = _row(lambda b, load, by, back, mask: b.and_(load(1), mask))
_add_row = _row(lambda b, load, by, back, mask: b.or_(load(0), b.shl(b.and_(load(1), mask), by)))
_put_rest_of_row = _row(lambda b, load, by, back, mask: b.lshr(b.and_(load(1), mask), back))


@loop
def _pack_lanes(z, width, address):
    """The first layer: see `reference_packed._lanes`."""
    unsigned = z.dtype.type
    bits = _bits(unsigned(0))
    mask = unsigned(~unsigned(0))
    if width < bits:
        mask = unsigned(_shl(unsigned(1), unsigned(width)) - unsigned(1))
    for row in range(bits):
        at = z.ctypes.data + row * (BLOCK // 8)
        word, shift = row * width // bits, row * width % bits
        low = address + word * (BLOCK // 8)
        by, back = unsigned(shift), unsigned(bits - shift)
        if shift == 0:
            _put_row(low, at, at, by, by, mask)
        else:
            _add_row(low, at, at, by, by, mask)
        if shift + width > bits:
            _put_rest_of_row(low + BLOCK // 8, at, at, by, back, mask)


@loop
def _unpack_lanes(address, width, z):
    unsigned = z.dtype.type
    bits = _bits(unsigned(0))
    mask = unsigned(~unsigned(0))
    if width < bits:
        mask = unsigned(_shl(unsigned(1), unsigned(width)) - unsigned(1))
    for row in range(bits):
        at = z.ctypes.data + row * (BLOCK // 8)
        word, shift = row * width // bits, row * width % bits
        low = address + word * (BLOCK // 8)
        by, back = unsigned(shift), unsigned(bits - shift)
        if shift + width <= bits:
            _get_row(at, low, low, by, by, mask)
        else:
            _get_split_row(at, low, low + BLOCK // 8, by, back, mask)


@loop
def _lanes_of(values):
    """How many values a 64-bit word holds, and such a word of ones."""
    bits = _bits(values.dtype.type(0))
    if bits == 64:
        return 1, np.uint64(1)
    full = np.uint64((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
    return 64 // bits, np.uint64(~np.uint64(0)) // full


@loop
def _put_bit_string(values, count, width, address):
    """Values as a bit string of whole 64-bit words; returns its bytes. width <= MAX_LAYER_BITS."""
    mask = np.uint64((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    held, used, at = np.uint64(0), 0, address
    first = 0
    lanes, ones = _lanes_of(values)
    if HAS_BIT_MOVES and lanes > 1 and lanes * width < 64:
        step = lanes * width
        source = values.ctypes.data
        first = count // lanes * lanes
        for i in range(0, first, lanes):
            value = _gather_bits(_load64(source + i * values.itemsize), ones * mask)
            held = np.uint64(held | (value << np.uint64(used)))
            used += step
            if used >= 64:
                _store64(at, held)
                at += 8
                used -= 64
                held = np.uint64(value >> np.uint64(step - used)) if used else np.uint64(0)
    for i in range(first, count):
        value = np.uint64(np.uint64(values[i]) & mask)
        held = np.uint64(held | (value << np.uint64(used)))
        used += width
        if used >= 64:
            _store64(at, held)
            at += 8
            used -= 64
            held = np.uint64(value >> np.uint64(width - used)) if used else np.uint64(0)
    if used:
        _store64(at, held)
        at += 8
    return at - address


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
                target[k] = _shr(source[begin + np.int64(_trailing_zeros(word))], by)
                k += 1
                word = np.uint64(word & np.uint64(word - np.uint64(1)))

    return gather


_gather = _gatherer()


@loop
def _put_flagged(values, count, width, address, high):
    """A bitmap of the values with bits beyond `width`, at `address`; those bits into high[:].

    Returns how many there are, at most half a block. `values` is 0 from `count` on.
    """
    unsigned = values.dtype.type
    by = unsigned(width)
    limit = unsigned(_shl(unsigned(1), by) - unsigned(1))
    found = 0
    for start in range(0, count, 64):
        source = values.ctypes.data + start * values.itemsize
        word = _flags(source, limit)
        _store64(address + start // 8, word)
        if word:
            _gather(high, found, values, start, word, by)
            found += _ones(word)
    return found


@loop
def _pack_block(z, seen, second, third, counts, address):
    """Write a block to `address`; returns its bytes."""
    unsigned = z.dtype.type
    top = 0
    while top < 64 and np.uint64(seen) >> np.uint64(top):
        top += 1
    w1, w2, w3 = _choose(z, top, counts)
    n1, n2 = 0, 0
    at = address + HEADER_BYTES
    _pack_lanes(z, w1, at)
    at += w1 * (BLOCK // 8)
    if w2:
        n1 = _put_flagged(z, BLOCK, w1, at, second)
        at += BLOCK // 8
        at += _put_bit_string(second, n1, w2, at)
    if w3:
        for j in range(n1, (n1 + 63) // 64 * 64):
            second[j] = unsigned(0)
        n2 = _put_flagged(second, n1, w2, at, third)
        at += (n1 + 63) // 64 * 8
        at += _put_bit_string(third, n2, w3, at)
    header = np.uint64(w1 | (w2 << 8) | (w3 << 16) | (n1 << 32) | (n2 << 48))
    _store64(address, header)
    return at - address


@loop
def blocks_at(scratch, dtype):
    """Four blocks of `dtype` in the scratch memory."""
    step = 8 * BLOCK
    return (
        array(scratch, dtype, BLOCK),
        array(scratch + step, dtype, BLOCK),
        array(scratch + 2 * step, dtype, BLOCK),
        array(scratch + 3 * step, dtype, BLOCK),
    )


@loop
def pack_chunks(trained, base, elems, out, sizes, blocks, counts, fill):
    """`packed.pack_exact` on typed scratch; returns the bytes written to `out`."""
    z, reference, second, third = blocks
    unsigned = z.dtype.type
    at, chunk_start, chunk = out, out, 0
    for start in range(0, elems, BLOCK):
        n = min(BLOCK, elems - start)
        start_bits = array(fill(base, start, n, reference), unsigned, n)
        bits = array(trained + start * z.itemsize, unsigned, n)
        seen = _distances(bits, start_bits, n, z)
        at += _pack_block(z, seen, second, third, counts, at)
        if start // BLOCK % CHUNK_BLOCKS == CHUNK_BLOCKS - 1 or start + n == elems:
            sizes[chunk] = at - chunk_start
            chunk_start = at
            chunk += 1
    return at - out


@loop
def _block_bytes(header, bits):
    """Bytes of the block with this header, or 0 for a header that no block can have."""
    w1, w2, w3 = header & 0xFF, (header >> 8) & 0xFF, (header >> 16) & 0xFF
    n1, n2 = (header >> 32) & 0xFFFF, (header >> 48) & 0xFFFF
    if (header >> 24) & 0xFF or w1 + w2 + w3 > bits or max(w2, w3) > MAX_LAYER_BITS:
        return 0
    if n1 > BLOCK or n2 > n1 or (n1 == 0) != (w2 == 0) or (n2 == 0) != (w3 == 0):
        return 0
    size = HEADER_BYTES + w1 * (BLOCK // 8)
    if n1:
        size += BLOCK // 8 + (n1 * w2 + 63) // 64 * 8
    if n2:
        size += (n1 + 63) // 64 * 8 + (n2 * w3 + 63) // 64 * 8
    return size


@loop
def _get_bit_string(address, count, width, values):
    """values[:count] from a bit string, and up to a word of rubbish behind them."""
    unsigned = values.dtype.type
    mask = np.uint64((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    bit = 0
    lanes, ones = _lanes_of(values)
    if HAS_BIT_MOVES and lanes > 1 and lanes * width <= MAX_LAYER_BITS:
        target = values.ctypes.data
        for i in range(0, count, lanes):
            word = _load64(address + bit // 8) >> np.uint64(bit % 8)
            _store64(target + i * values.itemsize, _spread_bits(word, ones * mask))
            bit += lanes * width
        return
    for i in range(count):
        word = _load64(address + bit // 8)
        values[i] = unsigned((word >> np.uint64(bit % 8)) & mask)
        bit += width


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
                j = to + np.int64(_trailing_zeros(word))
                target[j] = unsigned(target[j] | _shl(source[k], by))
                k += 1
                word = np.uint64(word & np.uint64(word - np.uint64(1)))

    return spread_out


_spread_out = _spreader()


@loop
def _add_flagged(values, count, width, bitmap, high, high_count):
    """values[j] |= high[k] << width for the k-th marked j; False if not high_count are marked.

    values has room for whole words of the bitmap.
    """
    by = values.dtype.type(width)
    found = 0
    for start in range(0, count, 64):
        word = _load64(bitmap + start // 8)
        ones = _ones(word)
        beyond = count - start < 64 and word >> np.uint64(count - start) != np.uint64(0)
        if beyond or found + ones > high_count:
            return False
        _spread_out(values, start, high, found, word, by)
        found += ones
    return found == high_count


@loop
def _unpack_block(address, header, z, second, third):
    """z = the block's distances; False when a bitmap does not mark as many as the header says."""
    unsigned = z.dtype.type
    w1, w2, w3 = header & 0xFF, (header >> 8) & 0xFF, (header >> 16) & 0xFF
    n1, n2 = (header >> 32) & 0xFFFF, (header >> 48) & 0xFFFF
    at = address + HEADER_BYTES
    if w1:
        _unpack_lanes(at, w1, z)
    else:
        for j in range(BLOCK):
            z[j] = unsigned(0)
    at += w1 * (BLOCK // 8)
    if n1 == 0:
        return True
    strings = at + BLOCK // 8
    _get_bit_string(strings, n1, w2, second)
    if n2:
        again = strings + (n1 * w2 + 63) // 64 * 8
        _get_bit_string(again + (n1 + 63) // 64 * 8, n2, w3, third)
        if not _add_flagged(second, n1, w2, again, third, n2):
            return False
    return _add_flagged(z, BLOCK, w1, at, second, n1)


@loop
def unpack_chunks(data, sizes, skip, left, elems, base, out, blocks, fill):
    """`packed.unpack_exact`; 0, or 1 + the number of the first block not as it must be."""
    z, reference, second, third = blocks
    unsigned = z.dtype.type
    block, chunk, done = 0, 0, 0
    at, end = data, data
    while done < elems:
        if block % CHUNK_BLOCKS == 0:
            if at != end:
                return block
            end = at + sizes[chunk]
            chunk += 1
        first = block * BLOCK
        header, size = np.int64(0), 0
        if end - at >= HEADER_BYTES:
            header = np.int64(_load64(at))
            size = _block_bytes(header, _bits(unsigned(0)))
        is_last = first + BLOCK >= left
        if size == 0 or size > end - at or (is_last and size != end - at):
            return block + 1
        if first + BLOCK > skip:
            if not _unpack_block(at, header, z, second, third):
                return block + 1
            inside = max(skip - first, 0)
            n = min(BLOCK - inside, elems - done)
            start_bits = array(fill(base, done, n, reference), unsigned, n)
            target = array(out + done * z.itemsize, unsigned, n)
            _move(z[inside:], start_bits, n, target)
            done += n
        at += size
        block += 1
    return 0


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
