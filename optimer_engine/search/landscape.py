"""What the trials say of the whole space: the surrogate over the points tried.

The recommended point is the evaluated one where the surrogate's mean is lowest: with noisy scores
the lowest observation is often a lucky one. Points that are likely to break a limit do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optimer_engine.search.cost import Goal, observe, points_of
from optimer_engine.search.space import Space
from optimer_engine.search.trials import Told

LIKELY = 0.5
"""Least probability of keeping the limits of a point that may be recommended."""
UNLIKELY = 0.16
"""Probability of keeping the limits at which a trial is given up: one standard deviation."""


class Landscape:
    """The surrogate fitted to finished trials.

    Args:
        space: of the weights.
        told: the trials, at least one.
        goal: how scores become a cost.
        shares: λ of a ``pareto`` goal; the mean of the terms without it.
        like: an earlier landscape whose hyperparameters are kept, which takes milliseconds.

    Attributes:
        space: of the weights.
        points, observed: what was tried, and its costs.
        unit: the points in the unit cube, float64 [n, d].
        mean, variance: of the surrogate there, float64 [n].
        kept: probability of each point of keeping the limits, float64 [n].
        best: index of the recommended point, None where every trial failed.
    """

    def __init__(
        self,
        space: Space,
        told: Sequence[Told],
        goal: Goal,
        *,
        shares: np.ndarray | None = None,
        like: Landscape | None = None,
    ) -> None:
        from optimer_engine.search.surrogate import GaussianProcess

        self.space = space
        self.points = points_of(told)
        self.observed = seen = observe(self.points, goal, shares)
        self.unit = np.array([space.to_unit(p.weights) for p in self.points])
        self.model: Any = GaussianProcess().fit(
            self.unit, seen.costs, seen.variances, like=None if like is None else like.model
        )
        self.limits: list[Any] = [
            GaussianProcess().fit(self.unit, *pair, like=None if like is None else like.limits[i])
            for i, pair in enumerate(seen.limits)
        ]
        self.mean, self.variance = self.model.predict(self.unit)
        self.kept = np.ones(len(self.points))
        if self.limits:
            from optimer_engine.search.adviser import probability_kept

            self.kept = probability_kept(self.limits, self.unit)
        scored = [i for i, p in enumerate(self.points) if p.scores]
        likely = [i for i in scored if self.kept[i] >= LIKELY]
        self.best: int | None = None
        if likely:
            self.best = min(likely, key=lambda i: (self.mean[i], i))
        elif scored:
            self.best = max(scored, key=lambda i: (self.kept[i], -i))

    def index(self, weights: dict[str, float]) -> int:
        """Index of the point with ``weights``."""
        return next(i for i, p in enumerate(self.points) if p.weights == weights)

    def hopeful(self, weights: dict[str, float]) -> bool:
        """Whether the tried point with ``weights`` may still turn out the best one."""
        i = self.index(weights)
        others = [j for j, p in enumerate(self.points) if p.scores and j != i]
        rivals = [j for j in others if self.kept[j] >= LIKELY]
        if not rivals:
            return True
        may = float(self.mean[i] - self.variance[i] ** 0.5) <= float(self.mean[rivals].min())
        return may and bool(self.kept[i] > UNLIKELY)

    def expected_gain(self, point: np.ndarray) -> float:
        """Expected improvement at ``point`` [d] on the recommended point, in units of the cost."""
        from scipy.stats import norm

        if self.best is None:
            return 0.0
        mean, variance = self.model.predict(point[None])
        sd = float(variance[0]) ** 0.5
        z = float(self.mean[self.best] - mean[0]) / sd
        return float(sd * (z * norm.cdf(z) + norm.pdf(z)))
