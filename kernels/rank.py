"""Keep elements of a row by rank of magnitude on the CPU: an exact sort of one row at a time.

Deltas of 16-bit checkpoints mostly differ in their upper 15 bits alone, and in the upper sixteen
octaves below the row's largest. So one counting pass over those bits, and a short insertion for the
few that are left, usually suffice; rows where that would not be short (fp32 inputs) are sorted on
all bits. Magnitude and index travel in one 64-bit integer.
"""

from __future__ import annotations

import numpy as np

from .blocks import loop
from .reference_methods import BINS

_SMALL = 32
_PATIENCE = 4
_INDEX = np.int64(0xFFFFFFFF)
_SHIFT = np.uint32(16)


@loop
def _insert(items, n, moves):
    """Insertion sort of nearly sorted items; False when it would take more than `moves` moves."""
    for j in range(1, n):
        item = items[j]
        k = j - 1
        while k >= 0 and items[k] > item:
            items[k + 1] = items[k]
            k -= 1
            moves -= 1
        items[k + 1] = item
        if moves < 0:
            return False
    return True


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
def sort_row(keys, n, items, spare, counts):
    """items[:n] = key << 32 | (n - 1 - index), ascending: of equal keys the lowest index last.

    counts: BINS integers of scratch; spare: like items.
    """
    if n <= _SMALL:
        for j in range(n):
            items[j] = (np.int64(keys[n - 1 - j]) << 32) | np.int64(j)
        _insert(items, n, n * n)
        return
    highest = np.int64(0)
    for j in range(n):
        highest = max(highest, np.int64(keys[j] >> _SHIFT))
    lowest = max(highest - np.int64(BINS - 1), np.int64(0))
    bins = highest - lowest + 1
    for k in range(bins):
        counts[k] = 0
    for j in range(n):
        bin_ = max(np.int64(keys[j] >> _SHIFT) - lowest, np.int64(0))
        counts[bin_] += 1
    _places(counts, bins)
    for j in range(n):
        key = keys[n - 1 - j]
        bin_ = max(np.int64(key >> _SHIFT) - lowest, np.int64(0))
        items[counts[bin_]] = (np.int64(key) << 32) | np.int64(j)
        counts[bin_] += 1
    if not _insert(items, n, _PATIENCE * n):
        for third in range(3):
            _distribute(items, spare, n, 32 + 11 * third, counts)
            for j in range(n):
                items[j] = spare[j]


@loop
def keep_by_rank(keys, n, low, span, rescale, words, items, spare, counts, values):
    """Keep values[j] with a probability linear in its rank, divided by it where `rescale` is set.

    A word below probability * 2**32 keeps. The keys are spent.
    """
    sort_row(keys, n, items, spare, counts)
    for r in range(n):
        keys[n - 1 - (items[r] & _INDEX)] = np.uint32(r)
    step = span / np.float64(n - 1) if n > 1 else 0.0
    first = low if n > 1 else low + span / 2
    zero = values.dtype.type(0)
    for j in range(n):
        probability = first + step * np.float64(keys[j])
        value = values[j]
        scaled = values.dtype.type(np.float64(value) / probability) if rescale else value
        values[j] = scaled if np.float64(words[j]) < probability * 4294967296.0 else zero
