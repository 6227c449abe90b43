"""Exact thresholds from histograms: where the first so many elements of a tensor end.

Elements are ordered by larger magnitude first and, among equals, lower index first. `cuts` finds
the end of the first m elements as (key, granule, quota): elements with a larger key are in, those
with an equal key are in before that granule, and the first `quota` of them within it. It takes two
passes over the tensor, one where the end falls between two histogram bins, three where many
elements equal a threshold that is not exact in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from optimer_engine.kernels import sparse
from optimer_engine.kernels.reference_methods import HIGH, KEEP, LOW, MAGNITUDE
from optimer_engine.methods.protocol import Tile
from optimer_engine.methods.tiles import blocks, inputs, kernels_for
from optimer_engine.tensor_recipe import TensorRecipe


class Cut(NamedTuple):
    """The end of the first m elements; see the module docstring."""

    key: int
    granule: int
    quota: int


ALL_EQUAL = 1 << 40
"""A granule beyond the last: every element that equals the key is in."""

NOTHING = Cut(0xFFFFFFFE, -1, 0)
"""No element is in."""


@dataclass(frozen=True)
class Keys:
    """What is ordered: see `sparse.Masks`."""

    recipe: TensorRecipe
    measure: int = MAGNITUDE
    factors: np.ndarray | None = None
    row: int = 1

    def masks(self) -> sparse.Masks:
        """The arguments of the counting kernel."""
        n = len(self.recipe.sources)
        rows = np.zeros((n + 1, 8), np.int64)
        rows[:, 0] = KEEP
        return sparse.Masks(
            rows,
            np.zeros((n, 2)),
            np.zeros((n, 4), np.int64),
            self.measure,
            np.empty(0) if self.factors is None else self.factors,
            self.row,
        )


class _Count:
    """One counting pass; its result is (bins, equal), both int64."""

    def __init__(self, keys: Keys, stage: int, wanted: list[tuple[int, int]], places: bool) -> None:
        self.masks, self.stage = keys.masks(), stage
        self.wanted = np.array(wanted, np.int64).reshape(-1, 2)
        self.bins = (len(wanted), (HIGH, LOW, 0)[stage])
        granules = blocks(keys.recipe) if places and stage > 0 else 0
        self.equal = np.zeros((len(wanted), granules), np.int64)

    def start(self) -> np.ndarray:
        """A thread's bins."""
        return np.zeros(self.bins, np.int64)

    def map(self, tile: Tile, accumulator: np.ndarray) -> None:
        """Count the tile; granules have their own places."""
        given = inputs(tile)
        kernels_for(tile).count(given, self.masks, self.stage, self.wanted, accumulator, self.equal)

    def finish(self, accumulators: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Totals of bins, and counts of each granule."""
        total, *others = accumulators
        for other in others:
            total += other
        return total, self.equal


Sought = Callable[[dict[int, np.ndarray]], list[tuple[int, int]]]


def cuts(
    keys: Keys, streams: list[int], sought: Sought, places: bool = True
) -> Generator[Any, Any, list[Cut]]:
    """Find the ends of the first m elements, for several (stream, m).

    Args:
        streams: whose keys are counted: sources, or [0] for a measure of all.
        sought: from the histograms of the upper 15 bits, by stream, to the (stream, m) that are
            wanted; 0 <= m <= elements.
        places: False if every element that equals the last key may be in: no place is sought.

    Yields:
        passes, to be answered by their results.
    """
    bins, _ = yield _Count(keys, 0, [(stream, 0) for stream in streams], places)
    histograms = dict(zip(streams, bins, strict=True))
    wanted = sought(histograms)
    found: list[Cut | None] = [None] * len(wanted)
    open_: list[tuple[int, int, int, int]] = []  # number, stream, upper bits, how many of that bin
    for number, (stream, m) in enumerate(wanted):
        if m == 0:
            found[number] = NOTHING
            continue
        upper, need = _last(histograms[stream], m)
        if need == histograms[stream][upper] and places:
            found[number] = Cut(upper << 16, ALL_EQUAL, 0)
        else:
            open_.append((number, stream, upper, need))
    if open_:
        low, equal = yield _Count(keys, 1, [(s, upper) for _, s, upper, _ in open_], places)
        unplaced = []  # number, stream, key, how many of those that equal it
        for k, (number, stream, upper, need) in enumerate(open_):
            lower, rest = _last(low[k], need)
            key = upper << 16 | lower
            if rest == low[k][lower] or not places:
                found[number] = Cut(key, ALL_EQUAL, 0)
            elif lower == 0:
                found[number] = _placed(key, rest, equal[k])
            else:
                unplaced.append((number, stream, key, rest))
        if unplaced:
            _, equal = yield _Count(keys, 2, [(s, key) for _, s, key, _ in unplaced], places)
            for k, (number, _, key, rest) in enumerate(unplaced):
                found[number] = _placed(key, rest, equal[k])
    return [cut for cut in found if cut is not None]


def _last(bins: np.ndarray, m: int) -> tuple[int, int]:
    """The bin that holds the m-th largest, and how many of it are among the first m."""
    groups = bins.reshape(-1, 256)
    group, rest = _last_of_few(groups.sum(1), m)
    k, rest = _last_of_few(groups[group], rest)
    return 256 * group + k, rest


def _last_of_few(bins: np.ndarray, m: int) -> tuple[int, int]:
    from_above = np.cumsum(bins[::-1])
    k = int(np.searchsorted(from_above, m))
    return len(bins) - 1 - k, m - (int(from_above[k - 1]) if k else 0)


def _placed(key: int, quota: int, equal: np.ndarray) -> Cut:
    """The cut after the first `quota` elements that equal `key`."""
    so_far = np.cumsum(equal)
    granule = int(np.searchsorted(so_far, quota))
    return Cut(key, granule, quota - (int(so_far[granule - 1]) if granule else 0))
