"""The fused linear merge on GPUs: the reference's arithmetic at the speed of the GPU's own memory.

One program merges one block. A thread loads a few neighbouring elements of every operand, 16 bytes
of the narrowest, upcasts them in registers, sums the weighted deltas, rounds and stores: HBM sees
each input byte once and each output byte once, in 128-bit accesses. `linear_kernel` takes the
operands of one tensor as arguments, `batch_kernel` those of many tensors from a table of addresses;
they share the body. `kernels.gpu` launches them.

Both are compiled per mixture of dtypes and per number of sources rounded up to a power of two; the
places left over are null sources, whose loads are switched off by a predicate that is the same for
the whole block (so it does not split the 128-bit accesses) and whose weight is zero. The
alternative, a loop over a table of sources, compiles once but waits for one source before it asks
for the next.

Numerics. Floating-point fusion is off, so multiply and add stay apart as in `kernels.reference`.
Finite results, infinities, zeros and denormals equal the reference to the bit. A NaN made by
arithmetic is a quiet NaN whose payload is the hardware's.

Arguments that functions here share:
    operands: (base, out, sources); sources: a tuple of pointers, of a pair for a packed one.
    terms: (weights, thetas, count); of the sources and weights the first `count` are real. Bit i of
        thetas: source i is a model, from which the base is subtracted; else a vector.
    CODES: dtype codes of base, out, sources. WIDE: sum in fp64. ADD_BASE: see `reference.linear`.
    BLOCK: elements of a block. HELD: neighbouring elements that one thread holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_elements import load, load_where, report_nonfinite, rounded, weight


@triton.jit
def _merge_part(
    operands, terms, flag, start, left,
    MASKED: tl.constexpr, CODES: tl.constexpr, WIDE: tl.constexpr, ADD_BASE: tl.constexpr,
    ELEMS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The arithmetic, on ELEMS elements from `start`; where MASKED, `left` of them are there."""
    base, out, sources = operands
    weights, thetas, count = terms
    lane = tl.arange(0, ELEMS)
    inside = lane < left
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    if MASKED:
        theta_base = load_where(base, CODES[0], start, inside, True, ELEMS, HELD, real)
    else:
        theta_base = load(base, CODES[0], start, ELEMS, HELD, real)
    total = tl.full((ELEMS,), 0.0, real)
    for i in tl.static_range(len(sources)):
        there = tl.full((ELEMS,), i, tl.int32) < count
        if MASKED:
            there &= inside
        value = load_where(sources[i], CODES[2 + i], start, there, count > i, ELEMS, HELD, real)
        origin = tl.where(((thetas.to(tl.uint64) >> i) & 1) != 0, theta_base, 0.0)
        total += weight(weights[i], WIDE) * (value - origin)
    if ADD_BASE:
        total = tl.where(total == 0.0, theta_base, theta_base + total)
    stored = rounded(total, CODES[1])
    report_nonfinite(stored, CODES[1], flag, HELD)
    if MASKED:
        tl.store(out + start + lane, stored, inside, eviction_policy="evict_first")
    else:
        tl.store(out + start + lane, stored, eviction_policy="evict_first")


@triton.jit
def _merge_block(
    operands, terms, flag, start, elems,
    CODES: tl.constexpr, WIDE: tl.constexpr, ADD_BASE: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """The block of a tensor of `elems` elements that begins at `start`.

    A whole block goes in one piece without a mask. What is left at the end goes one element per
    thread at a time: a masked copy of the big piece would need up to three times the registers.
    """
    if start + BLOCK <= elems:
        _merge_part(operands, terms, flag, start, BLOCK, False, CODES, WIDE, ADD_BASE, BLOCK, HELD)
    else:
        for at in range(start, elems, BLOCK // HELD):
            tl.debug_barrier()  # or the compiler unrolls the loop, and holds more than it can
            _merge_part(
                operands, terms, flag, at, elems - at, True, CODES, WIDE, ADD_BASE, BLOCK // HELD, 1
            )


@triton.jit(do_not_specialize=["thetas", "count", "elems"])
def linear_kernel(
    base, out, sources, weights, thetas: tl.uint64, count: tl.int32, flag, elems: tl.int64,
    CODES: tl.constexpr, WIDE: tl.constexpr, ADD_BASE: tl.constexpr, BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """One block of one tensor per program, the last first: the slow end hides behind the others."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    operands, terms = (base, out, sources), (weights, thetas, count)
    _merge_block(operands, terms, flag, start, elems, CODES, WIDE, ADD_BASE, BLOCK, HELD)


@triton.jit
def _pointer(entry, BYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a table entry, as a pointer to integers of BYTES."""
    dtype: tl.constexpr = (
        tl.uint8 if BYTES == 1 else tl.int16 if BYTES == 2 else tl.int32 if BYTES == 4 else tl.int64
    )
    pointer = tl.load(entry).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["thetas", "count"])
def batch_kernel(
    table, owners, weights, thetas: tl.uint64, count: tl.int32, flag,
    SIZES: tl.constexpr, ALIGNED: tl.constexpr, CODES: tl.constexpr, WIDE: tl.constexpr,
    ADD_BASE: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """One block of one of many tensors per program.

    owners[b]: the table row of block b. A row: elements, number of the tensor's first block,
    addresses of base, output and sources; all int64. SIZES: bytes of their elements.

    A resident grid of programs that take blocks in turn is slower on an H100: the next block's
    addresses are not asked for before the last one is stored.
    """
    block = tl.program_id(0)
    row = table + tl.load(owners + block).to(tl.int64) * (2 + len(CODES))
    elems = tl.load(row)
    start = (block - tl.load(row + 1)) * BLOCK
    base, out = _pointer(row + 2, SIZES[0], ALIGNED), _pointer(row + 3, SIZES[1], ALIGNED)
    sources = ()
    for i in tl.static_range(len(CODES) - 2):
        sources += (_pointer(row + 4 + i, SIZES[2 + i], ALIGNED),)  # type: ignore[assignment]
    operands, terms = (base, out, sources), (weights, thetas, count)
    _merge_block(operands, terms, flag, start, elems, CODES, WIDE, ADD_BASE, BLOCK, HELD)
