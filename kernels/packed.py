"""The packed forms of a distribution vector, made and read without the GIL, near memory speed.

`kernels.reference_packed` says what the bytes mean; these functions make and read the same ones.
The work is cut into blocks that stay in the first-level cache and whose inner loops are vector
instructions.

Buffers are passed by address; the caller keeps them alive. What is read of a packed buffer is
checked on the way, so that a damaged or hostile one is reported and never read or written out of
bounds. Like all of `kernels.native`'s functions they are compiled once and then load without numba.
"""

from __future__ import annotations

import numpy as np

from .native import compiled
from .reference_packed import BLOCK, CHUNK

SCRATCH_BYTES = 4 * 8 * BLOCK + 1024
"""What `pack_exact` and `unpack_exact` need at `scratch`."""

SLACK_BYTES = 8
"""What must be readable behind packed data: values are fetched 64 bits at a time."""

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def pack_exact(itemsize: int, base_code: int, code: int):
    """A function that packs elements of `itemsize` bytes, from the start of a chunk on.

    base_code: dtype code of the base, or SAME; code: of the elements, 0 with SAME.

    Its arguments, all int64:
        trained, base: addresses of the elements; elems: how many.
        out: address of at least 8 + 1024 * itemsize bytes for every block begun.
        sizes: address of int64s, one for each chunk begun: filled with their bytes.
        scratch: address of SCRATCH_BYTES.

    It returns the bytes written to `out`.
    """
    from .exact_loops import array, blocks_at, filler, pack_chunks

    unsigned = _UNSIGNED[itemsize]
    fill = filler(base_code, code, unsigned)

    def pack(trained, base, elems, out, sizes, scratch):
        blocks, counts = blocks_at(scratch, unsigned), array(scratch + 32 * BLOCK, np.int64, 72)
        found = array(sizes, np.int64, (elems + CHUNK - 1) // CHUNK)
        return pack_chunks(trained, base, elems, out, found, blocks, counts, fill)

    return pack


@compiled("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def unpack_exact(itemsize: int, base_code: int, code: int):
    """A function that unpacks any range of elements; the constants are those of `pack_exact`.

    Its arguments, all int64:
        data: address of the chunk in which they begin, SLACK_BYTES readable behind the last one.
        sizes: address of int64s: the bytes of this chunk and of those after it.
        skip: elements of the first chunk to leave out; left: elements from its start to the
            tensor's end; elems: how many are wanted.
        base: address of the base's elements that belong to the wanted ones.
        out: address of the result.
        scratch: address of SCRATCH_BYTES.

    It returns 0, or 1 + the number of the first block that is not as it must be; `out` is undefined
    then.
    """
    from .exact_loops import array, blocks_at, filler, unpack_chunks

    unsigned = _UNSIGNED[itemsize]
    fill = filler(base_code, code, unsigned)

    def unpack(data, sizes, skip, left, elems, base, out, scratch):
        blocks = blocks_at(scratch, unsigned)
        ends = array(sizes, np.int64, (skip + elems + CHUNK - 1) // CHUNK)
        return unpack_chunks(data, ends, skip, left, elems, base, out, blocks, fill)

    return unpack


@compiled("void(int64, int64, int64, int64)")
def quantise(bits: int):
    """A function that packs fp32 as int8 or int4; see `reference_packed.quantise`.

    Its arguments, all int64: address of the values, their number, address of GROUP * bits / 8 bytes
    and of one uint16 scale for every group begun.
    """
    from .group_loops import quantise_groups

    def pack(values, elems, packed, scales):
        quantise_groups(values, elems, bits, packed, scales)

    return pack


@compiled("void(int64, int64, int64, int64, int64)")
def dequantise(bits: int):
    """A function that unpacks any range of int8 or int4 to fp32.

    Its arguments, all int64: addresses of the packed bytes and the scales of the group in which the
    range begins; how many elements of that group to leave out; how many are wanted; address of the
    result.
    """
    from .group_loops import dequantise_groups

    def unpack(packed, scales, skip, elems, out):
        dequantise_groups(packed, scales, bits, skip, elems, out)

    return unpack
