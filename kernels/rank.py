"""Keep elements of a row by rank of magnitude on the CPU: an exact ranking of one row at a time.

Deltas of 16-bit checkpoints mostly differ in the upper 15 bits of their magnitudes alone, and lie
within a few octaves below the row's largest. So elements are counted by those bits, and a second
walk through the row reads each element's rank off its bin: there is nothing to sort where all of a
bin are equal, as they then rank by index. The few bins that hold unlike magnitudes are sorted by
insertion; rows where that would not be short (fp32 inputs) by all bits. Magnitude and index travel
in one 64-bit integer.
"""

from __future__ import annotations

import numpy as np

from .blocks import loop
from .reference_methods import BINS

_SMALL = 32
_PATIENCE = 4
_UNLIKE = 1 << 32
_COUNTED = _UNLIKE - 1
_INDEX = np.int64(0xFFFFFFFF)
_SHIFT, _LOW_BITS = np.uint32(16), np.uint32(0xFFFF)


@loop
def _insert(items, begin, end, moves):
    """Insertion sort of items[begin:end]; the moves left, negative where they did not suffice."""
    for j in range(begin + 1, end):
        item = items[j]
        k = j - 1
        while k >= begin and items[k] > item:
            items[k + 1] = items[k]
            k -= 1
            moves -= 1
        items[k + 1] = item
        if moves < 0:
            break
    return moves


@loop
def _places(counts, bins):
    """Turn counts into the places where each bin begins."""
    place = np.int64(0)
    for k in range(bins):
        here = counts[k]
        counts[k] = place
        place += here


@loop
def _distribute(items, out, n, shift, counts):
    """One stable pass of radix sort: by the eleven bits from `shift` on."""
    for k in range(BINS):
        counts[k] = 0
    for j in range(n):
        counts[(items[j] >> shift) & (BINS - 1)] += 1
    _places(counts, BINS)
    for j in range(n):
        k = (items[j] >> shift) & (BINS - 1)
        out[counts[k]] = items[j]
        counts[k] += 1


@loop
def _number(ranks, n, items, begin, end):
    """Write down the ranks of items[begin:end], which are in their places."""
    for r in range(begin, end):
        ranks[n - 1 - (items[r] & _INDEX)] = r


@loop
def _pack(keys, n, items):
    """items[j] = key << 32 | j of the elements from the last to the first."""
    for j in range(n):
        items[j] = (np.int64(keys[n - 1 - j]) << 32) | np.int64(j)


@loop
def _bin(keys, n, out):
    """out[j] = the bin of element j, plus _UNLIKE where others of the bin may differ from it.

    Bin 0 is of zeros; the last one of the row's largest; bin 1 also of all that are too small for
    the others. Returns the number of bins. Eight octaves suffice for most rows, and bins cost time
    even where they are empty.
    """
    top = np.uint32(0)
    for j in range(n):
        top = max(top, keys[j])
    highest, bins = np.int64(top >> _SHIFT), np.int64(BINS // 2)
    lowest, below = max(highest - bins + 2, np.int64(0)), np.uint32(0)
    limit = np.uint32(lowest << 16)
    for j in range(n):
        below += np.uint32(np.uint32(keys[j] - np.uint32(1)) < np.uint32(limit - np.uint32(1)))
    if lowest != 0 and np.int64(below) * np.int64(below) > _PATIENCE * n:
        bins = np.int64(BINS)
    first = np.int32(max(highest - bins + 2, np.int64(0)))
    for j in range(n):
        key = keys[j]
        above = np.int32(np.int32(key >> _SHIFT) - first)
        some = np.int32(key != 0)
        unlike = np.int32(np.int32(np.uint32(key & _LOW_BITS) != 0) | np.int32(above < 0)) & some
        out[j] = np.int64(max(above, np.int32(0)) + some) | (np.int64(unlike) * _UNLIKE)
    return bins


@loop
def rank_row(keys, n, ranks, items, counts):
    """ranks[j] = the rank of element j: 0 for the least; of equal ones the last has the least.

    ranks, items: n int64, the latter scratch, as counts: 2 * BINS.
    """
    if n <= _SMALL:
        _pack(keys, n, items)
        _insert(items, 0, n, n * n)
        _number(ranks, n, items, 0, n)
        return
    bins = _bin(keys, n, ranks)
    for k in range(bins):
        counts[k] = 0
    for j in range(n):  # without branches: where unlike ones lie is as good as random
        counts[np.uint32(ranks[j])] += (ranks[j] & _UNLIKE) + 1
    mixed = counts[BINS:]
    place, found = np.int64(0), np.uint32(0)
    for k in range(bins):
        here = counts[k]
        counts[k], mixed[found] = place, k
        found = np.uint32(found + np.uint32(here >= _UNLIKE))
        place += here & _COUNTED
    if found == 0:
        for j in range(n):
            last = np.uint32(n - 1 - j)
            bin_ = np.uint32(ranks[last])
            place = counts[bin_]
            counts[bin_] = place + 1
            ranks[last] = place
        return
    for j in range(n):
        last = np.uint32(n - 1 - j)
        bin_ = np.uint32(ranks[last])
        place = counts[bin_]
        counts[bin_] = place + 1
        ranks[last] = place
        items[np.uint32(place)] = (np.int64(keys[last]) << 32) | j
    _settle(keys, n, ranks, items, counts, mixed[:found])


@loop
def _settle(keys, n, ranks, items, counts, mixed):
    """Rank what lies in mixed bins anew; counts[k]: where bin k ends among the items."""
    moves = _PATIENCE * n
    for k in mixed:  # never bin 0
        begin, end = counts[k - 1], counts[k]
        moves = _insert(items, begin, end, moves)
        if moves < 0:
            break
        _number(ranks, n, items, begin, end)
    if moves < 0:
        _pack(keys, n, items)
        for third in range(3):
            _distribute(items, ranks, n, 32 + 11 * third, counts)
            for j in range(n):
                items[j] = ranks[j]
        _number(ranks, n, items, 0, n)


@loop
def keep_by_rank(keys, n, low, span, rescale, words, ranks, items, counts, values):
    """Keep values[j] with a probability linear in its rank, divided by it where `rescale` is set.

    A word below probability * 2**32 keeps. Scratch as in `rank_row`.
    """
    rank_row(keys, n, ranks, items, counts)
    step = span / np.float64(n - 1) if n > 1 else 0.0
    first = low if n > 1 else low + span / 2
    zero = values.dtype.type(0)
    for j in range(n):
        probability = first + step * np.float64(ranks[j])
        value = values[j]
        scaled = values.dtype.type(np.float64(value) / probability) if rescale else value
        values[j] = scaled if np.float64(words[j]) < probability * 4294967296.0 else zero
