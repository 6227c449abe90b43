"""The space of weights: one interval per vector, seen as a unit cube, and the points known before.

Merging has an unusual gift for an optimiser: a few points are worth trying before anything is
known. They are the base itself, the uniform average and each vector alone: what people merge by
hand. Trying them first costs N + 2 trials and guarantees that the search never ends worse than any
of them. Two quasi-random points then break the symmetry of that star before the model is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optimer_engine.search.config import Vector

SOBOL_POINTS = 2
DECIMALS = 9  # of a weight, so that what a file or a table shows is all of it


@dataclass(frozen=True)
class Space:
    """Names of the vectors and the closed interval [low, high] of each weight, in user order."""

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, vectors: Sequence[Vector]) -> Space:
        """The space that a configuration's vectors span."""
        ranges = np.array([v.range for v in vectors], dtype=np.float64)
        return cls(tuple(v.name for v in vectors), ranges[:, 0], ranges[:, 1])

    def to_unit(self, weights: dict[str, float]) -> np.ndarray:
        """Weights as a point of the unit cube, float64 [d]."""
        w = np.array([weights[name] for name in self.names], dtype=np.float64)
        return np.clip((w - self.low) / (self.high - self.low), 0.0, 1.0)

    def to_weights(self, point: np.ndarray) -> dict[str, float]:
        """A point of the unit cube, float64 [d], as weights."""
        return self._named(self.low + np.asarray(point) * (self.high - self.low))

    def known_points(self) -> dict[str, dict[str, float]]:
        """Base (all 0), uniform (all 1/N), each vector alone (1); where the ranges allow them."""
        n = len(self.names)
        rows = {"base": np.zeros(n), "uniform": np.full(n, 1.0 / n)}
        rows |= {f"only {name}": row for name, row in zip(self.names, np.eye(n), strict=True)}
        if n == 1:
            del rows["uniform"]  # it is the single vector
        inside = {k: r for k, r in rows.items() if (r >= self.low).all() and (r <= self.high).all()}
        return {label: self._named(row) for label, row in inside.items()}

    def sobol_points(self, seed: int) -> dict[str, dict[str, float]]:
        """The first scrambled Sobol points of ``seed``."""
        from scipy.stats import qmc

        sampler = qmc.Sobol(len(self.names), scramble=True, rng=np.random.default_rng(seed))
        points = sampler.random(SOBOL_POINTS)
        return {f"sobol {i}": self.to_weights(point) for i, point in enumerate(points)}

    def _named(self, w: np.ndarray) -> dict[str, float]:
        inside = np.clip(np.round(w, DECIMALS), self.low, self.high)
        return {name: float(x) for name, x in zip(self.names, inside, strict=True)}
