"""The specification of the sparse methods' kernels, on whole tensors in numpy: slow and obvious.

    delta_i = theta_i - base                       (or the stored tau_i)
    kept_i  = delta_i where mask_i, else 0
    x_i     = m_i * kept_i                         m_i: weight and rescaling in one number
    votes   = sum_i v_i * kept_i                   (or sum_i sign(x_i))
    agree   = x_i > 0 where votes > 0, x_i < 0 where votes < 0, nobody where votes = 0
    total   = lambda * sum of agreeing x_i / sum of their d_i         (without consensus: sum_i x_i)
    out     = round(base + total), once; base's own bits where total is zero

Masks rest on one total order of a tensor's elements: larger magnitude first, and among equal
magnitudes the lower index first. A magnitude is the bits of |delta| in fp32, read as an integer.
"""

from __future__ import annotations

import numpy as np

from .reference import round_to, upcast

BLOCK = 1024
"""Elements that the CPU's loops take at a time: a dozen fp32 blocks fit a first-level cache."""

PITCH = BLOCK + 144
"""Elements from one such block to the next: a load waits for an earlier store at the same place
within a page, so blocks that are walked together lie at different ones."""

GRANULE = 65536
"""Elements per block of exact counts and of sums; a multiple of BLOCK."""

NO_CONSENSUS, SUM, COUNT = 0, 1, 2
"""Codes of what elects the sign of an element."""

KEEP, DROP, CUT, CHANCE, RANK = 0, 1, 2, 3, 4
"""Kinds of mask: all, nothing, by threshold, at random, at random by rank within the row."""

MAGNITUDE, VARIANCE, IMPORTANCE = 0, 1, 2
"""What a threshold compares: each |delta_i|, their variance, |delta_0| times a factor per row."""

BINS = 2048
"""Counters with which a row is sorted."""

HIGH, LOW = 1 << 15, 1 << 16
"""Bins of the histograms of a magnitude's upper 15 and lower 16 bits."""


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011): uint32 (..., 4) counters, (2,) key -> (..., 4)."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k = [np.uint64(key[0]), np.uint64(key[1])]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> half) ^ c[1] ^ k[0], p1 & low, (p0 >> half) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, -1).astype(np.uint32)


def uniform_words(stream: np.ndarray, start: int, n: int) -> np.ndarray:
    """The 32-bit words of elements [start, start + n).

    Element e has word (e // 16) % 4 of counter (e // 64) * 16 + e % 16. stream: (4,), the key's two
    words and the counter's upper two.
    """
    e = np.arange(start, start + n, dtype=np.uint64)
    sixteen, sixty_four = np.uint64(16), np.uint64(64)
    number = e // sixty_four * sixteen + e % sixteen
    counter = np.empty((n, 4), np.uint32)
    counter[:, 0] = number & np.uint64(0xFFFFFFFF)
    counter[:, 1] = number >> np.uint64(32)
    counter[:, 2:] = stream[2:]
    words = philox(counter, stream[:2])
    return words[np.arange(n), (e // sixteen % np.uint64(4)).astype(np.int64)]


def magnitudes(values: np.ndarray) -> np.ndarray:
    """The bits of |values| in fp32, as int64; they order as the magnitudes do."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    return (single.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)


def top(keys: np.ndarray, count: int) -> np.ndarray:
    """Which elements are the first `count` in the total order; 1-D."""
    mask = np.zeros(keys.shape, bool)
    mask[np.argsort(-keys, kind="stable")[:count]] = True
    return mask


def chance_mask(stream: np.ndarray, start: int, n: int, chance: int) -> np.ndarray:
    """Keep an element when its word is below chance = round(density * 2**32)."""
    return uniform_words(stream, start, n) < np.uint64(chance)


def rank_probabilities(keys: np.ndarray, low: float, span: float) -> np.ndarray:
    """low for a row's least element up to low + span for its first, linear in rank; (rows, n)."""
    n = keys.shape[-1]
    if n == 1:
        return np.full(keys.shape, low + span / 2)
    order = np.argsort(-keys, axis=-1, kind="stable")
    ranks = np.empty(keys.shape, np.int64)
    np.put_along_axis(ranks, order, np.arange(n - 1, -1, -1)[None].repeat(len(keys), 0), -1)
    return low + span / (n - 1) * ranks


def merge(
    base: np.ndarray,
    base_code: int,
    kept: list[np.ndarray],
    multipliers: list[float],
    votes: list[float],
    divisors: list[float] | None,
    consensus: int,
    scale: float,
    zero_is_positive: bool,
    out_code: int,
) -> np.ndarray:
    """Masked deltas to the merged tensor; see the module docstring.

    Args:
        base: 1-D, in the storage of `base_code`.
        kept: masked deltas, 1-D, all float32 or all float64, which is the arithmetic's dtype.
        divisors: d_i; None for no division.
        zero_is_positive: elect + where the votes are exactly zero.
    """
    dtype = kept[0].dtype.type
    zeros = np.zeros(base.shape, dtype)
    total, vote, sums, counts = zeros.copy(), zeros.copy(), {}, {}
    for sign in (1, -1):
        sums[sign], counts[sign] = zeros.copy(), zeros.copy()
    for i, delta in enumerate(kept):
        x = dtype(multipliers[i]) * delta
        total += x
        vote += np.sign(x) if consensus == COUNT else dtype(votes[i]) * delta
        for sign in (1, -1):
            agrees = np.sign(x) == sign
            sums[sign] += np.where(agrees, x, 0)
            counts[sign] += np.where(agrees, dtype(divisors[i] if divisors else 0), 0)
    if consensus != NO_CONSENSUS:
        plus = (vote >= 0) if zero_is_positive else (vote > 0)
        total = np.where(plus, sums[1], np.where(vote < 0, sums[-1], 0)).astype(dtype)
        if divisors:
            divisor = np.where(plus, counts[1], counts[-1])
            total = total / np.where(divisor == 0, dtype(1), divisor)
        total = total * dtype(scale)
    values = upcast(base, base_code, dtype)
    return round_to(np.where(total == 0, values, values + total), out_code)
