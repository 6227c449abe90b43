"""The model of the landscape: a Gaussian process over merge weights.

The cost of a merge as a function of its weights is smooth (two checkpoints near each other behave
alike) and each sample costs minutes, so the cheapest way to a good merge is to spend milliseconds
on a model of everything seen so far. A Gaussian process does that with calibrated uncertainty from
ten points on. The alternatives: random forests, SMAC's other surrogate, are piecewise constant and
need several times the trials on such landscapes; TPE models where good points lie, not the cost,
and cannot say how sure it is; a quadratic regression is as good near the optimum and wrong
elsewhere. So a quadratic with unknown coefficients is part of this model: without it the process
falls back to the mean of all costs a short way from what was tried, and takes every step beyond the
trials for a step uphill.

SMAC's own Gaussian process is the same mathematics, fitted through a general kernel algebra. This
one is written for this one kernel, with the gradient of the likelihood by hand, and is 10 to 25
times faster: an ask is dominated by the evaluation, as it should be.

Mathematics: Rasmussen and Williams, "Gaussian Processes for Machine Learning", chapters 2 and 5
(posterior: algorithm 2.1; gradient of the marginal likelihood: equation 5.9).
"""

from __future__ import annotations

import copy

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

SQRT5 = 5.0**0.5
TREND, STEEPNESS = 0.25, 1.5
"""Prior variance of the quadratic's constant, in standardised costs; of its slopes, more by the
square of the second number."""
# log-normal priors (mean, sd of the logarithm) of the hyperparameters of standardised costs in the
# unit cube; the length scale's mean grows with the dimension as distances do.
SIGNAL_PRIOR = (0.5, 1.0)
NOISE_PRIOR = (-7.0, 2.0)
LENGTH_PRIOR = (-0.75, 0.75)
BOUNDS_SIGNAL = (-3.0, 5.0)
BOUNDS_LENGTH = (-3.5, 3.5)
BOUNDS_NOISE = (-16.0, 1.0)


def winsorise(costs: np.ndarray) -> np.ndarray:
    """Costs with the bad tail cut at median + 3·(median − best).

    One failed merge can cost a thousand times the rest; a Gaussian model would spend all of its
    variance there. Nothing is lost: how bad a bad region is does not matter.
    """
    median = float(np.median(costs))
    return np.minimum(costs, median + 3.0 * (median - float(np.min(costs))))


class GaussianProcess:
    """Matérn-5/2 around a quadratic, with a length scale per dimension, known and learned noise.

    ``fit`` takes points in the unit cube, shape [n, d] float64, their costs, shape [n], and what is
    known of their errors; the hyperparameters are the maximum a posteriori found by L-BFGS from two
    fixed starts, so equal data gives an equal model. ``predict`` gives mean and variance of the
    noise-free cost.

    The variance of observation i is v_i + σ²: v_i, known, is what scoring some of the examples
    leaves open (it is 0 when all were scored), and σ², learned and shared, is what all else adds.
    """

    def fit(
        self,
        points: np.ndarray,
        costs: np.ndarray,
        variances: np.ndarray | None = None,
        *,
        theta: np.ndarray | None = None,
    ) -> GaussianProcess:
        """Fit to ``points`` [n, d], ``costs`` [n] (finite) and ``variances`` [n]; returns self.

        With ``theta``, the log hyperparameters of an earlier fit, those are kept: milliseconds.
        """
        self._x = np.ascontiguousarray(points, dtype=np.float64)
        clipped = winsorise(np.asarray(costs, dtype=np.float64))
        self._mean = float(clipped.mean())
        self._scale = float(clipped.std()) or 1.0
        self._y = (clipped - self._mean) / self._scale
        known = np.zeros(len(clipped)) if variances is None else np.asarray(variances)
        self._known = known / self._scale**2
        self._squares = (self._x[:, None, :] - self._x[None, :, :]) ** 2
        self._centre = self._x.mean(axis=0)
        self._trend_here = self._trend(self._x, self._x)
        self.theta = self._most_probable() if theta is None else theta
        k, _, _ = self._covariance(self.theta)
        self._chol = cholesky(k, lower=True)
        self._alpha = cho_solve((self._chol, True), self._y)
        return self

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
        k = np.exp(self.theta[0]) * _shape(np.maximum(square, 0.0))[0]
        k += self._trend(points, self._x)
        mean = k @ self._alpha
        v = solve_triangular(self._chol, k.T, lower=True)
        z = STEEPNESS * (points - self._centre)
        prior = np.exp(self.theta[0]) + TREND * (1.0 + (z**2).sum(1)) ** 2
        variance = np.maximum(prior - (v**2).sum(0), 1e-12)
        return mean * self._scale + self._mean, variance * self._scale**2

    def believing(self, points: np.ndarray) -> GaussianProcess:
        """This model, had its mean been observed at ``points`` [m, d]: surer there, else equal."""
        mean, _ = self.predict(points)
        after = copy.copy(self)
        after._x = np.concatenate([self._x, points])
        after._y = np.concatenate([self._y, (mean - self._mean) / self._scale])
        after._known = np.concatenate([self._known, np.zeros(len(points))])
        after._squares = (after._x[:, None, :] - after._x[None, :, :]) ** 2
        after._trend_here = after._trend(after._x, after._x)
        k, _, _ = after._covariance(self.theta)
        after._chol = cholesky(k, lower=True)
        after._alpha = cho_solve((after._chol, True), after._y)
        return after

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the learned observation noise, in units of the costs told."""
        return float(np.exp(0.5 * self.theta[-1])) * self._scale

    def _trend(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Covariance of a quadratic in the weights, [n, m] for ``a`` [n, d] and ``b`` [m, d]."""
        inner = (a - self._centre) @ (b - self._centre).T
        return np.asarray(TREND * (1.0 + STEEPNESS**2 * inner) ** 2)

    def _covariance(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape, slope = _shape(self._squares @ np.exp(-2.0 * theta[1:-1]))
        signal = np.exp(theta[0]) * shape
        k = signal + self._trend_here + np.diag(np.exp(theta[-1]) + 1e-8 + self._known)
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
