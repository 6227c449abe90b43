"""Sparse merges on GPUs: mask every source's delta, elect signs, sum and round, in one pass.

`kernels.reference_methods` is the specification, and every number equals the CPU's to the bit:
masks are recomputed from thresholds (TIES, Breadcrumbs), from Philox counters (DARE) or from the
variance of the deltas (SCE), terms are added in the order of the sources, multiply and add stay
apart, divisions are correctly rounded. `kernels.gpu_sparse` launches these kernels.

A threshold settles equal magnitudes by index: an element is within a cut when its key is larger
than the cut's, or equal and before the cut's place. A place is a number of an element of the
tensor, so that no program has to know what others counted.

Philox gives four words at a time, for elements that lie 16 apart. A block computes each counter
once and hands the words to their elements through shared memory: a quarter of the arithmetic that
computing a word where it is needed would take.

Arguments, beside those of `triton_linear`:
    rows: int64 [sources, ROW]: two cuts (key, place), the largest word that is kept, and the four
        words of the stream. Behind the last source: the cuts of the mask that all share.
    numbers: fp64 [sources, 3]: multiplier, vote, divisor. Behind the last: the scale.
    first: number, in the tensor, of the element at which the operands begin.
    CUTS, CHANCES, SHARED: which kinds of mask there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference_methods import COUNT, NO_CONSENSUS
from .triton_elements import load_where, raise_where, report_nonfinite, rounded

ROW = 9
"""int64s that describe a source's mask."""

_ROW, _COUNT, _NO_CONSENSUS = map(tl.constexpr, (ROW, COUNT, NO_CONSENSUS))
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011) on uint32 blocks."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def four_words(stream, counter, ELEMS: tl.constexpr):
    """The four words of each 64-bit counter, as four blocks of ELEMS.

    stream: address of key0, key1, counter2, counter3 as int64.
    """
    zero = tl.full((ELEMS,), 0, tl.uint32)
    return _philox(
        counter.to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        zero + tl.load(stream + 2).to(tl.uint32),
        zero + tl.load(stream + 3).to(tl.uint32),
        zero + tl.load(stream).to(tl.uint32),
        zero + tl.load(stream + 1).to(tl.uint32),
    )


@triton.jit
def words(stream, start, ELEMS: tl.constexpr):
    """`reference_methods.uniform_words` of elements from `start`, a multiple of 64, on."""
    quarter: tl.constexpr = ELEMS // 4
    counter = start.to(tl.uint64) // 4 + tl.arange(0, quarter).to(tl.uint64)
    w0, w1, w2, w3 = four_words(stream, counter, quarter)
    # [group, lane, low bit of the word's number, high bit] -> [group, high, low, lane]
    four = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    four = tl.reshape(four, (quarter // 16, 16, 2, 2))
    return tl.reshape(tl.permute(four, (0, 3, 2, 1)), (ELEMS,))


@triton.jit
def magnitude(value):
    """The bits of |value| in fp32, as int32: they order as magnitudes do."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _within(key, row, start, ELEMS: tl.constexpr):
    """Whether each element from `start` on, of that key, is within the cut at `row`."""
    least = tl.load(row).to(tl.int32)
    place = tl.load(row + 1) - start
    before = tl.minimum(tl.maximum(place, 0), ELEMS).to(tl.int32)
    return (key > least) | ((key == least) & (tl.arange(0, ELEMS) < before))


@triton.jit
def between(key, row, start, ELEMS: tl.constexpr):
    """Within the first cut of a row and not within the second."""
    beyond = _within(key, row + 2, start, ELEMS)
    return _within(key, row, start, ELEMS) & (beyond == 0)


@triton.jit
def delta_of(
    source, CODE: tl.constexpr, i, count, thetas, base, start, inside,
    WIDE: tl.constexpr, ELEMS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Source i minus the base where it is a model; 0 outside and beyond `count`."""
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    there = inside & (tl.full((ELEMS,), i, tl.int32) < count)
    value = load_where(source, CODE, start, there, count > i, ELEMS, HELD, real)
    return value - tl.where(((thetas.to(tl.uint64) >> i) & 1) != 0, base, 0.0)


@triton.jit
def _divide(a, b):
    """The quotient, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def variance(
    base, sources, thetas, count, start, inside,
    CODES: tl.constexpr, WIDE: tl.constexpr, ELEMS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Keys of the variance of the sources' deltas."""
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    number = tl.full((ELEMS,), 0.0, real) + count.to(real)
    mean, spread = tl.full((ELEMS,), 0.0, real), tl.full((ELEMS,), 0.0, real)
    for i in tl.static_range(len(sources)):
        if i % 4 == 3:
            tl.debug_barrier()
        mean += delta_of(
            sources[i], CODES[2 + i], i, count, thetas, base, start, inside, WIDE, ELEMS, HELD
        )
    mean = _divide(mean, number)
    for i in tl.static_range(len(sources)):
        if i % 4 == 3:
            tl.debug_barrier()
        value = delta_of(
            sources[i], CODES[2 + i], i, count, thetas, base, start, inside, WIDE, ELEMS, HELD
        )
        square = (value - mean) * (value - mean)
        spread += tl.where(tl.full((ELEMS,), i, tl.int32) < count, square, 0.0)
    return magnitude(_divide(spread, number))


@triton.jit
def masked(
    value, rows, i, start, kept,
    CUTS: tl.constexpr, CHANCES: tl.constexpr, SHARED: tl.constexpr, ELEMS: tl.constexpr,
):  # fmt: skip
    """The deltas of source i where its masks keep them, else 0; `kept`: by the shared mask."""
    if CUTS:
        value = tl.where(between(magnitude(value), rows + i * _ROW, start, ELEMS), value, 0.0)
    if CHANCES:
        most = tl.load(rows + i * _ROW + 4).to(tl.uint32)
        value = tl.where(words(rows + i * _ROW + 5, start, ELEMS) <= most, value, 0.0)
    if SHARED:
        value = tl.where(kept, value, 0.0)
    return value


@triton.jit
def _merge_part(
    operands, terms, flag, first, start, left,
    CODES: tl.constexpr, WIDE: tl.constexpr, CUTS: tl.constexpr, CHANCES: tl.constexpr,
    SHARED: tl.constexpr, CONSENSUS: tl.constexpr, DIVIDE: tl.constexpr,
    ZERO_IS_POSITIVE: tl.constexpr, ELEMS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """ELEMS elements from `start` on, of which `left` are there: all, where HELD is above 1."""
    base, out, sources = operands
    rows, numbers, thetas, count = terms
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    lane = tl.arange(0, ELEMS)
    inside = tl.full((ELEMS,), 1, tl.int1) if HELD > 1 else lane < left
    old = load_where(base, CODES[0], start, inside, True, ELEMS, HELD, real)
    zero = tl.full((ELEMS,), 0.0, real)
    total, plus_terms, minus_terms, plus_divisor, minus_divisor = zero, zero, zero, zero, zero
    kept = inside
    if SHARED:
        keys = variance(old, sources, thetas, count, start, inside, CODES, WIDE, ELEMS, HELD)
        kept = between(keys, rows + len(sources) * _ROW, first + start, ELEMS)
    for i in tl.static_range(len(sources)):
        if i % 4 == 3:
            tl.debug_barrier()  # or the compiler loads all sources at once, and spills them
        value = delta_of(
            sources[i], CODES[2 + i], i, count, thetas, old, start, inside, WIDE, ELEMS, HELD
        )
        raise_where(magnitude(value), _INFINITY, flag, HELD)
        value = masked(value, rows, i, first + start, kept, CUTS, CHANCES, SHARED, ELEMS)
        term = tl.load(numbers + 3 * i).to(real) * value
        if CONSENSUS == _NO_CONSENSUS:
            total += term
        else:
            plus, minus = term > 0.0, term < 0.0
            if CONSENSUS == _COUNT:
                total += plus.to(real) - minus.to(real)
            else:
                total += tl.load(numbers + 3 * i + 1).to(real) * value
            plus_terms += tl.where(plus, term, 0.0)
            minus_terms += tl.where(minus, term, 0.0)
            if DIVIDE:
                divisor = tl.load(numbers + 3 * i + 2).to(real)
                plus_divisor += tl.where(plus, divisor, 0.0)
                minus_divisor += tl.where(minus, divisor, 0.0)
    if CONSENSUS != _NO_CONSENSUS:
        plus = (total >= 0.0) if ZERO_IS_POSITIVE else (total > 0.0)
        tie = (total == 0.0) & (plus == 0)
        total = tl.where(tie, 0.0, tl.where(plus, plus_terms, minus_terms))
        if DIVIDE:
            divisor = tl.where(plus, plus_divisor, minus_divisor)
            total = _divide(total, tl.where(divisor == 0.0, 1.0, divisor))
        total *= tl.load(numbers + 3 * len(sources)).to(real)
    stored = rounded(tl.where(total == 0.0, old, old + total), CODES[1])
    report_nonfinite(stored, CODES[1], flag, HELD)
    if HELD > 1:
        tl.store(out + start + lane, stored, eviction_policy="evict_first")
    else:
        tl.store(out + start + lane, stored, inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["thetas", "count", "first", "elems"])
def merge_kernel(
    base, out, sources, rows, numbers, thetas: tl.uint64, count: tl.int32, flag, first: tl.int64,
    elems: tl.int64,
    CODES: tl.constexpr, WIDE: tl.constexpr, CUTS: tl.constexpr, CHANCES: tl.constexpr,
    SHARED: tl.constexpr, CONSENSUS: tl.constexpr, DIVIDE: tl.constexpr,
    ZERO_IS_POSITIVE: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """One block per program, the ragged one first; `reference_methods.merge` on each."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    operands, terms = (base, out, sources), (rows, numbers, thetas, count)
    if start + BLOCK <= elems:
        _merge_part(
            operands, terms, flag, first, start, BLOCK, CODES, WIDE, CUTS, CHANCES, SHARED,
            CONSENSUS, DIVIDE, ZERO_IS_POSITIVE, BLOCK, HELD,
        )  # fmt: skip
    else:
        for at in range(start, elems, BLOCK // HELD):
            tl.debug_barrier()  # or the compiler unrolls the loop
            _merge_part(
                operands, terms, flag, first, at, elems - at, CODES, WIDE, CUTS, CHANCES, SHARED,
                CONSENSUS, DIVIDE, ZERO_IS_POSITIVE, BLOCK // HELD, 1,
            )  # fmt: skip
