"""SMAC as a stateless adviser: everything known goes in, one point comes out.

SMAC keeps its own state on disk, but rewrites those files in place, cannot continue with the same
proposals after an interruption, and asks on the terminal when a setting changed. So it is given
nothing to keep: for each proposal a fresh optimiser is built in a throw-away folder, told every
finished trial, asked once and dropped. The journal of the run (trials.py) is the only truth, and
resuming, replaying under another objective and never having stopped are the same operation.

The price is one fit of the surrogate per proposal, which is needed anyway after every trial.
What SMAC contributes: the loop of model, acquisition and random interleaving, and a place where
other facades, several objectives or many workers can be asked for later.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ConfigSpace import Configuration, ConfigurationSpace, Float
from scipy.stats import norm
from smac import BlackBoxFacade, Scenario
from smac.acquisition.function import EI
from smac.acquisition.maximizer.abstract_acquisition_maximizer import AbstractAcquisitionMaximizer
from smac.facade.abstract_facade import AbstractFacade
from smac.model.abstract_model import AbstractModel
from smac.runhistory.dataclasses import TrialInfo, TrialValue

from optimer_engine.search.surrogate import GaussianProcess

OPTIMISM = 2.0
"""Standard deviations of the confidence bound by which proposals are chosen."""
CLOUD_POINTS = 2048
ROUNDS = 5
SEEDS_PER_ROUND = 8
POINTS_PER_SEED = 48


def propose(
    points: np.ndarray,
    costs: np.ndarray,
    *,
    seed: int,
    model: GaussianProcess | None = None,
    limits: Sequence[GaussianProcess] = (),
    running: np.ndarray | None = None,
    by_mean: bool = False,
) -> np.ndarray:
    """The point to try next.

    Args:
        points: every point tried, in the unit cube, float64 [n, d], all different.
        costs: its cost, float64 [n], finite; lower is better.
        seed: equal seed and equal trials give the equal proposal.
        model: fitted to them; fitted here where it is not given.
        limits: models of what must not be positive, fitted to the same points; the possible
            improvement is multiplied by the probability that it is not, as in Gardner and others,
            "Bayesian optimization with inequality constraints", 2014.
        running: points being tried, in the unit cube, float64 [m, d]. The models believe that each
            will cost what they expect of it (the "kriging believer" of Ginsbourger, Le Riche and
            Carraro, "Kriging is well-suited to parallelize optimization", 2010), so that the next
            proposal goes where there is still something to learn.
        by_mean: propose where the model's optimum is by now. What may improve most lies around it,
            and only a point that was tried can be recommended.

    Returns:
        A point of the unit cube, float64 [d].
    """
    if model is None:
        model = GaussianProcess().fit(points, costs)
    running = np.empty((0, points.shape[1])) if running is None else running
    if len(running):
        model = model.believing(running)
        limits = [limit.believing(running) for limit in limits]
    space = ConfigurationSpace(seed=seed)
    names = [f"w{i:04d}" for i in range(points.shape[1])]  # sorts as it counts
    space.add([Float(name, (0.0, 1.0)) for name in names])
    logging.getLogger("smac").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="optimer-smac-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scenario = Scenario(
            space, name="ask", output_directory=Path(folder), deterministic=True,
            n_trials=1_000_000, seed=seed,
        )  # fmt: skip
        smac = _Facade(
            scenario,
            None,  # type: ignore[arg-type]
            model=_Surrogate(space, model, seed),
            acquisition_function=_Optimistic(points, limits, running, 0.0 if by_mean else OPTIMISM),
            acquisition_maximizer=_CloudSearch(space, seed=seed),
            initial_design=BlackBoxFacade.get_initial_design(scenario, n_configs=0),
            intensifier=BlackBoxFacade.get_intensifier(scenario, max_config_calls=1),
            logging_level=False,
            overwrite=True,
        )
        for point, cost in zip(points, costs, strict=True):
            values = {name: float(x) for name, x in zip(names, point, strict=True)}
            info = TrialInfo(Configuration(space, values=values), seed=0)
            # not smac.tell: it would rank all trials again after each, for incumbents nobody asks
            smac.runhistory.add_trial(info, TrialValue(cost=float(cost)))
        for point in running:
            values = {name: float(x) for name, x in zip(names, point, strict=True)}
            info = TrialInfo(Configuration(space, values=values), seed=0)
            smac.runhistory.add_running_trial(info)
        config = smac.ask().config
    return np.array([config[name] for name in names], dtype=np.float64)


class _Facade(BlackBoxFacade):
    """BlackBoxFacade that takes a surrogate which is not one of SMAC's own Gaussian processes."""

    def _validate(self) -> None:
        AbstractFacade._validate(self)


class _Surrogate(AbstractModel):
    """A fitted model in SMAC's clothes. What SMAC was told lacks the standard errors."""

    def __init__(self, space: ConfigurationSpace, gp: GaussianProcess, seed: int) -> None:
        super().__init__(space, seed=seed)
        self._gp = gp

    def _train(self, X: np.ndarray, Y: np.ndarray) -> _Surrogate:
        return self

    def _predict(
        self, X: np.ndarray, covariance_type: str | None = "diagonal"
    ) -> tuple[np.ndarray, np.ndarray | None]:
        return self._gp.predict(X)


class _Optimistic(EI):
    """What a point may improve on the best one at its lower confidence bound, if limits are kept.

    (best mean − mean + optimism · sd)₊ · P(limits kept). With noisy scores this explores where
    expected improvement keeps sampling one spot: near the optimum all means are alike, and EI,
    which weighs a gain by how likely it is, leaves the directions of little curvature unmeasured.
    While no point is known to keep the limits, the probability of keeping them is all that counts.
    """

    def __init__(
        self,
        points: np.ndarray,
        limits: Sequence[GaussianProcess],
        running: np.ndarray,
        optimism: float,
    ) -> None:
        super().__init__()
        self._running, self._limits, self._optimism = len(running), limits, optimism
        self._points = np.concatenate([points, running])

    def _update(self, **kwargs: Any) -> None:
        super()._update(**kwargs)
        if self._limits or self._running:  # what is being tried counts as if it were known
            assert self._model is not None
            kept = probability_kept(self._limits, self._points) >= 0.5
            mean, _ = self._model.predict_marginalized(self._points[kept])
            self._eta = float(mean.min()) if kept.any() else None

    def _compute(self, X: np.ndarray) -> np.ndarray:
        kept = probability_kept(self._limits, X).reshape(-1, 1)
        if self._eta is None:
            return kept
        assert self._model is not None
        mean, variance = self._model.predict_marginalized(X)
        gain = self._eta - mean + self._optimism * np.sqrt(variance)
        return np.asarray(np.maximum(gain, 0.0).reshape(-1, 1) * kept)


def probability_kept(limits: Sequence[GaussianProcess], points: np.ndarray) -> np.ndarray:
    """Probability [m] that none of ``limits`` is positive at ``points`` [m, d]."""
    kept = np.ones(len(points))
    for model in limits:
        mean, variance = model.predict(points)
        kept *= norm.cdf(-mean / np.sqrt(variance))
    return kept


class _CloudSearch(AbstractAcquisitionMaximizer):
    """Acquisition maximised over a random cloud, then by rounds of ever narrower Gaussian steps.

    SMAC's own maximiser walks neighbour by neighbour through configuration objects; here a round
    is one array operation. Steps are cut at the faces of the cube, so optima with weights of
    exactly 0 are found.
    """

    def _maximize(
        self, previous_configs: list[Configuration], n_points: int
    ) -> list[tuple[float, Configuration]]:
        assert self._acquisition_function is not None
        d = len(self._configspace)
        seen = np.array([config.get_array() for config in previous_configs])
        cloud = np.concatenate(
            [
                self._rng.rand(CLOUD_POINTS, d),
                np.clip(seen.repeat(16, axis=0) + self._steps(16 * len(seen), d, 0.1), 0.0, 1.0),
            ]
        )
        values = self._acquisition_function._compute(cloud).ravel()
        for sd in 0.2 * 0.5 ** np.arange(ROUNDS):
            top = cloud[np.argsort(-values, kind="stable")[:SEEDS_PER_ROUND]]
            steps = self._steps(POINTS_PER_SEED * len(top), d, sd)
            near = np.clip(top.repeat(POINTS_PER_SEED, axis=0) + steps, 0.0, 1.0)
            cloud = np.concatenate([cloud, near])
            values = np.concatenate([values, self._acquisition_function._compute(near).ravel()])
        order = np.argsort(-values, kind="stable")[:64]
        return [
            (float(values[i]), Configuration(self._configspace, vector=cloud[i])) for i in order
        ]

    def _steps(self, n: int, d: int, sd: float) -> np.ndarray:
        """Gaussian steps [n, d]; in half of them only some coordinates move."""
        mask = (self._rng.rand(n, d) < 0.5) | (self._rng.rand(n, 1) < 0.5)
        return self._rng.randn(n, d) * sd * mask
