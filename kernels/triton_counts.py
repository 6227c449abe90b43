"""What thresholds and rescaling are made of, on GPUs: counts of magnitudes, and norms.

Arguments are those of `triton_sparse`. Both kernels do the ragged end of a tensor as one masked
block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference_methods import GRANULE
from .triton_elements import load_where, total_of
from .triton_sparse import between, delta_of, magnitude, masked, variance

_GRANULE = tl.constexpr(GRANULE)


@triton.jit
def _keys(
    base, sources, thetas, count, start, inside,
    CODES: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, ELEMS: tl.constexpr,
):  # fmt: skip
    """What is ordered: the magnitude of the one source's delta, or the variance of all."""
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    old = load_where(base, CODES[0], start, inside, True, ELEMS, 1, real)
    if SHARED:
        return variance(old, sources, thetas, count, start, inside, CODES, WIDE, ELEMS, 1)
    else:
        value = delta_of(sources[0], CODES[2], 0, count, thetas, old, start, inside, WIDE, ELEMS, 1)
        return magnitude(value)


@triton.jit
def _count_part(
    operands, at, inside, wanted, bins, equal, keys,
    STAGE: tl.constexpr, COPIES: tl.constexpr, BINS: tl.constexpr,
    CODES: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base, sources, thetas, count = operands
    key = _keys(base, sources, thetas, count, at, inside, CODES, WIDE, SHARED, BLOCK)
    if STAGE == 3:
        tl.store(keys + at + tl.arange(0, BLOCK), key, inside)
    else:
        if STAGE == 0:
            chosen, bin_ = inside, key >> 16
        elif STAGE == 1:
            chosen, bin_ = inside & ((key >> 16) == wanted), key & 0xFFFF
        else:
            chosen, bin_ = inside & (key == wanted), key & 0
        lowest = total_of((chosen & (bin_ == 0)).to(tl.int32))
        if STAGE < 2:
            copy = bins + (tl.program_id(0) % COPIES) * BINS
            tl.atomic_add(copy + bin_, 1, chosen & (bin_ != 0), sem="relaxed")
            if lowest > 0:
                tl.atomic_add(copy, lowest, sem="relaxed")
        if STAGE > 0:  # noqa: SIM102 (one of the two is known when compiling)
            if lowest > 0:
                where = equal + at // _GRANULE
                tl.atomic_add(where, lowest.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["thetas", "count", "elems", "wanted"])
def count_kernel(
    base, sources, thetas: tl.uint64, count: tl.int32, elems: tl.int64,
    wanted: tl.int64, bins, equal, keys,
    STAGE: tl.constexpr, COPIES: tl.constexpr, BINS: tl.constexpr,
    CODES: tl.constexpr, WIDE: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count keys as `sparse.count` says; stage 3 writes the keys themselves to `keys`, int32.

    bins: int32 [COPIES, BINS]: programs share each copy with few others. equal: int64, for each
    granule of the operands, which begin with one.

    Most deltas of a model are small or zero, and many are equal: what falls into bin 0 is summed
    within the block, and only the rest goes to memory one by one.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK
    operands = (base, sources, thetas, count)
    if at + BLOCK <= elems:
        _count_part(
            operands, at, tl.full((BLOCK,), 1, tl.int1), wanted, bins, equal, keys, STAGE, COPIES,
            BINS, CODES, WIDE, SHARED, BLOCK,
        )  # fmt: skip
    else:
        _count_part(
            operands, at, tl.arange(0, BLOCK) < elems - at, wanted, bins, equal, keys, STAGE,
            COPIES, BINS, CODES, WIDE, SHARED, BLOCK,
        )  # fmt: skip


@triton.jit
def _norms_part(
    operands, rows, which, first, start, inside, sums,
    CODES: tl.constexpr, WIDE: tl.constexpr, CUTS: tl.constexpr, CHANCES: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base, sources, thetas, count = operands
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    old = load_where(base, CODES[0], start, inside, True, BLOCK, 1, real)
    kept, value = inside, tl.full((BLOCK,), 0.0, real)
    if SHARED:
        keys = variance(old, sources, thetas, count, start, inside, CODES, WIDE, BLOCK, 1)
        kept = between(keys, rows, first + start, BLOCK)
    for i in tl.static_range(len(sources)):
        delta = delta_of(
            sources[i], CODES[2 + i], i, count, thetas, old, start, inside, WIDE, BLOCK, 1
        )
        value = tl.where(tl.full((BLOCK,), i, tl.int32) == which, delta, value)
    left = masked(value, rows, 0, first + start, kept, CUTS, CHANCES, SHARED, BLOCK).to(tl.float64)
    tl.store(sums, total_of(tl.abs(value).to(tl.float64)))
    tl.store(sums + 1, total_of(tl.abs(left)))
    tl.store(sums + 2, total_of(left * left))


@triton.jit(do_not_specialize=["which", "thetas", "count", "first", "elems"])
def norms_kernel(
    base, sources, rows, which: tl.int32, thetas: tl.uint64, count: tl.int32, first: tl.int64,
    elems: tl.int64, sums,
    CODES: tl.constexpr, WIDE: tl.constexpr, CUTS: tl.constexpr, CHANCES: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[program] = sum |delta|, sum |masked delta|, sum masked delta**2 of a block, in fp64.

    Of the source that `rows` begins with; where SHARED, of source `which` of all, and rows are the
    shared mask's.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK
    operands, mine = (base, sources, thetas, count), sums + 3 * tl.program_id(0).to(tl.int64)
    if at + BLOCK <= elems:
        _norms_part(
            operands, rows, which, first, at, tl.full((BLOCK,), 1, tl.int1), mine, CODES, WIDE,
            CUTS, CHANCES, SHARED, BLOCK,
        )  # fmt: skip
    else:
        _norms_part(
            operands, rows, which, first, at, tl.arange(0, BLOCK) < elems - at, mine, CODES, WIDE,
            CUTS, CHANCES, SHARED, BLOCK,
        )  # fmt: skip
