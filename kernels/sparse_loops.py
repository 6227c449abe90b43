"""The loops of `sparse`, for numba: masks, sums by sign, norms, and counts of magnitudes.

As in `cpu`, a tile is walked in blocks that stay in the first-level cache. For each block every
source's delta is formed and masked (`_masked`), then summed by sign and stored (`merge`), or
measured (`norms`). Sums of positive and of negative terms are kept apart, so that electing the sign
afterwards is a selection and needs no second look at the sources. All scratch blocks of that loop
lie in one array at constant distances: the compiler then knows that they do not overlap and writes
vector code without tests.

Arguments that all loops share are explained in `sparse`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .blocks import loop, magnitude, store, upcast
from .philox import fill_words
from .rank import keep_by_rank
from .reference_methods import (
    BLOCK,
    CHANCE,
    COUNT,
    CUT,
    DROP,
    GRANULE,
    MAGNITUDE,
    NO_CONSENSUS,
    PITCH,
    RANK,
    VARIANCE,
)

_INFINITY = np.uint32(0x7F800000)
_SHIFT, _LOW_BITS = np.uint32(16), np.uint32(0xFFFF)


@loop
def _delta(address, form, offset, is_delta, n, base, value, keys):
    """value[:n] = delta of n elements from `offset` on, keys[:n] = their keys; the top key."""
    upcast(address, form, offset, n, value)
    top = np.uint32(0)
    for j in range(n):
        difference = value[j] - base[j]
        delta = value[j] if is_delta else difference
        key = magnitude(delta)
        value[j] = delta
        keys[j] = key
        top = max(top, key)
    return top


@loop
def _delta_by_chance(address, form, offset, is_delta, n, base, value, words, chance):
    """value[:n] = the delta where a word is below `chance`, else 0; the top key of all deltas."""
    upcast(address, form, offset, n, value)
    limit, zero, top = np.uint32(chance), value.dtype.type(0), np.uint32(0)
    for j in range(n):
        difference = value[j] - base[j]
        delta = value[j] if is_delta else difference
        top = max(top, magnitude(delta))
        value[j] = delta if words[j] < limit else zero
    return top


@loop
def _end(cut, start, n, keys, seen):
    """How many elements of a block are within a cut although they only equal its key.

    They are the block's first ones. The block [start, start + n) is in one granule; seen: of those
    that equal the key, how many lie in the granule before the block.
    """
    key, granule, quota = np.uint32(cut[0]), cut[1], cut[2]
    if start // GRANULE != granule:
        return n if start // GRANULE < granule else 0
    if start % GRANULE == 0:
        seen[0] = 0
    equal = np.uint32(0)
    for j in range(n):
        equal += np.uint32(keys[j] == key)
    left = quota - seen[0]
    seen[0] += np.int64(equal)
    if left >= np.int64(equal):
        return n
    end = np.int64(0)
    while left > 0:
        left -= np.int64(keys[end] == key)
        end += 1
    return end


@loop
def _between(least, beyond, n, keys, value):
    """Zero the values whose keys are not in [least, beyond)."""
    low, high, zero = np.uint32(least), np.uint32(beyond), value.dtype.type(0)
    for j in range(n):
        kept = (keys[j] >= low) & (keys[j] < high)
        value[j] = value[j] if kept else zero


@loop
def _cut(mask, start, n, keys, seen, value):
    """Zero the values outside the mask's cuts. The block [start, start + n) is in one granule."""
    near, far = _end(mask[1:4], start, n, keys, seen), _end(mask[4:7], start, n, keys, seen[1:])
    first = np.int64(0)
    while first < n:  # up to three times, as a rule once
        least, beyond = mask[1] + (first >= near), mask[4] + (first >= far)
        last = min(near if first < near else n, far if first < far else n)
        _between(least, beyond, last - first, keys[first:], value[first:])
        first = last


@loop
def _measure(measure, deltas, n, start, row, factors, keys, mean, spread):
    """keys[:n] = bits of the variance or importance of a block that begins at element `start`."""
    if measure == VARIANCE:
        count, zero = deltas.dtype.type(len(deltas)), deltas.dtype.type(0)
        for j in range(n):
            mean[j] = zero
            spread[j] = zero
        for i in range(len(deltas)):
            for j in range(n):
                mean[j] = mean[j] + deltas[i, j]
        for j in range(n):
            mean[j] = mean[j] / count
        for i in range(len(deltas)):
            for j in range(n):
                off = deltas[i, j] - mean[j]
                spread[j] = spread[j] + off * off
        for j in range(n):
            keys[j] = magnitude(spread[j] / count)
    else:
        for j in range(n):
            keys[j] = magnitude(np.float64(deltas[0, j]) * factors[(start + j) // row])


def masker(cuts: bool, draws: bool, ranks: bool, measures: bool) -> Any:
    """The loop that forms and masks deltas, with those kinds of masks alone.

    The others are left out of the code, which takes seconds to compile. Only `cuts` is asked
    together with `measures`.
    """

    @loop
    def masked(
        masking, addresses, forms, is_delta, masks, chances, streams, measure, factors, row, offset,
        start, n, base, deltas, keys, words, items, counts, seen, s,
    ):  # fmt: skip
        """deltas[:, :n] = masked deltas of elements [start, start + n), `offset` into the tile.

        base[:n] = the base's values. Dropped sources are left as they are, and without `masking`
        the others are too. Returns the top key of what was read.
        """
        upcast(addresses[0], forms[0], offset, n, base)
        top = np.uint32(0)
        for i in range(len(deltas)):
            kind, value = masks[i, 0], deltas[i]
            if kind == DROP:
                continue
            address, form, stored = addresses[i + 1], forms[i + 1], is_delta[i] != 0
            if draws and masking and kind == CHANCE:
                at = fill_words(streams[i], start, n, words)
                here = _delta_by_chance(
                    address, form, offset, stored, n, base, value, words[at:], masks[i, 7]
                )
                top = max(top, here)
                continue
            top = max(top, _delta(address, form, offset, stored, n, base, value, keys))
            if not masking:
                continue
            if cuts and kind == CUT:
                _cut(masks[i], start, n, keys, seen[i], value)
            elif ranks and kind == RANK:
                at = fill_words(streams[i], start, n, words)
                low, span, rescale = chances[i, 0], chances[i, 1], masks[i, 7] != 0
                keep_by_rank(
                    keys, n, low, span, rescale, words[at:], items[0], items[1], counts, value
                )
        if measures and measure != MAGNITUDE and masking and masks[-1, 0] == CUT:
            _measure(measure, deltas, n, start, row, factors, keys, s[:PITCH], s[PITCH:])
            for i in range(len(deltas)):
                _cut(masks[-1], start, n, keys, seen[i], deltas[i])
        return top

    return masked


def merger(masked: Any) -> Any:
    """The loop of `sparse.merge`."""

    @loop
    def merge(
        addresses, forms, is_delta, masks, chances, streams, measure, factors, row, width, start,
        elems, multipliers, votes, divisors, consensus, divide, zero_is_positive, scale,
        base, deltas, keys, words, items, counts, seen, s,
    ):  # fmt: skip
        """The fused merge; True if an input or output is not finite."""
        last = len(addresses) - 1
        zero, factor = s.dtype.type(0), s.dtype.type(scale)
        nonfinite = False
        for number in range((elems + width - 1) // width):  # a step must be a constant here
            first = number * width
            segment = min(width, elems - first)
            top = masked(
                True, addresses, forms, is_delta, masks, chances, streams, measure, factors, row,
                first, start + first, segment, base, deltas, keys, words, items, counts, seen, s,
            )  # fmt: skip
            nonfinite |= top >= _INFINITY
            for begin in range(0, segment, BLOCK):
                n = min(BLOCK, segment - begin)
                _clear(n, consensus != NO_CONSENSUS, divide, s)
                for i in range(len(deltas)):
                    if masks[i, 0] == DROP:
                        continue
                    value, m = deltas[i][begin:], s.dtype.type(multipliers[i])
                    if consensus == NO_CONSENSUS:
                        for j in range(n):
                            s[j] = s[j] + m * value[j]
                    else:
                        v = s.dtype.type(votes[i])
                        _add_by_sign(value, n, m, v, consensus == COUNT, s)
                        if divide:
                            _add_divisors(value, n, m, s.dtype.type(divisors[i]), s)
                if consensus != NO_CONSENSUS:
                    _elect(n, zero_is_positive, divide, factor, s)
                old = base[begin:]
                for j in range(n):
                    s[5 * PITCH + j] = old[j] if s[j] == zero else old[j] + s[j]
                nonfinite |= store(s[5 * PITCH :], addresses[last], forms[last], first + begin, n)
        return nonfinite

    return merge


@loop
def _clear(n, elects, divides, s):
    """Zero the sums that will be used."""
    zero = s.dtype.type(0)
    for part in range(5 if divides else 3 if elects else 1):
        for j in range(n):
            s[part * PITCH + j] = zero


@loop
def _add_by_sign(value, n, m, v, by_count, s):
    """Add a source's votes, and its terms by sign."""
    zero, one = s.dtype.type(0), s.dtype.type(1)
    for j in range(n):
        x = m * value[j]
        plus, minus = x > zero, x < zero
        sign = (one if plus else zero) - (one if minus else zero)
        s[j] = s[j] + (sign if by_count else v * value[j])
        s[PITCH + j] = s[PITCH + j] + (x if plus else zero)
        s[2 * PITCH + j] = s[2 * PITCH + j] + (x if minus else zero)


@loop
def _add_divisors(value, n, m, d, s):
    """Add a source's divisor where its term has a sign, by that sign."""
    zero = s.dtype.type(0)
    for j in range(n):
        x = m * value[j]
        s[3 * PITCH + j] = s[3 * PITCH + j] + (d if x > zero else zero)
        s[4 * PITCH + j] = s[4 * PITCH + j] + (d if x < zero else zero)


@loop
def _elect(n, zero_is_positive, divide, factor, s):
    """s[:n] = the sum of the elected sign's terms, over their divisors if `divide`, times factor.

    Written without branches, as an element's sign is as good as random.
    """
    zero, one = s.dtype.type(0), s.dtype.type(1)
    if zero_is_positive:
        for j in range(n):
            vote = s[j]
            s[j] = one if vote >= zero else vote
    if divide:
        for j in range(n):
            vote, positive, negative = s[j], s[3 * PITCH + j], s[4 * PITCH + j]
            divisor = positive if vote > zero else negative
            s[3 * PITCH + j] = one if divisor == zero else divisor
    for j in range(n):
        vote, positive, negative = s[j], s[PITCH + j], s[2 * PITCH + j]
        terms = positive if vote > zero else negative
        s[j] = zero if vote == zero else terms
    if divide:
        for j in range(n):
            s[j] = s[j] / s[3 * PITCH + j]
    for j in range(n):
        s[j] = s[j] * factor


def measurer(masked: Any) -> Any:
    """The loop of `sparse.norms`."""

    @loop
    def norms(
        addresses, forms, is_delta, masks, chances, streams, measure, factors, row, width, start,
        elems, block_elems, base, deltas, keys, words, items, counts, seen, s, lanes, sums,
    ):  # fmt: skip
        """sums[block, i] = fp64 (sum |delta_i|, sum |masked delta_i|, sum masked delta_i**2).

        Blocks of `block_elems` elements are counted from the tensor's start; a tile holds whole
        ones. lanes: (sources, 2, BLOCK) fp64 of scratch.
        """
        for masking in range(2):
            for number in range((elems + width - 1) // width):
                first = number * width
                n = min(width, elems - first)
                masked(
                    masking != 0, addresses, forms, is_delta, masks, chances, streams, measure,
                    factors, row, first, start + first, n, base, deltas, keys, words, items, counts,
                    seen, s,
                )  # fmt: skip
                block = (start + first) // block_elems
                begins = (start + first) % block_elems == 0
                ends = (start + first + n) % block_elems == 0 or first + n == elems
                for i in range(len(deltas)):
                    if masks[i, 0] == DROP:
                        continue
                    if begins:
                        for j in range(BLOCK):
                            lanes[i, 0, j] = 0.0
                            lanes[i, 1, j] = 0.0
                    for begin in range(0, n, BLOCK):
                        _add_norms(
                            deltas[i][begin:], min(BLOCK, n - begin), lanes[i, 0], lanes[i, 1]
                        )
                    if ends:
                        absolute, square = 0.0, 0.0
                        for j in range(BLOCK):
                            absolute += lanes[i, 0, j]
                            square += lanes[i, 1, j]
                        sums[block, i, masking] = absolute
                        if masking:
                            sums[block, i, 2] = square

    return norms


@loop
def _add_norms(value, n, absolute, square):
    """Add |value| and value**2, each to its own lane."""
    for j in range(n):
        x = np.float64(value[j])
        absolute[j] = absolute[j] + abs(x)
        square[j] = square[j] + x * x


def counter(measures: bool) -> Any:
    """The loop of `sparse.count`, for measures other than the magnitude as well."""

    @loop
    def count(
        addresses, forms, is_delta, measure, factors, row, start, elems, stage, wanted, bins, equal,
        base, deltas, keys, s,
    ):  # fmt: skip
        """Count magnitudes of a tile: the stage `sparse.count` says."""
        streams = len(deltas) if not measures or measure == MAGNITUDE else 1
        for first in range(0, elems, BLOCK):
            n = min(BLOCK, elems - first)
            upcast(addresses[0], forms[0], first, n, base)
            if measures and measure != MAGNITUDE:
                for i in range(len(deltas)):
                    _delta(
                        addresses[i + 1],
                        forms[i + 1],
                        first,
                        is_delta[i],
                        n,
                        base,
                        deltas[i],
                        keys,
                    )
                _measure(
                    measure, deltas, n, start + first, row, factors, keys, s[:PITCH], s[PITCH:]
                )
            for stream in range(streams):
                ready = measures and measure != MAGNITUDE
                for k in range(len(wanted)):
                    if wanted[k, 0] != stream:
                        continue
                    if not ready:
                        i = stream + 1
                        _delta(
                            addresses[i],
                            forms[i],
                            first,
                            is_delta[stream],
                            n,
                            base,
                            deltas[0],
                            keys,
                        )
                        ready = True
                    if stage == 0:
                        _count_high(keys, n, bins[k])
                        continue
                    found = (
                        _count_low(keys, n, wanted[k, 1], bins[k])
                        if stage == 1
                        else _count_equal(keys, n, wanted[k, 1])
                    )
                    if equal.shape[1] > 0:
                        equal[k, (start + first) // GRANULE] += found

    return count


@loop
def _count_high(keys, n, bins):
    """Count keys[:n] by their upper bits; the keys are spent."""
    for j in range(n):
        keys[j] = np.uint32(keys[j] >> _SHIFT)
    whole = n - n % 4
    for j in range(0, whole, 4):
        bins[keys[j]] += 1
        bins[keys[j + 1]] += 1
        bins[keys[j + 2]] += 1
        bins[keys[j + 3]] += 1
    for j in range(whole, n):
        bins[keys[j]] += 1


@loop
def _count_low(keys, n, wanted, bins):
    """Count the lower bits of the keys in bin `wanted`; returns how many have none set."""
    bin_ = np.uint32(wanted)
    first = np.uint32(bin_ << _SHIFT)
    inside, equal = np.uint32(0), np.uint32(0)
    for j in range(n):
        inside += np.uint32(np.uint32(keys[j] >> _SHIFT) == bin_)
        equal += np.uint32(keys[j] == first)
    if inside != equal:
        for j in range(n):
            if keys[j] != first and np.uint32(keys[j] >> _SHIFT) == bin_:
                bins[keys[j] & _LOW_BITS] += 1
    bins[0] += np.int64(equal)
    return np.int64(equal)


@loop
def _count_equal(keys, n, wanted):
    """How many keys are `wanted`."""
    key, equal = np.uint32(wanted), np.uint32(0)
    for j in range(n):
        equal += np.uint32(keys[j] == key)
    return np.int64(equal)
