"""Stochastic rounding of fp32 to bf16: up or down by chance, right on average.

A value between two neighbours on the bf16 grid goes to the upper one with the probability of its
distance from the lower one (Croci et al., "Stochastic rounding: implementation, error analysis and
applications", 2022, https://doi.org/10.1098/rsos.211631): 16 random bits are added below the last
kept bit, and what is below it is cut off. The random word of an element is Philox's of its index
(`philox`), so the result depends on the seed and the tensor's name and on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .native import compiled

BLOCK = 1024
"""Elements per call of the generator; a multiple of its group."""


@compiled("int64(int64, int64, int64, int64, int64, int64)")
def _rounding() -> Any:
    from .elements import array
    from .philox import fill_words

    def function(values, out, start, count, stream, words):  # type: ignore[no-untyped-def]
        bits, rounded = array(values, np.uint32, count), array(out, np.uint16, count)
        key, random = array(stream, np.int64, 4), array(words, np.uint32, BLOCK + 128)
        worst = np.uint32(0)
        for first in range(0, count, BLOCK):
            n = min(BLOCK, count - first)
            skip = fill_words(key, start + first, n, random)
            for j in range(n):
                value = bits[first + j]
                moved = np.uint32(value + np.uint32(random[skip + j] & np.uint32(0xFFFF)))
                is_finite = np.uint32(value & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
                top = np.uint32((moved if is_finite else value) >> np.uint32(16))
                rounded[first + j] = np.uint16(top)
                worst = max(worst, np.uint32(top & np.uint32(0x7FFF)))
        return np.int64(worst >= np.uint32(0x7F80))

    return function


def round_stochastically(
    values: np.ndarray, out: np.ndarray, start: int, stream: list[int]
) -> bool:
    """bf16 bits of fp32 `values`, which are elements start, start + 1, ... of their tensor.

    Args:
        values: fp32, 1-D, contiguous.
        out: uint16, 1-D, contiguous, of the same length; written.
        stream: key and upper counter words of the tensor's random numbers.

    Returns:
        True when any result is infinite, or any value was not finite; a NaN need not stay one.
    """
    words, key = np.empty(BLOCK + 128, np.uint32), np.array(stream, np.int64)
    addresses = [array.ctypes.data for array in (key, words)]
    done = _rounding()(values.ctypes.data, out.ctypes.data, start, len(values), *addresses)
    return bool(done)
