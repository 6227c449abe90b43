# mypy: disable-error-code="call-arg, var-annotated"
"""The loops of `packed.pack_exact` and `packed.unpack_exact`. Imports numba: compiling only.

Blocks are typed views of scratch memory; the width of their elements is a constant of the code.
"""

from __future__ import annotations

import numpy as np

from .bit_moves import count_ones, flags_above, load64, loop, shl, shr, store64, width_of
from .bit_strings import (
    add_flagged,
    get_bit_string,
    pack_lanes,
    put_bit_string,
    put_flagged,
    unpack_lanes,
)
from .elements import array, reader, writer
from .reference import STORAGE
from .reference_packed import BLOCK, CHUNK_BLOCKS, HEADER_BYTES, MAX_LAYER_BITS, SAME


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
    last = unsigned(width_of(unsigned(0)) - 1)
    top = shl(unsigned(1), last)
    nothing, one = unsigned(0), unsigned(1)
    seen = nothing
    for j in range(n):
        new = unsigned(trained[j] ^ unsigned(unsigned(nothing - shr(trained[j], last)) | top))
        old = unsigned(reference[j] ^ unsigned(unsigned(nothing - shr(reference[j], last)) | top))
        steps = unsigned(new - old)
        z[j] = unsigned(shl(steps, one) ^ unsigned(nothing - shr(steps, last)))
        seen = unsigned(seen | z[j])
    for j in range(n, BLOCK):
        z[j] = nothing
    return seen


@loop
def _move(z, reference, n, out):
    """out[j] = reference[j] moved by the distance z[j]: the trained bits."""
    unsigned = z.dtype.type
    last = unsigned(width_of(unsigned(0)) - 1)
    top = shl(unsigned(1), last)
    nothing, one = unsigned(0), unsigned(1)
    for j in range(n):
        steps = unsigned(shr(z[j], one) ^ unsigned(nothing - unsigned(z[j] & one)))
        old = unsigned(reference[j] ^ unsigned(unsigned(nothing - shr(reference[j], last)) | top))
        place = unsigned(old + steps)
        out[j] = unsigned(place ^ unsigned(unsigned(shr(place, last) - one) | top))


@loop
def _choose(z, top, counts):
    """The layers' widths, as `reference_packed.widths` finds them."""
    unsigned = z.dtype.type
    best, w1_best, w2_best, w3_best = BLOCK * top, top, 0, 0
    counts[top] = 0
    for w1 in range(top - 1, -1, -1):
        limit = unsigned(shl(unsigned(1), unsigned(w1)) - unsigned(1))
        total = 0
        for start in range(0, BLOCK, 64):
            total += count_ones(flags_above(z.ctypes.data + start * z.itemsize, limit))
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
    pack_lanes(z, w1, at)
    at += w1 * (BLOCK // 8)
    if w2:
        n1 = put_flagged(z, BLOCK, w1, at, second)
        at += BLOCK // 8
        at += put_bit_string(second, n1, w2, at)
    if w3:
        for j in range(n1, (n1 + 63) // 64 * 64):
            second[j] = unsigned(0)
        n2 = put_flagged(second, n1, w2, at, third)
        at += (n1 + 63) // 64 * 8
        at += put_bit_string(third, n2, w3, at)
    header = np.uint64(w1 | (w2 << 8) | (w3 << 16) | (n1 << 32) | (n2 << 48))
    store64(address, header)
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
def _unpack_block(address, header, z, second, third):
    """z = the block's distances; False when a bitmap does not mark as many as the header says."""
    unsigned = z.dtype.type
    w1, w2, w3 = header & 0xFF, (header >> 8) & 0xFF, (header >> 16) & 0xFF
    n1, n2 = (header >> 32) & 0xFFFF, (header >> 48) & 0xFFFF
    at = address + HEADER_BYTES
    if w1:
        unpack_lanes(at, w1, z)
    else:
        for j in range(BLOCK):
            z[j] = unsigned(0)
    at += w1 * (BLOCK // 8)
    if n1 == 0:
        return True
    strings = at + BLOCK // 8
    get_bit_string(strings, n1, w2, second)
    if n2:
        again = strings + (n1 * w2 + 63) // 64 * 8
        get_bit_string(again + (n1 + 63) // 64 * 8, n2, w3, third)
        if not add_flagged(second, n1, w2, again, third, n2):
            return False
    return add_flagged(z, BLOCK, w1, at, second, n1)


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
            header = np.int64(load64(at))
            size = _block_bytes(header, width_of(unsigned(0)))
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
