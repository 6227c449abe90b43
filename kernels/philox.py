"""Philox4x32-10 on the CPU: a random word for every element, from its index alone.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the word of
element e is a function of (stream, e) and of nothing else, so a mask is the same whatever the
tiling, the thread count or the device. Elements come in groups of 64 that share 16 counters, laid
out so that the four words of neighbouring counters are stored as four contiguous runs: the loops
become vector code. `reference_methods.uniform_words` is the specification.
"""

from __future__ import annotations

import numpy as np

from .blocks import loop

GROUP = 64
"""Elements that share 16 counters; the layout's period."""

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@loop
def fill_words(stream, start, n, words):
    """Fill `words` with those of elements [start, start + n); returns where they begin.

    Args:
        stream: key0, key1, counter2, counter3 as integers below 2**32.
        words: n + 2 * GROUP or more; whole groups are filled.
    """
    key0, key1 = np.uint64(stream[0]), np.uint64(stream[1])
    high2, high3 = np.uint64(stream[2]), np.uint64(stream[3])
    first = start // GROUP
    for group in range((start + n + GROUP - 1) // GROUP - first):
        counter = np.uint64((first + group) * 16)
        at = group * GROUP
        for c in range(16):
            wide = counter + np.uint64(c)
            c0, c1, c2, c3 = wide & _LOW, wide >> _HALF, high2, high3
            for r in range(10):
                p0, p1 = _M0 * c0, _M1 * c2
                c0 = (p1 >> _HALF) ^ c1 ^ ((key0 + np.uint64(r) * _W0) & _LOW)
                c1 = p1 & _LOW
                c2 = (p0 >> _HALF) ^ c3 ^ ((key1 + np.uint64(r) * _W1) & _LOW)
                c3 = p0 & _LOW
            words[at + c] = np.uint32(c0)
            words[at + c + 16] = np.uint32(c1)
            words[at + c + 32] = np.uint32(c2)
            words[at + c + 48] = np.uint32(c3)
    return start - first * GROUP
