"""The shape that costs of merges share: a bowl, whose sides may flatten or steepen.

    m(w) = c + a·((1 + q)^λ − 1)/λ,   q = |Lᵀ(w − w*)|²          (λ = 0: c + a·log(1 + q))

Near its lowest point any smooth cost is a convex quadratic, which λ = 1 is everywhere; far from it
a cost in bits or in answers rises slower than that, λ < 1. (The transform is Box and Cox's, "An
analysis of transformations", 1964.) L is lower triangular, so along no line through w* does the
cost fall for ever. The lowest point w*, its cost c, the curvature, a and λ are all estimated, with
priors as wide as the cube. What is not like this is left to the Gaussian process around it.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

FREE = 40
"""Entries of L below its diagonal that are estimated at most: whole columns, from the first on, and
at least one, as there is one stiff direction, the total weight."""
CENTRE, CENTRE_SD = 0.4, 0.6
DEPTH, DEPTH_SD = -1.5, 2.0
ROOT, ROOT_SD = 1.7, 2.0
GROWTH_SD = 1.0
POWER, POWER_SD = 1.0, 1.0
"""Normal priors, in the unit cube and in standard deviations of the costs: of w*, of c, of L (this
is its diagonal; elsewhere 0), of log a (around 0) and of λ."""
LOGS, POWERS, LARGEST_Q = (-10.0, 10.0), (-3.0, 3.0), 1e6
"""Beyond which log a, λ and q count as these, so that nothing overflows."""


class Bowl:
    """The shape in ``d`` dimensions.

    Its parameters lie in one vector of P numbers: w* [d], c, the entries of L, log a, λ.

    Attributes:
        mean, sd: of their prior, float64 [P].
    """

    def __init__(self, d: int) -> None:
        columns, rows = np.triu_indices(d)  # of L, column by column
        below = np.cumsum(d - 1 - np.arange(d))
        kept = (rows == columns) | (below[columns] <= max(FREE, d - 1))
        self.d, self._rows, self._columns = d, rows[kept], columns[kept]
        root = np.where(self._rows == self._columns, ROOT, 0.0)
        self.mean = np.array([*[CENTRE] * d, DEPTH, *root, 0.0, POWER])
        self.sd = np.array(
            [*[CENTRE_SD] * d, DEPTH_SD, *[ROOT_SD] * len(root), GROWTH_SD, POWER_SD]
        )

    def value(self, shape: np.ndarray, points: np.ndarray) -> np.ndarray:
        """m with parameters ``shape`` [P] at ``points`` [n, d]; float64 [n]."""
        _, _, _, q, growth, power = self._parts(shape, points)
        return np.asarray(shape[self.d] + growth * _box_cox(q, power))

    def slopes(self, shape: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Derivatives of m by the parameters; float64 [n, P]."""
        root, step, turned, q, growth, power = self._parts(shape, points)
        by_q = (growth * np.exp((power - 1.0) * np.log1p(q)))[:, None]
        level, nudge = _box_cox(q, power), 1e-6
        columns = [
            -2.0 * by_q * (turned @ root.T),
            np.ones((len(points), 1)),
            2.0 * by_q * step[:, self._rows] * turned[:, self._columns],
            growth * level[:, None],
            growth * (_box_cox(q, power + nudge) - level)[:, None] / nudge,
        ]
        return np.concatenate(columns, axis=1)

    def fit(
        self, points: np.ndarray, costs: np.ndarray, sd: np.ndarray, start: np.ndarray | None = None
    ) -> np.ndarray:
        """The most probable parameters [P].

        Args:
            points: float64 [n, d].
            costs: standardised, float64 [n].
            sd: their standard errors, float64 [n], positive.
            start: parameters to begin at; without them three places are tried, which depend on the
                data alone.
        """
        starts = [start] if start is not None else self._starts(points, costs)

        def residuals(shape: np.ndarray) -> np.ndarray:
            data = (self.value(shape, points) - costs) / sd
            return np.concatenate([data, (shape - self.mean) / self.sd])

        def slopes(shape: np.ndarray) -> np.ndarray:
            data = self.slopes(shape, points) / sd[:, None]
            return np.concatenate([data, np.diag(1.0 / self.sd)])

        fits = [least_squares(residuals, s, slopes, method="lm", max_nfev=100) for s in starts]
        return np.asarray(min(fits, key=lambda fit: float(fit.cost)).x)

    def _starts(self, points: np.ndarray, costs: np.ndarray) -> list[np.ndarray]:
        """The prior's mean, with w* at the best trial, amid the best ones, and as it is."""
        order = np.argsort(costs, kind="stable")
        amid = points[order[: max(1, len(points) // 8)]].mean(axis=0)
        starts = []
        for centre in (points[order[0]], amid, self.mean[: self.d]):
            shape = self.mean.copy()
            shape[: self.d], shape[self.d] = centre, costs[order[0]]
            starts.append(shape)
        return starts

    def _parts(
        self, shape: np.ndarray, points: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float, float]:
        """L, w − w*, Lᵀ(w − w*), q, a and λ."""
        root = np.zeros((self.d, self.d))
        root[self._rows, self._columns] = shape[self.d + 1 : -2]
        step = points - shape[: self.d]
        turned = step @ root
        q = np.minimum((turned**2).sum(axis=1), LARGEST_Q)
        growth = float(np.exp(np.clip(shape[-2], *LOGS)))
        return root, step, turned, q, growth, float(np.clip(shape[-1], *POWERS))


def _box_cox(q: np.ndarray, power: float) -> np.ndarray:
    """((1 + q)^power − 1)/power."""
    log = np.log1p(q)
    if abs(power) < 1e-5:
        return np.asarray(log * (1.0 + power * log / 2.0))
    return np.asarray(np.expm1(power * log) / power)
