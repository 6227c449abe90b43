"""The protocol of the OptiMer paper (arXiv 2603.28858), for comparison.

TPE with independent dimensions (the default of Optuna up to version 4), 100 trials of which the
first 20 are random, each scored on the first 100 examples of every task; the best 3 are scored
again on the first 300 and the best of those wins. That much is known from detailed third-party
notes on the paper and its script, not from the paper itself; how tasks are averaged is not known,
so this uses the search's own cost. The paper's script sets no seed; here a seed gives every trial.

Like the adviser, it is stateless: the study is built anew from the journal for each proposal.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimer_engine.errors import MissingExtraError
from optimer_engine.search.cost import Goal, Point, observe, points_of
from optimer_engine.search.space import Space
from optimer_engine.search.trials import CONFIRM, Asked, Told

RANDOM_TRIALS = 20
FIRST_EXAMPLES = 100
FINAL_EXAMPLES = 300
FINALISTS = 3


def propose(
    space: Space, told: Sequence[Told], goal: Goal, seed: int, running: Sequence[Asked] = ()
) -> tuple[str, dict[str, float]]:
    """Origin and weights of the next trial, beside those that are ``running``.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            "the paper's method needs Optuna", todo="pip install optuna, or leave `method` out"
        ) from error
    names = [f"w{i:04d}" for i in range(len(space.names))]
    box: dict[str, Any] = {n: optuna.distributions.FloatDistribution(0.0, 1.0) for n in names}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS,
            multivariate=False,
            seed=seed % 2**32,
            constant_liar=bool(running),
        )
        study = optuna.create_study(sampler=sampler)
        points = points_of(told)
        costs = observe(points, goal).costs if points else np.empty(0)
        for point, cost in zip(points, costs, strict=True):
            at = dict(zip(names, map(float, space.to_unit(point.weights)), strict=True))
            study.add_trial(
                optuna.trial.create_trial(params=at, distributions=box, value=float(cost))
            )
        for trial in running:
            at = dict(zip(names, map(float, space.to_unit(trial.weights)), strict=True))
            under_way = optuna.trial.TrialState.RUNNING
            study.add_trial(
                optuna.trial.create_trial(state=under_way, params=at, distributions=box)
            )
        params = study.ask(box).params
    origin = "random" if len(told) < RANDOM_TRIALS else "tpe"
    return origin, space.to_weights(np.array([params[name] for name in names]))


def stages(counts: dict[str, int], *, final: bool) -> list[dict[str, int]]:
    """The one stage of a trial: the first 100 examples, or the first 300."""
    most = FINAL_EXAMPLES if final else FIRST_EXAMPLES
    return [{name: min(n, most) for name, n in counts.items()}]


def finalists(told: Sequence[Told], goal: Goal, counts: dict[str, int]) -> list[Point]:
    """Those of the best 3 that lack examples of the final."""
    tried = points_of([t for t in told if not t.origin.startswith(CONFIRM)])
    costs = observe(tried, goal).costs
    scored = [i for i, p in enumerate(tried) if p.scores]
    final = {p.number: p for p in points_of(told)}
    best = sorted(scored, key=lambda i: (costs[i], i))[:FINALISTS]
    return [tried[i] for i in best if not _is_final(final[tried[i].number], counts)]


def winner(points: Sequence[Point], goal: Goal) -> int:
    """Index of the best point among those with the most examples."""
    scored = [i for i, p in enumerate(points) if p.scores]
    most = max(_examples(points[i]) for i in scored)
    finalists = [i for i in scored if _examples(points[i]) == most]
    # among themselves, so that all examples of the final count
    costs = observe([points[i] for i in finalists], goal).costs
    return finalists[int(np.argmin(costs))]


def _examples(point: Point) -> int:
    return sum(len(s.parts) for s in point.scores.values())


def _is_final(point: Point, counts: dict[str, int]) -> bool:
    wanted = stages(counts, final=True)[0]
    return all(len(point.scores[n].parts) >= wanted[n] for n in wanted if point.scores[n].parts)
