"""The shape within the surrogate, and what it is there for."""

from __future__ import annotations

import numpy as np
import pytest

from optimer_engine.search.bowl import FREE, Bowl
from optimer_engine.search.surrogate import GaussianProcess


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0, -0.7])
def test_slopes_are_those_of_the_value(power: float) -> None:
    rng = np.random.default_rng(0)
    bowl, points = Bowl(3), rng.random((7, 3))
    shape = bowl.mean + 0.5 * bowl.sd * rng.normal(size=len(bowl.mean))
    shape[-1] = power
    slopes = bowl.slopes(shape, points)
    for i, step in enumerate(1e-5 * np.eye(len(shape))):
        by_hand = (bowl.value(shape + step, points) - bowl.value(shape - step, points)) / 2e-5
        np.testing.assert_allclose(slopes[:, i], by_hand, rtol=1e-3, atol=1e-5)


def test_powers_one_and_zero_are_a_quadratic_and_a_logarithm() -> None:
    bowl, points = Bowl(2), np.random.default_rng(1).random((9, 2))
    shape = np.array([0.4, 0.2, -1.0, 2.0, 0.5, 3.0, np.log(0.3), 1.0])
    root = np.array([[2.0, 0.0], [0.5, 3.0]])
    q = (((points - shape[:2]) @ root) ** 2).sum(axis=1)
    np.testing.assert_allclose(bowl.value(shape, points), -1.0 + 0.3 * q)
    shape[-1] = 0.0
    np.testing.assert_allclose(bowl.value(shape, points), -1.0 + 0.3 * np.log1p(q))
    assert bowl.value(shape, np.full((1, 2), 1e9))[0] < 10.0  # and nothing overflows


@pytest.mark.parametrize("d", [1, 2, 8, 40])
def test_many_dimensions_keep_few_parameters(d: int) -> None:
    """The diagonal and whole columns below it."""
    assert len(Bowl(d).mean) <= d + 1 + d + max(FREE, d - 1) + 2
    assert len(Bowl(d).mean) == len(Bowl(d).sd)


@pytest.mark.parametrize("flat", [True, False])
def test_far_and_bad_points_do_not_move_the_optimum(flat: bool) -> None:
    """Sides that flatten, as a logarithm, or do not: the optimum is found from few noisy trials."""
    off = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        centre, points = rng.uniform(0.15, 0.5, 4), rng.random((36, 4))
        cube = np.clip(centre + 0.15 * rng.normal(size=(4000, 4)), 0.0, 1.0)

        def cost(x: np.ndarray, centre: np.ndarray = centre) -> np.ndarray:
            q = 8.0 * ((x - centre) ** 2).sum(axis=1) + 12.0 * (x - centre).sum(axis=1) ** 2
            return np.asarray(np.log1p(q) if flat else q)

        told = cost(points) * 1.0
        told += 0.1 * told.std() * rng.normal(size=36)
        model = GaussianProcess().fit(points, told)
        off.append(float(cost(cube[model.predict(cube)[0].argmin()][None])[0] / told.std()))
    assert np.median(off) < (0.6 if flat else 0.1)
