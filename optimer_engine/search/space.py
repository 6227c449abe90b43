"""What is searched, seen as a unit cube, and the points known before.

One dimension per vector, its weight; with ``layer_groups: k`` one per vector and group of layers;
and one for each parameter of the merge method whose value is written as a range. A dimension's name
is what stands in journals and tables: ``ja``, ``ja 2/3`` (its second group of three), ``density``
(of the method), ``ja density`` (of one vector).

Merging has an unusual gift for an optimiser: a few points are worth trying before anything is
known. They are the base itself, the uniform average and each vector alone: what people merge by
hand. Trying them first costs N + 2 trials and guarantees that the search never ends worse than any
of them. Two quasi-random points then break the symmetry of that star before the model is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.search.config import SearchConfig, is_range

if TYPE_CHECKING:
    from optimer_engine.recipe import Recipe

SOBOL_POINTS = 2
DECIMALS = 9  # of a weight, so that what a file or a table shows is all of it


class Dimension(msgspec.Struct, frozen=True, omit_defaults=True):
    """One searched number: a weight of ``vector`` (in a group of layers), or a ``parameter``.

    ``start`` is a parameter's value at the known points. ``vector`` is empty where a parameter is
    the method's.
    """

    name: str
    low: float
    high: float
    vector: str = ""
    group: int = 0
    parameter: str = ""
    start: float = 0.0


@dataclass(frozen=True)
class Space:
    """The dimensions, in user order.

    Attributes:
        dimensions: vectors first (group by group), then parameters.
        layer_groups: of each vector's weight.
        names: of the dimensions; low, high: their closed intervals, float64 [d].
    """

    dimensions: tuple[Dimension, ...]
    layer_groups: int = 1

    @classmethod
    def of(cls, config: SearchConfig) -> Space:
        """The space that a configuration spans."""
        n = config.layer_groups
        weights = [
            Dimension(
                v.name if n == 1 else f"{v.name} {g + 1}/{n}", v.range[0], v.range[1], v.name, g
            )
            for v in config.vectors
            for g in range(n)
        ]
        shared = [("", key, value) for key, value in config.parameters.items()]
        own = [(v.name, key, value) for v in config.vectors for key, value in v.parameters.items()]
        parameters = [
            Dimension(
                f"{vector} {key}".strip(),
                value[0],
                value[1],
                vector,
                0,
                key,
                _start(config, key, value),
            )
            for vector, key, value in [*shared, *own]
            if is_range(value)
        ]
        made = cls((*weights, *parameters), n)
        twice = [name for name in made.names if made.names.count(name) > 1]
        if twice:
            raise RecipeError(
                f"{twice[0]!r} would stand for two searched numbers", where="vectors",
                todo="name a vector otherwise",
            )  # fmt: skip
        return made

    @classmethod
    def described(cls, identity: dict[str, Any]) -> Space:
        """The space in the identity of a run; see `identity.identity`."""
        merge = identity.get("merge")
        if merge is None:
            space = identity["space"]
            rows = [Dimension(name, low, high, name) for name, (low, high) in space.items()]
            return cls(tuple(rows))
        rows = msgspec.convert(merge["dimensions"], list[Dimension])
        return cls(tuple(rows), merge["layer_groups"])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the dimensions."""
        return tuple(x.name for x in self.dimensions)

    @property
    def low(self) -> np.ndarray:
        """Lower ends, float64 [d]."""
        return np.array([x.low for x in self.dimensions], dtype=np.float64)

    @property
    def high(self) -> np.ndarray:
        """Upper ends, float64 [d]."""
        return np.array([x.high for x in self.dimensions], dtype=np.float64)

    @property
    def vectors(self) -> list[str]:
        """The vectors, in user order."""
        return list(dict.fromkeys(x.vector for x in self.dimensions if not x.parameter))

    def to_unit(self, weights: dict[str, float]) -> np.ndarray:
        """Weights as a point of the unit cube, float64 [d]."""
        w = np.array([weights[name] for name in self.names], dtype=np.float64)
        return np.clip((w - self.low) / (self.high - self.low), 0.0, 1.0)

    def to_weights(self, point: np.ndarray) -> dict[str, float]:
        """A point of the unit cube, float64 [d], as weights."""
        return self._named(self.low + np.asarray(point) * (self.high - self.low))

    def known_points(self) -> dict[str, dict[str, float]]:
        """Base (all 0), uniform (all 1/N), each vector alone (1); where the ranges allow them."""
        vectors = self.vectors
        n = len(vectors)
        rows = {"base": np.zeros(n), "uniform": np.full(n, 1.0 / n)}
        rows |= {f"only {name}": row for name, row in zip(vectors, np.eye(n), strict=True)}
        if n == 1:
            del rows["uniform"]  # it is the single vector
        points = {label: self._everywhere(row) for label, row in rows.items()}
        low, high = self.low, self.high
        return {
            label: self._named(point)
            for label, point in points.items()
            if (point >= low).all() and (point <= high).all()
        }

    def sobol_points(self, seed: int) -> dict[str, dict[str, float]]:
        """The first scrambled Sobol points of ``seed``."""
        from scipy.stats import qmc

        sampler = qmc.Sobol(len(self.names), scramble=True, rng=np.random.default_rng(seed))
        points = sampler.random(SOBOL_POINTS)
        return {f"sobol {i}": self.to_weights(point) for i, point in enumerate(points)}

    def by_vector(self, weights: dict[str, float]) -> dict[str, float]:
        """Weight of each vector, the mean over its groups of layers; parameters left out."""
        found = {
            vector: [
                weights[x.name] for x in self.dimensions if x.vector == vector and not x.parameter
            ]
            for vector in self.vectors
        }
        return {vector: sum(parts) / len(parts) for vector, parts in found.items()}

    def recipe(self, recipe: Recipe, weights: dict[str, float]) -> Recipe:
        """``recipe`` with ``weights``; its sources bear the names of the vectors."""
        shared = dict(recipe.parameters)
        own: dict[str, dict[str, Any]] = {s.name: dict(s.parameters) for s in recipe.sources}
        parts: dict[str, list[float]] = {s.name: [] for s in recipe.sources}
        for x in self.dimensions:
            if not x.parameter:
                parts[x.vector].append(weights[x.name])
            else:
                (own[x.vector] if x.vector else shared)[x.parameter] = weights[x.name]
        sources = [
            msgspec.structs.replace(s, parameters=own[s.name], **_weight(parts[s.name]))
            for s in recipe.sources
        ]
        return msgspec.structs.replace(recipe, parameters=shared, sources=sources)

    def _everywhere(self, row: np.ndarray) -> np.ndarray:
        """A weight per vector in all groups of layers, parameters at their start."""
        weight = dict(zip(self.vectors, row, strict=True))
        return np.array([x.start if x.parameter else weight[x.vector] for x in self.dimensions])

    def _named(self, w: np.ndarray) -> dict[str, float]:
        inside = np.clip(np.round(w, DECIMALS), self.low, self.high)
        return {name: float(x) for name, x in zip(self.names, inside, strict=True)}


def _weight(parts: Sequence[float]) -> dict[str, Any]:
    """The keys of a recipe's source for its weight in each group of layers."""
    if len(parts) == 1:
        return {"weight": parts[0], "by_layer": []}
    return {"weight": 1.0 if any(parts) else 0.0, "by_layer": list(parts)}


def _start(config: SearchConfig, key: str, ends: Sequence[float]) -> float:
    """The method's default where it lies in the range, else the middle."""
    from optimer_engine import methods

    default = methods.get(config.merge_method).parameters[key].default
    inside = isinstance(default, int | float) and ends[0] <= default <= ends[1]
    return float(default) if inside else (ends[0] + ends[1]) / 2
