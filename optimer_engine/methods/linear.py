"""Methods that are a weighted sum with known weights; the fused linear kernel does them."""

from __future__ import annotations

from typing import Any

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.methods.protocol import Fold, Method, Parameter, Tile
from optimer_engine.methods.registry import register
from optimer_engine.tensor_recipe import Settings, TensorRecipe

WEIGHT = Parameter(float, per_source=True, meaning="w_i")
NORMALIZE = "divide by the sum of the weights"
LAMBDA = Parameter(float, 1.0, meaning="factor of the merged delta")
INT8_MASK = Parameter(bool, False, meaning="accepted for mergekit's sake, without effect")


class _Folded(Method):
    skips_zero = True
    on_gpu = True

    def merge(self, tile: Tile, state: Any, out: np.ndarray) -> bool:
        """Write the weighted sum."""
        from optimer_engine.methods.tiles import merge_fold  # with the kernels

        fold = self.fold(tile.recipe)
        assert fold is not None
        return merge_fold(tile, fold, out)


class _Linear(_Folded):
    """Weighted mean of models.

    A base is only what deltas are taken from, for the sake of sources that are stored deltas; its
    own weight is 0. A base that shall count is given as a source.
    """

    def check(self, recipe: TensorRecipe) -> None:
        """Refuse weights that cannot be normalised."""
        super().check(recipe)
        weights = recipe.settings.column("weight")
        if recipe.settings["normalize"] and abs(sum(weights)) < 1e-6 * sum(map(abs, weights)):
            raise RecipeError(
                f"the weights {weights} sum to 0 and cannot be normalised",
                where=recipe.name,
                todo="change them, or set normalize: false",
            )

    def fold(self, recipe: TensorRecipe) -> Fold:
        """Differences to the base, or to the first source."""
        weights = recipe.settings.column("weight")
        total = sum(weights)
        scale = 1.0
        if not recipe.settings["normalize"]:
            scale = total
        elif total != 0:  # all weights 0: the anchor itself
            weights = [weight / total for weight in weights]
        if recipe.base is None:
            return Fold(False, (0.0, *weights[1:]), scale)
        return Fold(True, tuple(weights), scale)


class _TaskArithmetic(_Folded):
    def fold(self, recipe: TensorRecipe) -> Fold:
        """Weights times lambda, over their sum if they are normalised."""
        settings = recipe.settings
        weights = settings.column("weight")
        factor = settings["lambda"] / divisor(weights, settings)
        return Fold(True, tuple(weight * factor for weight in weights))


class _Passthrough(_Folded):
    def fold(self, recipe: TensorRecipe) -> Fold:
        """The source itself, or what its delta makes of the base."""
        (scale,) = recipe.settings.column("scale")
        scale = 1.0 if scale is None else scale
        return Fold(True, (scale,), scale) if recipe.base else Fold(False, (0.0,), scale)


def divisor(weights: list[float], settings: Settings) -> float:
    """What a weighted sum of deltas is divided by: 1 without `normalize`.

    sum |w_i|, so that weights of both signs cannot make the quotient explode; with compat mergekit
    sum w_i.
    """
    if not settings["normalize"]:
        return 1.0
    if settings["compat"] == "mergekit":
        total = sum(weights)
        return 1.0 if abs(total) < 1e-8 else total
    return sum(map(abs, weights)) or 1.0


register(
    _Linear(
        "linear",
        "Wortsman et al., Model soups, 2022, https://arxiv.org/abs/2203.05482",
        "sum w_i theta_i / sum w_i",
        {"weight": WEIGHT, "normalize": Parameter(bool, True, meaning=NORMALIZE)},
        base="optional",
    )
)
register(
    _TaskArithmetic(
        "task_arithmetic",
        "Ilharco et al., Editing models with task arithmetic, 2022,"
        " https://arxiv.org/abs/2212.04089; OptiMer, https://arxiv.org/abs/2603.28858",
        "theta_0 + lambda sum w_i delta_i",
        {
            "weight": WEIGHT,
            "normalize": Parameter(bool, False, meaning=NORMALIZE),
            "lambda": LAMBDA,
            "int8_mask": INT8_MASK,
        },
    )
)
register(
    _Passthrough(
        "passthrough",
        "none: layers are stacked as they are",
        "scale theta_1",
        {"scale": Parameter(float, None, per_source=True, meaning="factor; none copies")},
        base="optional",
        max_sources=1,
    )
)
