"""Merges along spheres, and Model Stock: one pass for products, then a weighted sum.

The results lie in the span of the inputs, so that the products of all pairs are all that has to be
known of a tensor, a row or a column; `weights_of_products` makes weights of them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.kernels import span
from optimer_engine.methods.linear import WEIGHT
from optimer_engine.methods.protocol import (
    GRANULE,
    Fold,
    Memory,
    Method,
    Parameter,
    Statistics,
    Tile,
    elems,
    row_elems,
)
from optimer_engine.methods.registry import register
from optimer_engine.methods.tiles import CODE, Products, blocks, merge_fold, operands, symmetric
from optimer_engine.methods.weights_of_products import (
    COLINEAR,
    karcher_weights,
    model_stock_weights,
    multislerp_weights,
    slerp_weights,
)
from optimer_engine.tensor_recipe import TensorRecipe


@dataclass(frozen=True)
class _Spherical(Method):
    """Takes the products of the tensor's inputs, or of their rows or columns, makes weights."""

    deltas_from_base: bool = True
    base_is_source: bool = False

    def weigh(self, recipe: TensorRecipe, products: np.ndarray) -> np.ndarray:
        """(..., n, n) -> (..., n)."""
        raise NotImplementedError

    def along(self, recipe: TensorRecipe) -> str:
        """What the vectors are: the "tensor", its "rows" or its "columns"."""
        return "tensor"

    def unit(self, recipe: TensorRecipe) -> int:
        """A granule, a row, or as many rows as make a granule."""
        along, row = self.along(recipe), self._row(recipe)
        if along == "columns":
            return max(1, GRANULE // row) * row
        return row if along == "rows" else GRANULE

    def _row(self, recipe: TensorRecipe) -> int:
        if self.along(recipe) == "columns":
            return max(1, elems(recipe.shape) // max(1, recipe.shape[0]))
        return row_elems(recipe.shape)

    def _count(self, recipe: TensorRecipe) -> int:
        return len(recipe.sources) + (self.base_is_source and recipe.base is not None)

    def _from_base(self, recipe: TensorRecipe) -> bool:
        return self.deltas_from_base and recipe.base is not None

    def memory(self, recipe: TensorRecipe) -> Memory:
        """Products per granule, row or column, twice while they are summed up."""
        pairs = self._count(recipe) ** 2 * 8
        if self.along(recipe) == "columns":
            depth = max(1, blocks(recipe, self.unit(recipe)).bit_length())
            return Memory(pairs * self._row(recipe) * (depth + 16), 0)
        return Memory(3 * pairs * blocks(recipe, self.unit(recipe)), 0)

    def readings(self, recipe: TensorRecipe) -> int:
        """Products, then the sum."""
        return 2

    def statistics(self, recipe: TensorRecipe) -> Statistics:
        """One pass for the products; the state is a Fold, or an array of weights."""
        along, from_base = self.along(recipe), self._from_base(recipe)
        if along == "columns":
            products = yield _ColumnProducts(
                recipe, from_base, self._row(recipe), self.unit(recipe)
            )
        else:
            row = self._row(recipe) if along == "rows" else None
            products = yield Products(recipe, from_base, self.base_is_source, row)
        if along != "tensor":
            with np.errstate(all="ignore"):
                return np.ascontiguousarray(self.weigh(recipe, products).T)
        if np.isfinite(products).all():
            weights = self.weigh(recipe, products)
        else:
            weights = np.full(self._count(recipe), np.nan)  # so that every tile says so
        return self._fold(recipe, [float(w) for w in weights])

    def _fold(self, recipe: TensorRecipe, weights: list[float]) -> Fold:
        if self._from_base(recipe):
            return Fold(True, tuple(weights))
        scale = sum(weights)
        if recipe.base is None:
            return Fold(False, (0.0, *weights[1:]), scale)
        return Fold(True, tuple(weights[-len(recipe.sources) :]), scale)

    def merge(self, tile: Tile, state: Fold | np.ndarray, out: np.ndarray) -> bool:
        """Write the weighted sum."""
        if isinstance(state, Fold):
            return merge_fold(tile, state, out)
        recipe = tile.recipe
        given = operands(tile, self._from_base(recipe))
        columns = self.along(recipe) == "columns"
        code = CODE[recipe.dtype]
        return span.combine(given, self._row(recipe), columns, state, out, code)


class _ColumnProducts:
    """Products of all pairs of sources for each column: (columns, sources, sources) fp64.

    Sums of fixed blocks of rows are added in a fixed binary tree, each as soon as its neighbour is
    there, so that the result depends on no order and only a few blocks are held at a time.
    """

    def __init__(self, recipe: TensorRecipe, from_base: bool, row: int, unit: int) -> None:
        self.from_base, self.row, self.unit = from_base, row, unit
        self.nodes: dict[tuple[int, int], np.ndarray] = {}
        self.lock = threading.Lock()

    def start(self) -> Any:
        """Nothing: the tree is shared."""
        return None

    def map(self, tile: Tile, accumulator: Any) -> None:
        """Add the tile's blocks to the tree."""
        given = operands(tile, self.from_base)
        n = len(given.sources)
        for first in range(0, tile.stop - tile.start, self.unit):
            part = slice(first, min(first + self.unit, tile.stop - tile.start))
            sums = np.zeros((n, n, self.row))
            span.column_products(
                span.Operands(
                    None if given.base is None else given.base[part],
                    given.base_code,
                    [source[part] for source in given.sources],
                    given.codes,
                    given.is_delta,
                    tile.start + first,
                    given.wide,
                    given.from_base,
                ),
                self.row,
                sums,
            )
            self._add((tile.start + first) // self.unit, sums)

    def _add(self, index: int, sums: np.ndarray) -> None:
        level = 0
        with self.lock:
            while (other := self.nodes.pop((level, index ^ 1), None)) is not None:
                sums = sums + other  # of two numbers, in either order
                level, index = level + 1, index // 2
            self.nodes[level, index] = sums

    def finish(self, accumulators: list[Any]) -> np.ndarray:
        """What is left of the tree, from its leaves to its root."""
        total = sum((self.nodes[key] for key in sorted(self.nodes)), np.zeros(()))
        return symmetric(np.moveaxis(np.asarray(total), -1, 0))


class _Slerp(_Spherical):
    def weigh(self, recipe: TensorRecipe, products: np.ndarray) -> np.ndarray:
        """From the base towards the source."""
        mergekit = recipe.settings["compat"] == "mergekit"
        return slerp_weights(
            products, recipe.settings["t"], 1 - 0.9995**2 if mergekit else COLINEAR
        )


class _NuSlerp(_Spherical):
    def along(self, recipe: TensorRecipe) -> str:
        """Flat by default, else rows (the last dimension) or columns (the first)."""
        if recipe.settings["nuslerp_flatten"] or len(recipe.shape) < 2:
            return "tensor"
        return "columns" if recipe.settings["nuslerp_row_wise"] else "rows"

    def weigh(self, recipe: TensorRecipe, products: np.ndarray) -> np.ndarray:
        """From the first to the second source, by their weights."""
        first, second = recipe.settings.column("weight")
        total = first + second
        t = 0.5 if abs(total) < 1e-6 else second / total
        return slerp_weights(products, t, COLINEAR)


class _MultiSlerp(_Spherical):
    def check(self, recipe: TensorRecipe) -> None:
        """Refuse weights that cannot be normalised."""
        super().check(recipe)
        weights = recipe.settings.column("weight")
        if recipe.settings["normalize_weights"] and sum(weights) == 0:
            raise RecipeError(
                f"the weights {weights} sum to 0 and cannot be normalised", where=recipe.name
            )

    def weigh(self, recipe: TensorRecipe, products: np.ndarray) -> np.ndarray:
        """All sources at once."""
        if len(recipe.sources) == 1:
            return np.ones(1)
        weights = np.array(recipe.settings.column("weight"))
        if recipe.settings["normalize_weights"]:
            weights = weights / weights.sum()
        return multislerp_weights(products, weights, recipe.settings["eps"], recipe.name)


class _Karcher(_Spherical):
    def weigh(self, recipe: TensorRecipe, products: np.ndarray) -> np.ndarray:
        """All inputs alike, a base among them."""
        if len(products) == 1:
            return np.ones(1)
        return karcher_weights(products, recipe.settings["max_iter"], recipe.settings["tol"])


class _ModelStock(_Spherical):
    def along(self, recipe: TensorRecipe) -> str:
        """The tensor, or each of its rows (filters)."""
        by_row = recipe.settings["filter_wise"] and len(recipe.shape) > 1
        return "rows" if by_row else "tensor"

    def weigh(self, recipe: TensorRecipe, products: np.ndarray) -> np.ndarray:
        """All sources alike."""
        mergekit = recipe.settings["compat"] == "mergekit"
        return model_stock_weights(products, 1e-6 if mergekit else 0.0)


register(
    _Slerp(
        "slerp",
        "Shoemake, Animating rotation with quaternion curves, 1985,"
        " https://doi.org/10.1145/325165.325242",
        "(sin((1 - t) a) theta_0 + sin(t a) theta_1) / sin a, a their angle",
        {"t": Parameter(float, meaning="0 is the base, 1 the source")},
        max_sources=1,
        deltas_from_base=False,
        base_is_source=True,
    )
)
register(
    _NuSlerp(
        "nuslerp",
        "as slerp; tensors, rows or columns, of models or of deltas",
        "slerp of delta_1 and delta_2 by w_2 / (w_1 + w_2), plus theta_0",
        {
            "weight": WEIGHT,
            "nuslerp_flatten": Parameter(bool, True, meaning="the tensor is one vector"),
            "nuslerp_row_wise": Parameter(
                bool, False, meaning="vectors along the first dimension, not the last"
            ),
        },
        base="optional",
        min_sources=2,
        max_sources=2,
    )
)
register(
    _MultiSlerp(
        "multislerp",
        "Goddard, 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        "barycentre of directions in the tangent space of their mean, times the mean length",
        {
            "weight": WEIGHT,
            "normalize_weights": Parameter(bool, True, meaning="divide them by their sum"),
            "eps": Parameter(float, 1e-8, low=0, meaning="added to lengths"),
        },
        base="optional",
    )
)
register(
    _Karcher(
        "karcher",
        "Karcher, Riemannian center of mass, 1977, https://doi.org/10.1002/cpa.3160300502;"
        " for merging https://arxiv.org/abs/2603.04972",
        "direction of least summed squared angle to all inputs, times their mean length",
        {
            "max_iter": Parameter(int, 10, low=0, meaning="iterations at most"),
            "tol": Parameter(float, 1e-5, low=0, meaning="step that ends them, in radians"),
        },
        base="optional",
        deltas_from_base=False,
        base_is_source=True,
    )
)
register(
    _ModelStock(
        "model_stock",
        "Jang et al., Model stock, 2024, https://arxiv.org/abs/2403.19522",
        "theta_0 + t mean delta_i, t = n cos / (1 + (n - 1) cos), cos of their mean angle",
        {"filter_wise": Parameter(bool, False, meaning="a t for each row")},
        min_sources=2,
    )
)
