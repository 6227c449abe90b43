"""What to try next, and when nothing is left worth trying.

    known points ─► 2 Sobol points ─► (gradient start) ─► SMAC, one fresh adviser per proposal

A proposal depends on the seed and on the journal up to it and on nothing else.

**When to stop.** A search is settled when, over its last ``patience`` proposals, both what was
gained and what each of them promised before it was made (its expected improvement) are below half a
per cent of what separates a median trial from the best one. One alone would not do: long spells
without a gain are normal in six dimensions and more while the model still expects one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from optimer_engine.search.config import SearchConfig
from optimer_engine.search.cost import Goal
from optimer_engine.search.landscape import Landscape
from optimer_engine.search.space import Space
from optimer_engine.search.trials import CONFIRM, REUSED, Asked, Told

NEGLIGIBLE = 0.005
MEAN_EVERY = 4
"""Of so many proposals one is where the model's optimum is by now. After trials that were reused it
is the first one, as the model has much to go on."""

Start = Callable[[], dict[str, float]]
Trial = TypeVar("Trial", Asked, Told)


def proposal(
    config: SearchConfig, space: Space, landscape: Landscape | None, told: Sequence[Told],
    start: Start | None = None, running: Sequence[Asked] = (),
) -> Asked:  # fmt: skip
    """The next trial: the first known or Sobol point not yet tried, else what the model advises.

    Sobol points are left out where trials were reused: the model has better to go on.

    Args:
        config, space: of the search.
        landscape: of ``told``; None before the first trial.
        told: the finished trials.
        start: computes the point that gradients lead to, where they are wanted.
        running: trials under way elsewhere; the model believes that they cost what it expects.
    """
    number = len(told) + len(running)
    started = time.perf_counter()

    def asked(origin: str, weights: dict[str, float], expected: float = 0.0) -> Asked:
        asked_s = round(time.perf_counter() - started, 4)
        return Asked(number, weights, origin, asked_s, float(f"{expected:.6g}"))

    number_seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0] >> 1)
    if config.method == "paper":
        from optimer_engine.search import paper

        return asked(*paper.propose(space, told, Goal.of(config), number_seed, running))
    tried = [t.weights for t in told] + [t.weights for t in running]
    origins = {t.origin for t in told} | {t.origin for t in running}
    for origin, point in first_points(config, space, told).items():
        if point not in tried:
            return asked(origin, point)
    if start is not None and "gradient" not in origins:
        point = start()
        if point not in tried:
            return asked("gradient", point)
    if landscape is None:  # more seats than known points
        at = np.random.default_rng(number_seed).random(len(space.low))
        return asked("random", space.to_weights(at))
    from optimer_engine.search.adviser import propose

    advised = propose(
        landscape.unit, landscape.observed.costs,
        seed=number_seed, model=landscape.model, limits=landscape.limits,
        running=np.array(
            [space.to_unit(t.weights) for t in without_confirmations(running)]
        ).reshape(-1, len(space.low)),
        by_mean=_by_mean(landscape, running),
    )  # fmt: skip
    return asked("smac", space.to_weights(advised), landscape.expected_gain(advised))


def _by_mean(landscape: Landscape, running: Sequence[Asked]) -> bool:
    """Whether the next proposal is one of those that `MEAN_EVERY` counts."""
    reused = sum(point.origin.startswith(REUSED) for point in landscape.points)
    new = len(landscape.points) - reused + len(without_confirmations(running))
    return new % MEAN_EVERY == (0 if reused else MEAN_EVERY - 1)


def first_points(
    config: SearchConfig, space: Space, told: Sequence[Told]
) -> dict[str, dict[str, float]]:
    """What is tried before any model is asked, by origin."""
    first = dict(space.known_points())
    if not any(t.origin.startswith(REUSED) for t in told):
        first |= space.sobol_points(config.seed)
    return first


def shares(goal: Goal, seed: int, number: int) -> np.ndarray | None:
    """λ of trial ``number`` for a ``pareto`` goal, uniform on the simplex, float64 [T]."""
    if goal.aggregate != "pareto":
        return None
    counted = np.array([g > 0 for g in goal.weights.values()])
    drawn = np.random.default_rng([seed, number, 1]).exponential(size=len(counted)) * counted
    return np.asarray(drawn / drawn.sum())


def settled(config: SearchConfig, space: Space, now: Landscape, told: Sequence[Told]) -> str:
    """Why the search may stop, or nothing; see the module docstring.

    ``now`` is the landscape of ``told``, which holds no trials that only confirm.
    """
    advised = [t for t in told if t.origin == "smac"]
    if not 0 < config.patience <= len(advised) or now.best is None:
        return ""
    if config.aggregate == "pareto":
        return ""  # a front is never finished: every trial may add to it
    late = advised[-config.patience :]
    before = Landscape(space, told[: told.index(late[0])], Goal.of(config), like=now)
    if before.best is None:
        return ""
    was = now.index(before.points[before.best].weights)
    gained = float(now.mean[was] - now.mean[now.best])
    promised = float(np.mean([t.expected for t in late]))
    scale = float(np.median(now.observed.costs) - now.mean[now.best])
    if max(gained, promised) > NEGLIGIBLE * scale:
        return ""
    return (
        f"settled: the last {config.patience} trials gained {max(gained, 0.0):.2g} and promised"
        f" {promised:.2g} each, against {scale:.2g} between a median trial and the best"
    )


def without_confirmations(told: Sequence[Trial]) -> list[Trial]:
    """The trials that tried new weights."""
    return [t for t in told if not t.origin.startswith(CONFIRM)]
