"""What the packed forms of a distribution vector are, in numpy: the specification that
`kernels.packed` is tested against. docs/vector-format.md says the same in words.

**exact.** Floating-point numbers of one width, sorted, are the integers in order: flip the sign bit
of the positive ones and all bits of the negative ones, and neighbouring numbers become neighbouring
integers (-0 and +0 too; infinities and every NaN have their places beyond the largest numbers). So
the distance from a reference value to the trained one is an integer, small where training moved
little, and reference + distance restores every bit. The distance, as an unsigned number z with the
small ones of either sign first (zigzag), is packed in blocks of 1024 in up to three layers: the low
w1 bits of all; of those that need more, marked in a bitmap, the next w2 bits; of those that need
still more, marked again, the last w3 bits. (An entropy coder would save another sixth, and decode
ten times slower.)

The reference value is the base's, converted to the trained dtype where they differ, and +0 where it
is NaN then, so that no machine's choice of NaN enters.

**int8, int4.** tau = q * scale, with one bf16 scale for 64 neighbouring elements: the largest
magnitude over 127 or 7, rounded up. The product is exact in fp32, so |error| <= scale / 2.
"""

from __future__ import annotations

import numpy as np

from .reference import STORAGE, round_to, upcast

BLOCK = 1024
"""Elements of a block of `exact`."""

CHUNK_BLOCKS = 32
CHUNK = CHUNK_BLOCKS * BLOCK
"""Elements of a chunk of `exact`: blocks laid end to end, the unit of its index."""

HEADER_BYTES = 8
SAME = -1
"""In place of the dtype code of the base: its bits are of the trained dtype."""

MAX_LAYER_BITS = 56
"""Widest second or third layer: its values are then read with one 64-bit load each."""

GROUP = 64
"""Elements that share a scale in int8 and int4."""

LEVELS = {8: 127, 4: 7}
"""Largest quantised magnitude by bits."""


def ordered(bits: np.ndarray) -> np.ndarray:
    """Place of each float on the line of all floats of its width; `bits` and result unsigned."""
    top = bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
    return np.where(bits & top, ~bits, bits | top)


def unordered(places: np.ndarray) -> np.ndarray:
    """The inverse of `ordered`."""
    top = places.dtype.type(1 << (places.dtype.itemsize * 8 - 1))
    return np.where(places & top, places ^ top, ~places)


def distance(reference: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """z, the zigzag distance from `reference` to `trained` (unsigned arrays of one width)."""
    width = reference.dtype.itemsize * 8
    steps = (ordered(trained) - ordered(reference)).view(f"i{width // 8}")
    return ((steps << 1) ^ (steps >> (width - 1))).view(reference.dtype)


def moved(reference: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The trained bits: the inverse of `distance`."""
    one = z.dtype.type(1)
    steps = (z >> one) ^ (~(z & one) + one)
    return unordered(ordered(reference) + steps)


def reference_bits(base: np.ndarray, base_code: int, trained_code: int) -> np.ndarray:
    """The values that distances start from: `base` (stored bits) as unsigned trained bits.

    Args:
        base_code, trained_code: dtype codes of `kernels.reference`; SAME takes the bits as they
            are.
    """
    if base_code == SAME:
        return base.view(f"u{base.itemsize}")
    width = STORAGE[trained_code].itemsize
    with np.errstate(invalid="ignore", over="ignore"):
        values = upcast(base, base_code, np.float64)
        return round_to(np.where(np.isnan(values), 0.0, values), trained_code).view(f"u{width}")


def pack_block(z: np.ndarray) -> bytes:
    """One block of at most BLOCK distances; a shorter one is filled up with zeros."""
    z = np.concatenate([z, np.zeros(BLOCK - z.size, z.dtype)])
    w1, w2, w3 = widths(z)
    wide = z.astype(np.uint64)
    high = wide >> np.uint64(w1) if w1 < 64 else wide * np.uint64(0)
    flagged = high != 0
    second = high[flagged]
    last = second >> np.uint64(w2)
    n1, n2 = second.size, int(np.count_nonzero(last))
    header = np.array([w1, w2, w3, 0], np.uint8).tobytes() + np.array([n1, n2], "<u2").tobytes()
    packed = header + _lanes(z, w1)
    if n1:
        packed += _bitmap(flagged) + _bit_string(second, w2)
    if n2:
        packed += _bitmap(last != 0) + _bit_string(last[last != 0], w3)
    return packed


def unpack_block(packed: bytes, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """The BLOCK distances at the start of `packed`, and the block's size in bytes."""
    w1, w2, w3 = packed[:3]
    n1, n2 = (int(n) for n in np.frombuffer(packed, "<u2", 2, 4))
    at = HEADER_BYTES
    z = _from_lanes(packed[at : at + 128 * w1], w1, dtype).astype(np.uint64)
    at += 128 * w1
    if n1:
        flagged, at = _from_bitmap(packed, at, BLOCK)
        second, at = _from_bit_string(packed, at, n1, w2)
        if n2:
            again, at = _from_bitmap(packed, at, n1)
            last, at = _from_bit_string(packed, at, n2, w3)
            second[again] |= last << np.uint64(w2)
        z[flagged] |= second << np.uint64(w1)
    return z.astype(dtype), at


def block_bytes(header: bytes, bits: int) -> int:
    """Size of the block that begins with `header`; 0 for one that no block can have.

    Args:
        bits: of an element.
    """
    if len(header) < HEADER_BYTES:
        return 0
    w1, w2, w3, zero = header[:4]
    n1, n2 = (int(n) for n in np.frombuffer(header, "<u2", 2, 4))
    if zero or w1 + w2 + w3 > bits or max(w2, w3) > MAX_LAYER_BITS:
        return 0
    if not n2 <= n1 <= BLOCK or (n1 == 0) != (w2 == 0) or (n2 == 0) != (w3 == 0):
        return 0
    size = HEADER_BYTES + BLOCK // 8 * w1
    if n1:
        size += BLOCK // 8 + -(-n1 * w2 // 64) * 8
    if n2:
        size += -(-n1 // 64) * 8 + -(-n2 * w3 // 64) * 8
    return size


def widths(z: np.ndarray) -> tuple[int, int, int]:
    """The layers' widths that take the fewest bits, by a search over all that are worth it.

    A first layer that leaves more than half of the elements to the second is not considered.
    """
    wide = z.astype(np.uint64)
    top = int(wide.max()).bit_length()
    counts = [int(np.count_nonzero(wide >> np.uint64(w))) for w in range(top)] + [0]
    best, chosen = BLOCK * top, (top, 0, 0)
    for w1 in range(top - 1, -1, -1):
        n1 = counts[w1]
        if n1 > BLOCK // 2:
            break
        for w2 in range(max(1, top - w1 - MAX_LAYER_BITS), min(MAX_LAYER_BITS, top - w1) + 1):
            n2 = counts[w1 + w2]
            w3 = top - w1 - w2
            cost = BLOCK * w1 + BLOCK + n1 * w2 + (n1 + n2 * w3 if n2 else 0)
            if cost < best:
                best, chosen = cost, (w1, w2, w3)
    return chosen


def _lanes(z: np.ndarray, width: int) -> bytes:
    """The first layer. With words as wide as an element there are BLOCK / word bits lanes; element
    row * lanes + lane has its bits at row * width of the lane's bit string, and word k of all lanes
    lies together: a row is packed by the same shift in every lane, which suits vector units."""
    bits = z.dtype.itemsize * 8
    lanes = BLOCK // bits
    strings = _to_bits(z, width).reshape(bits, lanes, width).transpose(1, 0, 2)
    words = np.packbits(strings.reshape(lanes, width, bits), axis=2, bitorder="little")
    return words.transpose(1, 0, 2).tobytes()


def _from_lanes(data: bytes, width: int, dtype: np.dtype) -> np.ndarray:
    bits = dtype.itemsize * 8
    lanes = BLOCK // bits
    words = np.frombuffer(data, np.uint8).reshape(width, lanes, dtype.itemsize)
    strings = np.unpackbits(words.transpose(1, 0, 2), axis=2, bitorder="little")
    rows = strings.reshape(lanes, bits, width).transpose(1, 0, 2)
    return _from_bits(rows.reshape(BLOCK, width)).astype(dtype)


def _bitmap(flags: np.ndarray) -> bytes:
    return _padded(np.packbits(flags, bitorder="little").tobytes())


def _from_bitmap(packed: bytes, at: int, count: int) -> tuple[np.ndarray, int]:
    size = -(-count // 64) * 8
    raw = np.frombuffer(packed, np.uint8, size, at)
    return np.unpackbits(raw, count=count, bitorder="little").astype(bool), at + size


def _bit_string(values: np.ndarray, width: int) -> bytes:
    return _padded(np.packbits(_to_bits(values, width), bitorder="little").tobytes())


def _from_bit_string(packed: bytes, at: int, count: int, width: int) -> tuple[np.ndarray, int]:
    size = -(-count * width // 64) * 8
    raw = np.frombuffer(packed, np.uint8, size, at)
    bits = np.unpackbits(raw, count=count * width, bitorder="little")
    return _from_bits(bits.reshape(count, width)), at + size


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _to_bits(values: np.ndarray, width: int) -> np.ndarray:
    """The low `width` bits of each value, lowest first: uint8 of shape (len(values), width)."""
    places = np.arange(width, dtype=np.uint64)
    return ((values.astype(np.uint64)[:, None] >> places) & np.uint64(1)).astype(np.uint8)


def _from_bits(bits: np.ndarray) -> np.ndarray:
    places = np.arange(bits.shape[1], dtype=np.uint64)
    return (bits.astype(np.uint64) << places).sum(axis=1, dtype=np.uint64)


def quantise(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 values as int8 or int4: (packed bytes as uint8, bf16 scales as uint16).

    The length is filled up with zeros to whole groups. int8: one two's complement byte an element.
    int4: byte j of a group of 64 holds element j in its low half, element 32 + j in its high half.
    """
    level = np.float32(LEVELS[bits])
    groups = np.concatenate([values, np.zeros(-values.size % GROUP, np.float32)])
    groups = groups.reshape(-1, GROUP)
    largest = np.abs(groups).max(axis=1, initial=0)
    with np.errstate(under="ignore"):
        scales = np.maximum(_bf16_up(largest / level), (largest > 0).astype(np.uint16))
    divisor = np.where(scales == 0, np.uint16(0x3F80), scales)
    with np.errstate(under="ignore"):
        quotient = groups / upcast(divisor, 0, np.float32)[:, None]
    q = np.rint(np.clip(quotient, -level, level)).astype(np.int8)
    if bits == 8:
        return q.view(np.uint8).reshape(-1), scales
    nibbles = (q & 15).view(np.uint8)
    return (nibbles[:, :32] | (nibbles[:, 32:] << 4)).reshape(-1), scales


def dequantise(packed: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The fp32 values of `quantise`'s result, whole groups."""
    if bits == 8:
        q = packed.view(np.int8).reshape(-1, GROUP)
    else:
        nibbles = packed.reshape(-1, GROUP // 2)
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).view(np.int8)
        q = (q ^ 8) - 8
    return (q.astype(np.float32) * upcast(scales, 0, np.float32)[:, None]).reshape(-1)


def _bf16_up(values: np.ndarray) -> np.ndarray:
    """Non-negative fp32 as bf16, rounded up: the scale must reach the largest magnitude."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
