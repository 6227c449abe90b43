"""The GPU kernels: the reference's arithmetic in Triton, at the speed of the GPU's own memory.

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
bf16 is converted in integer arithmetic, which gives the same bits on every target and in Triton's
interpreter (whose own conversions truncate, and lose denormals). Finite results, infinities, zeros
and denormals equal the reference to the bit. A NaN made by arithmetic is a quiet NaN whose payload
is the hardware's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .reference import accumulates_in_fp64

TRITON_DTYPES = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
"""What each dtype code of `kernels.reference` is called in Triton."""

MAX_SOURCES = 64
"""Sources that one launch can take: the bits of the mask that tells models from vectors."""

NUM_WARPS = 8

HELD_BYTES, HELD_BYTES_AMD = 36 * 16, 18 * 16
"""What one thread may hold of all operands together, or its registers would spill to memory.

One 128-bit access each of base, sources and output, with 32 or 16 sources and some to spare; AMD's
buffer descriptors take registers too. What is summed in fp64 counts as such."""

OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


def with_nulls(base: Any, sources: Sequence[Any]) -> list[Any]:
    """The sources, and null sources up to a power of two: never loaded, so any operand will do.

    Raises:
        ValueError: for more than MAX_SOURCES.
    """
    count = len(sources)
    if count > MAX_SOURCES:
        raise ValueError(f"{count} sources in one launch; at most {MAX_SOURCES} fit")
    places = 1 << max(count - 1, 0).bit_length()
    return [*sources, *[sources[-1] if sources else base] * (places - count)]


def constexprs(
    base_code: int,
    source_codes: Sequence[int],
    out_code: int,
    add_base: bool,
    warp_threads: int,
) -> dict[str, Any]:
    """The compile-time arguments of both kernels; warps have 32 threads (NVIDIA) or 64 (AMD)."""
    sizes = [
        TRITON_DTYPES[code].primitive_bitwidth // 8 for code in (base_code, *source_codes, out_code)
    ]
    wide = accumulates_in_fp64(base_code, list(source_codes), out_code)
    limit = HELD_BYTES_AMD if warp_threads == 64 and not wide else HELD_BYTES
    held = 16 // min(sizes)
    elem_bytes = 8 * len(sizes) if wide else sum(sizes)
    while held > 1 and held * elem_bytes > limit:
        held //= 2
    return {
        "WIDE": wide,
        "ADD_BASE": add_base,
        "BLOCK": NUM_WARPS * warp_threads * held,
        "HELD": held,
    }


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _upcast(value, DTYPE: tl.constexpr):
    """Stored values, exactly, as DTYPE (fp32 or fp64)."""
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _to_odd(value):
    """fp64 as fp32 rounded to odd, so that the next rounding is the only one that counts.

    Truncate towards zero and set the last bit if anything was lost (Boldo and Melquiond, 2008).
    """
    single = value.to(tl.float32)
    difference = value - single.to(tl.float64)
    bits = single.to(tl.uint32, bitcast=True)
    away = (difference < 0.0) == (single > 0.0)
    odd = tl.where(away, bits - 1, bits) | 1
    inexact = (difference == difference) & (difference != 0.0)
    return tl.where(inexact, odd, bits).to(tl.float32, bitcast=True)


@triton.jit
def _round(value, DTYPE: tl.constexpr):
    """fp32 or fp64 rounded once, to nearest even, to DTYPE."""
    if DTYPE.primitive_bitwidth == 16 and value.dtype == tl.float64:
        value = _to_odd(value)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        rounded = tl.where(value != value, quiet_nan, nearest)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _report_nonfinite(rounded, flag, HELD: tl.constexpr):
    """Set *flag if any element is NaN or infinite: its exponent bits are all ones.

    Only the HELD neighbours that one thread holds are reduced: no exchange between threads, no
    barrier. The atomic is never executed on finite results.
    """
    if rounded.dtype == tl.float64:
        exponent = (rounded.to(tl.uint64, bitcast=True) >> 32).to(tl.int32) & 0x7FF00000
        top = 0x7FF00000
    elif rounded.dtype == tl.float32:
        exponent = rounded.to(tl.int32, bitcast=True) & 0x7F800000
        top = 0x7F800000
    else:
        top = 0x7F80 if rounded.dtype == tl.bfloat16 else 0x7C00
        exponent = rounded.to(tl.int16, bitcast=True).to(tl.int32) & top
    threads: tl.constexpr = rounded.shape[0] // HELD
    largest = tl.reduce(tl.reshape(exponent, (threads, HELD)), 1, _larger)
    same_place = flag + tl.full((threads,), 0, tl.int32)
    tl.atomic_or(same_place, 1, mask=largest == top, sem="relaxed")


@triton.jit
def _weight(packed, WIDE: tl.constexpr):
    """A weight as `_pack` hands it over."""
    if WIDE:
        high, low = packed
        return (((high >> 1) << 32) | ((low >> 1) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        return packed


@triton.jit
def _merge_part(
    base,
    sources,
    weights,
    thetas,
    count,
    out,
    flag,
    start,
    left,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    ADD_BASE: tl.constexpr,
    ELEMS: tl.constexpr,
    HELD: tl.constexpr,
):
    """The arithmetic, on ELEMS elements from `start`; where MASKED, only `left` of them are there.

    sources, weights: tuples of one length, of which the first `count` are real. Bit i of thetas:
    source i is a model, from which the base is subtracted; else a vector, taken as it is. HELD:
    neighbouring elements that one thread holds.
    """
    lane = tl.arange(0, ELEMS)
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    if MASKED:
        inside = lane < left
        theta_base = tl.load(base + start + lane, inside, 0.0, eviction_policy="evict_first")
    else:
        theta_base = tl.load(base + start + lane, eviction_policy="evict_first")
    theta_base = _upcast(theta_base, real)
    total = tl.full((ELEMS,), 0.0, real)
    for i in tl.static_range(len(sources)):
        there = tl.full((ELEMS,), i, tl.int32) < count
        if MASKED:
            there &= inside
        value = tl.load(sources[i] + start + lane, there, 0.0, eviction_policy="evict_first")
        origin = tl.where(((thetas.to(tl.uint64) >> i) & 1) != 0, theta_base, 0.0)
        total += _weight(weights[i], WIDE) * (_upcast(value, real) - origin)
    if ADD_BASE:
        total = tl.where(total == 0.0, theta_base, theta_base + total)
    rounded = _round(total, out.dtype.element_ty)
    _report_nonfinite(rounded, flag, HELD)
    if MASKED:
        tl.store(out + start + lane, rounded, inside, eviction_policy="evict_first")
    else:
        tl.store(out + start + lane, rounded, eviction_policy="evict_first")


@triton.jit
def _merge_block(
    base,
    sources,
    weights,
    thetas,
    count,
    out,
    flag,
    start,
    elems,
    WIDE: tl.constexpr,
    ADD_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """The block of a tensor of `elems` elements that begins at `start`.

    A whole block goes in one piece without a mask. What is left at the end goes one element per
    thread at a time: a masked copy of the big piece would need up to three times the registers.
    """
    if start + BLOCK <= elems:
        _merge_part(
            base, sources, weights, thetas, count, out, flag, start, BLOCK,
            False, WIDE, ADD_BASE, BLOCK, HELD,
        )  # fmt: skip
    else:
        for at in range(start, elems, BLOCK // HELD):
            tl.debug_barrier()  # or the compiler unrolls the loop, and holds more than it can
            _merge_part(
                base, sources, weights, thetas, count, out, flag, at, elems - at,
                True, WIDE, ADD_BASE, BLOCK // HELD, 1,
            )  # fmt: skip


@triton.jit(do_not_specialize=["thetas", "count", "elems"])
def linear_kernel(
    base,
    sources,
    weights,
    thetas: tl.uint64,
    count: tl.int32,
    out,
    flag,
    elems: tl.int64,
    WIDE: tl.constexpr,
    ADD_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """One block of one tensor per program, the last first: the slow end hides behind the others."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    _merge_block(
        base, sources, weights, thetas, count, out, flag, start, elems, WIDE, ADD_BASE, BLOCK, HELD
    )


@triton.jit
def _pointer(entry, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a table entry, as a pointer."""
    pointer = tl.load(entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["blocks", "thetas", "count"])
def batch_kernel(
    table,
    owners,
    blocks: tl.int32,
    weights,
    thetas: tl.uint64,
    count: tl.int32,
    flag,
    BASE: tl.constexpr,
    SOURCES: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    ADD_BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """Blocks of many tensors, dealt to the programs in turn.

    owners[b]: the table row of block b. A row: elements, number of the tensor's first block,
    addresses of base, output and sources; all int64.
    """
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = table + tl.load(owners + block).to(tl.int64) * (4 + len(SOURCES))
        elems = tl.load(row)
        start = (block - tl.load(row + 1)) * BLOCK
        base = _pointer(row + 2, BASE, ALIGNED)
        out = _pointer(row + 3, OUT, ALIGNED)
        sources = ()
        for i in tl.static_range(len(SOURCES)):
            sources += (_pointer(row + 4 + i, SOURCES[i], ALIGNED),)  # type: ignore[assignment]
        _merge_block(
            base, sources, weights, thetas, count, out, flag, start, elems,
            WIDE, ADD_BASE, BLOCK, HELD,
        )  # fmt: skip
