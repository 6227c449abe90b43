"""The model of the landscape: a Gaussian process over merge weights.

The cost of a merge as a function of its weights is smooth (two checkpoints near each other behave
alike) and each sample costs minutes, so the cheapest way to a good merge is to spend milliseconds
on a model of everything seen so far. A Gaussian process does that with calibrated uncertainty from
ten points on. The alternatives: random forests, SMAC's other surrogate, are piecewise constant and
need several times the trials on such landscapes; TPE models where good points lie, not the cost,
and cannot say how sure it is; a quadratic regression is as good near the optimum and wrong
elsewhere. So the shape that such costs share is part of this model, with its parameters unknown
(`bowl`). Without it the process falls back to the mean of all costs a short way from what was
tried, and takes every step beyond the trials for a step uphill; a plain quadratic in its place is
bent by the far and bad points, whose costs grow slower than that, and puts the optimum elsewhere.

SMAC's own Gaussian process is the same mathematics, fitted through a general kernel algebra. This
one is written for this one kernel, with the gradient of the likelihood by hand, and is 10 to 25
times faster: an ask is dominated by the evaluation, as it should be.

The bowl is linearised where it fits best, so that its parameters, normal a priori, are one more
part of the covariance and what is not known of them is part of the variance.

Mathematics: Rasmussen and Williams, "Gaussian Processes for Machine Learning", chapters 2 and 5
(posterior: algorithm 2.1; explicit basis functions: section 2.7; gradient of the marginal
likelihood: equation 5.9).
"""

from __future__ import annotations

import copy

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from optimer_engine.search.bowl import Bowl

SQRT5 = 5.0**0.5
MISFIT = 0.003
"""Variance, in standardised costs, by which points may lie off the bowl when it is fitted alone."""
# Log-normal priors (mean, sd of the logarithm) of the hyperparameters of what is around the bowl,
# in standardised costs and the unit cube, where lengths grow with the dimension as distances do.
SIGNAL_PRIOR = (-3.0, 1.5)
NOISE_PRIOR = (-7.0, 2.0)
LENGTH_PRIOR = (-0.75, 0.75)
BOUNDS_SIGNAL = (-9.0, 5.0)
BOUNDS_LENGTH = (-3.5, 3.5)
BOUNDS_NOISE = (-16.0, 1.0)
TAIL, DOUBT = 10.0, 0.1
"""Costs count up to median + TAIL·(median − best); those cut there get DOUBT of the square of what
is above the median as a variance."""


def winsorise(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Costs with the bad tail cut, and what variance those get that were.

    One failed merge can cost a thousand times the rest. The model would spend all of its variance
    there, and bend the bowl to reach it; cut, it is still known to be bad, but not how bad.
    """
    median = float(np.median(costs))
    above = TAIL * (median - float(np.min(costs)))
    return np.minimum(costs, median + above), np.where(costs > median + above, DOUBT * above**2, 0)


class GaussianProcess:
    """Matérn-5/2 around a bowl, with a length scale per dimension, known and learned noise.

    ``fit`` takes points in the unit cube, shape [n, d] float64, their costs, shape [n], and what is
    known of their errors; the hyperparameters are the maximum a posteriori found by L-BFGS from two
    fixed starts, so equal data gives an equal model. ``predict`` gives mean and variance of the
    noise-free cost.

    The variance of observation i is v_i + σ²: v_i, known, is what scoring some of the examples
    leaves open (it is 0 when all were scored), and σ², learned and shared, is what all else adds.

    Attributes:
        theta: log of the hyperparameters: signal variance, d length scales, σ².
        shape: parameters of the bowl, at which it is linearised.
    """

    def fit(
        self,
        points: np.ndarray,
        costs: np.ndarray,
        variances: np.ndarray | None = None,
        *,
        like: GaussianProcess | None = None,
    ) -> GaussianProcess:
        """Fit to ``points`` [n, d], ``costs`` [n] (finite) and ``variances`` [n]; returns self.

        With ``like``, an earlier fit, its hyperparameters are kept: milliseconds.
        """
        self._x = np.ascontiguousarray(points, dtype=np.float64)
        clipped, doubt = winsorise(np.asarray(costs, dtype=np.float64))
        self._mean = float(clipped.mean())
        self._scale = float(clipped.std()) or 1.0
        standard = (clipped - self._mean) / self._scale
        known = doubt if variances is None else doubt + variances
        self._known = known / self._scale**2
        self._bowl = Bowl(self._x.shape[1])
        self.shape: np.ndarray = self._bowl.fit(
            self._x, standard, np.sqrt(self._known + MISFIT), None if like is None else like.shape
        )
        slopes = self._bowl.slopes(self.shape, self._x)
        self._y = standard - self._expected(self._x, slopes)
        self._measure(slopes)
        self.theta: np.ndarray = self._most_probable() if like is None else like.theta
        self._solve()
        return self

    def _measure(self, slopes: np.ndarray) -> None:
        """What the covariance needs whatever the hyperparameters are."""
        self._squares = (self._x[:, None, :] - self._x[None, :, :]) ** 2
        self._features = slopes * self._bowl.sd
        self._trend = self._features @ self._features.T

    def _solve(self) -> None:
        k, _, _ = self._covariance(self.theta)
        self._chol = cholesky(k, lower=True)
        self._alpha = cho_solve((self._chol, True), self._y)

    def _expected(self, points: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        """Of the linearised bowl, whose slopes at the points these are, a priori."""
        off = self._bowl.mean - self.shape
        return np.asarray(self._bowl.value(self.shape, points) + slopes @ off)

    def _most_probable(self) -> np.ndarray:
        d = self._x.shape[1]
        length_mean = LENGTH_PRIOR[0] + 0.5 * np.log(d)
        self._prior_mean = np.array([SIGNAL_PRIOR[0], *[length_mean] * d, NOISE_PRIOR[0]])
        self._prior_sd = np.array([SIGNAL_PRIOR[1], *[LENGTH_PRIOR[1]] * d, NOISE_PRIOR[1]])
        bounds = [BOUNDS_SIGNAL, *[BOUNDS_LENGTH] * d, BOUNDS_NOISE]
        wide_and_noisy = np.array([0.0, *[length_mean + 1.0] * d, -2.0])
        fits = [
            minimize(self._loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
            for start in (self._prior_mean, wide_and_noisy)
        ]
        return np.asarray(min(fits, key=lambda fit: float(fit.fun)).x)

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance [m] of the cost at ``points`` [m, d], in units of the costs told."""
        length = np.exp(self.theta[1:-1])
        a, b = points / length, self._x / length
        square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2.0 * a @ b.T
        slopes = self._bowl.slopes(self.shape, points)
        features = slopes * self._bowl.sd
        k = np.exp(self.theta[0]) * _shape(np.maximum(square, 0.0))[0]
        k += features @ self._features.T
        mean = self._expected(points, slopes) + k @ self._alpha
        v = solve_triangular(self._chol, k.T, lower=True)
        prior = np.exp(self.theta[0]) + (features**2).sum(1)
        variance = np.maximum(prior - (v**2).sum(0), 1e-12)
        return mean * self._scale + self._mean, variance * self._scale**2

    def believing(self, points: np.ndarray) -> GaussianProcess:
        """This model, had its mean been observed at ``points`` [m, d]: surer there, else equal."""
        mean, _ = self.predict(points)
        after = copy.copy(self)
        after._x = np.concatenate([self._x, points])
        slopes = self._bowl.slopes(self.shape, after._x)
        expected = self._expected(after._x, slopes)[len(self._x) :]
        believed = (mean - self._mean) / self._scale - expected
        after._y = np.concatenate([self._y, believed])
        after._known = np.concatenate([self._known, np.zeros(len(points))])
        after._measure(slopes)
        after._solve()
        return after

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the learned observation noise, in units of the costs told."""
        return float(np.exp(0.5 * self.theta[-1])) * self._scale

    def _covariance(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape, slope = _shape(self._squares @ np.exp(-2.0 * theta[1:-1]))
        signal = np.exp(theta[0]) * shape
        k = signal + self._trend + np.diag(np.exp(theta[-1]) + 1e-8 + self._known)
        return k, signal, np.exp(theta[0]) * slope

    def _loss(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log posterior of log hyperparameters, and its gradient."""
        k, signal, slope = self._covariance(theta)
        z = (theta - self._prior_mean) / self._prior_sd
        try:
            chol = cholesky(k, lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(theta)
        inverse = cho_solve((chol, True), np.eye(len(self._y)))
        alpha = inverse @ self._y
        value = 0.5 * self._y @ alpha + np.log(np.diag(chol)).sum() + 0.5 * (z**2).sum()
        outer = inverse - np.outer(alpha, alpha)
        lengths = np.einsum("ij,ijk->k", outer * slope, self._squares) * np.exp(-2.0 * theta[1:-1])
        gradient = 0.5 * np.concatenate(
            [[(outer * signal).sum()], lengths, [np.exp(theta[-1]) * np.trace(outer)]]
        )
        return float(value), gradient + z / self._prior_sd


def _shape(square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matérn-5/2 at squared scaled distance r², and −k'(r)/r = 5/3·(1 + √5 r)·exp(−√5 r)."""
    r = np.sqrt(square)
    decay = np.exp(-SQRT5 * r)
    return (1.0 + SQRT5 * r + 5.0 / 3.0 * square) * decay, 5.0 / 3.0 * (1.0 + SQRT5 * r) * decay
