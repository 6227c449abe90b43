"""How many examples a trial is scored on: few at first, all where that may decide something.

A bad merge shows itself on a dozen examples. So every trial begins with ``first_share`` of them,
drawn afresh for each trial, and goes on to twice as many, and again, up to all, *while the merge
may still be the best*: while the surrogate, which knows the scores so far and their standard
errors, puts its cost less one standard deviation below the best point's. Early in a search most
merges stop at once; late, when proposals crowd around the optimum, nearly all of them end on all
examples, so the last digits are measured as they would be without stages.

Why fresh examples: a small fixed subset has an optimum of its own, and the search would find that
one. Why not Hyperband: it compares trials of equal size only and forgets what the small ones said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

WORTH_STAGING = 64  # examples of a term below which it is always scored whole


def stages(counts: Mapping[str, int], first_share: float) -> list[dict[str, int]]:
    """How many examples of each term, stage by stage; the last stage has all of them."""
    rows = []
    share = first_share
    while True:
        rows.append(
            {
                name: n if n < WORTH_STAGING else min(n, math.ceil(share * n))
                for name, n in counts.items()
            }
        )
        if rows[-1] == dict(counts):
            return rows
        share *= 2.0


def drawn(seed: int, number: int, n: int) -> np.ndarray:
    """The order in which trial ``number`` takes a term's ``n`` examples, int64 [n].

    It depends on n and not on the term: two metrics of one task see the same examples.
    """
    return np.random.default_rng([seed, number, n]).permutation(n)
