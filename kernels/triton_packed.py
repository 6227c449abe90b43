"""The exact form of a distribution vector, unpacked in a GPU's memory.

`reference_packed` says what the bytes mean. A program takes a chunk: block by block it reads the
layers' widths, fetches each element's bits where they lie, counts within the block (a prefix sum
over the bitmap) which of the longer ones is whose, and moves the base's bits by the distance. So
the packed bytes alone need cross the bus, a half or a third of the model.

What is read is checked on the way: a width, a count or a size that cannot be raises the flag, and
nothing is read or written out of bounds. (int8 and int4 need no kernel of their own: see
`triton_elements`.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import F64, STORAGE
from .reference_packed import BLOCK, CHUNK_BLOCKS, HEADER_BYTES, MAX_LAYER_BITS, SAME
from .triton_elements import _plus, rounded, upcast
from .triton_launch import OPTIONS, bits, flag_on, on_device

_BLOCK, _CHUNK_BLOCKS, _HEADER = map(tl.constexpr, (BLOCK, CHUNK_BLOCKS, HEADER_BYTES))
_MOST, _SAME, _F64 = map(tl.constexpr, (MAX_LAYER_BITS, SAME, F64))


@triton.jit
def _word(data, first, bit, width, there):
    """`width` bits, at most 56, from bit number `bit` of the 64-bit words from byte `first` on."""
    word = data + first // 8 + bit // 64
    shift = (bit % 64).to(tl.uint64)
    low = tl.load(word, there, 0).to(tl.uint64, bitcast=True) >> shift
    more = there & (bit % 64 + width > 64)
    high = tl.load(word + 1, more, 0).to(tl.uint64, bitcast=True) << ((64 - shift) & 63)
    both = low | tl.where(more, high, 0)
    return both & ((tl.full(bit.shape, 1, tl.uint64) << width.to(tl.uint64)) - 1)


@triton.jit
def _lanes(data, first, element, width, there, BITS: tl.constexpr):
    """The first layer: rows of lanes, word k of all lanes together."""
    lanes: tl.constexpr = _BLOCK // BITS
    mask: tl.constexpr = (1 << BITS) - 1
    at = element // lanes * width
    # Words of BITS bits within the 64-bit words in which they lie.
    number = at // BITS * lanes + element % lanes
    shift = (at % BITS).to(tl.uint64)
    low = _word_of(data, first, number, there & (element < width * _BLOCK), BITS) >> shift
    more = there & (at % BITS + width > BITS)
    high = _word_of(data, first, number + lanes, more, BITS) << ((BITS - shift) & 63)
    value = low | tl.where(more, high, 0)
    ones = (tl.full(element.shape, 1, tl.uint64) << (width & 63).to(tl.uint64)) - 1
    return value & tl.where(width >= BITS, tl.full(element.shape, mask, tl.uint64), ones)


@triton.jit
def _word_of(data, first, number, there, BITS: tl.constexpr):
    """Word `number` of BITS bits from byte `first` on."""
    each: tl.constexpr = 64 // BITS
    word = tl.load(data + first // 8 + number // each, there, 0).to(tl.uint64, bitcast=True)
    word = word >> (number % each * BITS).to(tl.uint64)
    if BITS == 64:
        return word
    else:
        return word & ((1 << BITS) - 1)


@triton.jit
def _place(bit_pattern, BITS: tl.constexpr):
    """Place of each float on the line of all floats of its width, as uint64."""
    ones: tl.constexpr = (1 << BITS) - 1
    top: tl.constexpr = 1 << (BITS - 1)
    return tl.where((bit_pattern & top) != 0, bit_pattern ^ ones, bit_pattern | top)


@triton.jit
def _float_at(place, BITS: tl.constexpr):
    """The inverse of `_place`."""
    ones: tl.constexpr = (1 << BITS) - 1
    top: tl.constexpr = 1 << (BITS - 1)
    return tl.where((place & top) != 0, place ^ top, place ^ ones)


@triton.jit
def _origin(base, at, there, BASE: tl.constexpr, CODE: tl.constexpr, BITS: tl.constexpr):
    """The base's elements as trained bits, +0 where they are NaN then, as uint64."""
    stored = tl.load(base + at, there, 0)
    if BASE != _SAME:
        value = upcast(stored, BASE, tl.float64)
        stored = rounded(tl.where(value == value, value, 0.0), CODE)
    if BITS == 64:
        return stored.to(tl.uint64, bitcast=True)
    else:
        return stored.to(tl.int64).to(tl.uint64, bitcast=True) & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["size", "elems"])
def unpack_kernel(
    data, size: tl.int64, index, base, out, flag, elems: tl.int64,
    BASE: tl.constexpr, CODE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One chunk per program.

    data: int64 words, `size` bytes; index: the byte at which each chunk begins, from any origin.
    """
    chunk = tl.program_id(0).to(tl.int64)
    begin = tl.load(index)
    first, end = tl.load(index + chunk) - begin, tl.load(index + chunk + 1) - begin
    element = tl.arange(0, _BLOCK)
    sound = (first % 8 == 0) & (first >= 0) & (end <= size)
    ones: tl.constexpr = (1 << BITS) - 1
    for block in range(_CHUNK_BLOCKS):
        start = (chunk * _CHUNK_BLOCKS + block) * _BLOCK
        if start < elems:
            sound &= first + _HEADER <= end
            header = tl.load(data + tl.where(sound, first // 8, 0))
            w1, w2, w3 = header & 0xFF, (header >> 8) & 0xFF, (header >> 16) & 0xFF
            n1, n2 = (header >> 32) & 0xFFFF, (header >> 48) & 0xFFFF
            sound &= (w1 <= BITS) & (w2 <= _MOST) & (w3 <= _MOST) & (w1 + w2 + w3 <= BITS)
            sound &= (n1 <= _BLOCK) & (n2 <= n1)
            lanes = first + _HEADER
            map1 = lanes + 128 * w1
            string1 = map1 + tl.where(n1 > 0, _BLOCK // 8, 0)
            map2 = string1 + (n1 * w2 + 63) // 64 * 8
            string2 = map2 + tl.where(n2 > 0, (n1 + 63) // 64 * 8, 0)
            first = string2 + (n2 * w3 + 63) // 64 * 8
            sound &= first <= end
            number = element.to(tl.int64)
            here = number < tl.where(sound, _BLOCK, 0)
            z = _lanes(data, lanes, number, w1, here, BITS)
            flagged = here & (number < n1 * _BLOCK)
            flagged &= _word(data, map1, number, n1 * 0 + 1, flagged) != 0
            rank = tl.associative_scan(flagged.to(tl.int32), 0, _plus).to(tl.int64) - 1
            flagged &= rank < n1
            second = _word(data, string1, rank * w2, w2, flagged)
            again = flagged & (rank < n2 * _BLOCK)
            again &= _word(data, map2, rank, n1 * 0 + 1, again) != 0
            rank2 = tl.associative_scan(again.to(tl.int32), 0, _plus).to(tl.int64) - 1
            again &= rank2 < n2
            third = _word(data, string2, rank2 * w3, w3, again)
            second |= tl.where(again, third << (w2 & 63).to(tl.uint64), 0)
            z |= tl.where(flagged, second << (w1 & 63).to(tl.uint64), 0)
            steps = (z >> 1) ^ (tl.full((_BLOCK,), 0, tl.uint64) - (z & 1))
            there = here & (start + element < elems)
            origin = _place(_origin(base, start + element, there, BASE, CODE, BITS), BITS)
            trained = _float_at((origin + steps) & ones, BITS)
            tl.store(
                out + start + element, trained.to(out.dtype.element_ty, bitcast=BITS == 64), there
            )
    if (sound == 0) | (first != end):
        tl.atomic_or(flag, 1, sem="relaxed")


def unpack_exact(
    data: torch.Tensor,
    index: torch.Tensor,
    base: torch.Tensor,
    base_code: int,
    out: torch.Tensor,
    code: int,
    flag: torch.Tensor | None = None,
) -> torch.Tensor:
    """Restore a trained tensor, or a stretch of it from the start of a chunk on, to the bit.

    Args:
        data: uint8, the stretch's chunks, its start aligned to 8 bytes.
        index: int64 [chunks + 1], where each chunk begins and the last ends, in the stream.
        base: the base's elements of the stretch, of dtype code `base_code`, or SAME if that is
            `code`.
        out: the trained elements; of `code`'s dtype or any of the same size.
        flag: as in `gpu.linear`.

    Returns:
        The flag: 1 when the packed bytes are not as they must be; `out` is undefined then.

    Raises:
        ValueError: for an index that does not fit `out`, data that are no whole words, or 8-bit
            tensors.
    """
    flag = flag_on(out.device) if flag is None else flag
    elems, chunks = out.numel(), triton.cdiv(out.numel(), BLOCK * CHUNK_BLOCKS)
    if len(index) != chunks + 1 or data.numel() % 8 or data.numel() < 8 * chunks:
        raise ValueError(f"{len(index)} chunk limits and {data.numel()} bytes for {elems} elements")
    width = 8 * STORAGE[code].itemsize
    if width == 8:
        raise ValueError("8-bit tensors are not packed as distances")
    if chunks:
        with on_device(out):
            unpack_kernel[(chunks,)](
                data.view(torch.int64), data.numel(), index,
                bits(base, code if base_code == SAME else base_code),
                bits(out, code), flag, elems, BASE=base_code, CODE=code, BITS=width,
                **OPTIONS | {"num_warps": 4},
            )  # fmt: skip
    return flag
