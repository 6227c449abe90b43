# mypy: disable-error-code="call-arg, var-annotated"
"""Numbers of few bits, packed side by side: lanes, bit strings, bitmaps. Compiling only.

A block's first layer lies in lanes, so that rows of it move as vectors; the exceptions beyond it
are few and lie one behind the other, under a bitmap that says whose they are. The layouts are
those of `reference_packed`. A "value" is an unsigned integer as wide as the trained dtype.
"""

from __future__ import annotations

import numpy as np

from .bit_moves import (
    HAS_BIT_MOVES,
    add_row,
    count_ones,
    flags_above,
    gather_bits,
    gather_marked,
    get_row,
    get_split_row,
    load64,
    loop,
    put_rest_of_row,
    put_row,
    shl,
    spread_bits,
    spread_marked,
    store64,
    width_of,
)
from .reference_packed import BLOCK, MAX_LAYER_BITS


@loop
def pack_lanes(z, width, address):
    """The first layer: see `reference_packed._lanes`."""
    unsigned = z.dtype.type
    bits = width_of(unsigned(0))
    mask = unsigned(~unsigned(0))
    if width < bits:
        mask = unsigned(shl(unsigned(1), unsigned(width)) - unsigned(1))
    for row in range(bits):
        at = z.ctypes.data + row * (BLOCK // 8)
        word, shift = row * width // bits, row * width % bits
        low = address + word * (BLOCK // 8)
        by, back = unsigned(shift), unsigned(bits - shift)
        if shift == 0:
            put_row(low, at, at, by, by, mask)
        else:
            add_row(low, at, at, by, by, mask)
        if shift + width > bits:
            put_rest_of_row(low + BLOCK // 8, at, at, by, back, mask)


@loop
def unpack_lanes(address, width, z):
    """z = the values of the first layer at `address`."""
    unsigned = z.dtype.type
    bits = width_of(unsigned(0))
    mask = unsigned(~unsigned(0))
    if width < bits:
        mask = unsigned(shl(unsigned(1), unsigned(width)) - unsigned(1))
    for row in range(bits):
        at = z.ctypes.data + row * (BLOCK // 8)
        word, shift = row * width // bits, row * width % bits
        low = address + word * (BLOCK // 8)
        by, back = unsigned(shift), unsigned(bits - shift)
        if shift + width <= bits:
            get_row(at, low, low, by, by, mask)
        else:
            get_split_row(at, low, low + BLOCK // 8, by, back, mask)


@loop
def _lanes_of(values):
    """How many values a 64-bit word holds, and such a word of ones."""
    bits = width_of(values.dtype.type(0))
    if bits == 64:
        return 1, np.uint64(1)
    full = np.uint64((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
    return 64 // bits, np.uint64(~np.uint64(0)) // full


@loop
def put_bit_string(values, count, width, address):
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
            value = gather_bits(load64(source + i * values.itemsize), ones * mask)
            held = np.uint64(held | (value << np.uint64(used)))
            used += step
            if used >= 64:
                store64(at, held)
                at += 8
                used -= 64
                held = np.uint64(value >> np.uint64(step - used)) if used else np.uint64(0)
    for i in range(first, count):
        value = np.uint64(np.uint64(values[i]) & mask)
        held = np.uint64(held | (value << np.uint64(used)))
        used += width
        if used >= 64:
            store64(at, held)
            at += 8
            used -= 64
            held = np.uint64(value >> np.uint64(width - used)) if used else np.uint64(0)
    if used:
        store64(at, held)
        at += 8
    return at - address


@loop
def get_bit_string(address, count, width, values):
    """values[:count] from a bit string, and up to a word of rubbish behind them."""
    unsigned = values.dtype.type
    mask = np.uint64((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    bit = 0
    lanes, ones = _lanes_of(values)
    if HAS_BIT_MOVES and lanes > 1 and lanes * width <= MAX_LAYER_BITS:
        target = values.ctypes.data
        for i in range(0, count, lanes):
            word = load64(address + bit // 8) >> np.uint64(bit % 8)
            store64(target + i * values.itemsize, spread_bits(word, ones * mask))
            bit += lanes * width
        return
    for i in range(count):
        word = load64(address + bit // 8)
        values[i] = unsigned((word >> np.uint64(bit % 8)) & mask)
        bit += width


@loop
def put_flagged(values, count, width, address, high):
    """A bitmap of the values with bits beyond `width`, at `address`; those bits into high[:].

    Returns how many there are, at most half a block. `values` is 0 from `count` on.
    """
    unsigned = values.dtype.type
    by = unsigned(width)
    limit = unsigned(shl(unsigned(1), by) - unsigned(1))
    found = 0
    for start in range(0, count, 64):
        source = values.ctypes.data + start * values.itemsize
        word = flags_above(source, limit)
        store64(address + start // 8, word)
        if word:
            gather_marked(high, found, values, start, word, by)
            found += count_ones(word)
    return found


@loop
def add_flagged(values, count, width, bitmap, high, high_count):
    """values[j] |= high[k] << width for the k-th marked j; False if not high_count are marked.

    values has room for whole words of the bitmap.
    """
    by = values.dtype.type(width)
    found = 0
    for start in range(0, count, 64):
        word = load64(bitmap + start // 8)
        ones = count_ones(word)
        beyond = count - start < 64 and word >> np.uint64(count - start) != np.uint64(0)
        if beyond or found + ones > high_count:
            return False
        spread_marked(values, start, high, found, word, by)
        found += ones
    return found == high_count
