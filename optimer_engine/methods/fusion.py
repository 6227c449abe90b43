"""Arcee Fusion: take over only those changes that stand out."""

from __future__ import annotations

from typing import Any

import numpy as np

from optimer_engine.kernels import span
from optimer_engine.kernels.reference_methods import CUT, IMPORTANCE, LOW, NO_CONSENSUS
from optimer_engine.methods.protocol import Memory, Method, Statistics, Tile, elems, row_elems
from optimer_engine.methods.registry import register
from optimer_engine.methods.sparse import Sum
from optimer_engine.methods.threshold import ALL_EQUAL, NOTHING, Keys, cuts
from optimer_engine.methods.tiles import blocks, operands
from optimer_engine.tensor_recipe import TensorRecipe

EPS = 1e-8
"""Added to probabilities before their ratio is taken."""

ROUNDING = 2.0**-22
"""Importances are compared in fp32, and the threshold is made of three of them. In one row of a
16-bit model some are equal to it but for their rounding, and those are to stand out."""


class _Divergences:
    """KL(softmax(source row) || softmax(base row)) of every row: (rows,) fp64."""

    def __init__(self, recipe: TensorRecipe) -> None:
        self.row = row_elems(recipe.shape)
        self.values = np.zeros(blocks(recipe, self.row))

    def start(self) -> Any:
        """Nothing: every row has its own place."""
        return None

    def map(self, tile: Tile, accumulator: Any) -> None:
        """Compare the tile's rows."""
        span.divergence(operands(tile, from_base=False), self.row, EPS, self.values)

    def finish(self, accumulators: list[Any]) -> np.ndarray:
        """The divergences."""
        return self.values


class _ArceeFusion(Method):
    by_row = True

    def memory(self, recipe: TensorRecipe) -> Memory:
        """A number per row, and histograms."""
        return Memory(8 * blocks(recipe, row_elems(recipe.shape)), 3 * 8 * LOW)

    def readings(self, recipe: TensorRecipe) -> int:
        """Divergences, two for the quartiles, and the merge."""
        return 4

    def statistics(self, recipe: TensorRecipe) -> Statistics:
        """Divergences of rows, then the quartiles of |delta| times its row's."""
        count = elems(recipe.shape)
        divergences = yield _Divergences(recipe)
        keys = Keys(recipe, IMPORTANCE, divergences, row_elems(recipe.shape))
        masks = keys.masks()
        if count:
            ranks = [(0, count - int(q * (count - 1))) for q in (0.25, 0.5, 0.75)]
            found = yield from cuts(keys, [0], lambda _: ranks, places=False)
            keys_found = np.array([cut.key for cut in found], np.uint32).view(np.float32)
            low, median, high = keys_found.astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                threshold = np.float32((median + 1.5 * (high - low)) * (1 - ROUNDING))
            masks.rows[1, :7] = [CUT, threshold.view(np.uint32), ALL_EQUAL, 0, *NOTHING]
        return Sum(masks, [1.0], [1.0], None, NO_CONSENSUS, 1.0, False)

    def merge(self, tile: Tile, state: Sum, out: np.ndarray) -> bool:
        """Write the base and the changes that stand out."""
        return state.merge(tile, out)


register(
    _ArceeFusion(
        "arcee_fusion",
        "Arcee AI, https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
        "theta_0 + delta where |delta| KL(softmax rows) >= median + 1.5 interquartile range",
        max_sources=1,
    )
)
