"""From scores to the one number that is minimised, its standard error, and the limits kept.

**Differences.** A term's score is compared with the reference's on the same examples; with s_t = +1
where lower is better, −1 where higher is,

    d_t(w) = s_t · (score at w − score of the reference)

`differences` has the estimator of that from some of the examples, and its variance.

**The cost** of weights w, with g_t the terms' weights, is by ``aggregate``

    mean      Σ_t g_t·d_t / Σ_t g_t          the base costs 0, a negative cost is a gain
    worst     max_t g_t·d_t                  no term may pay for another
    pareto    max_t λ_t·z_t + 0.05·Σ λ_t·z_t with z_t = d_t scaled to [0, 1] over the trials and λ
              drawn anew for each proposal (ParEGO: Knowles 2006)

``relative`` divides d_t by the reference's score, so that terms of different units can be averaged.

**Limits.** ``max_loss`` of a term says how much worse than the reference it may become, as a share
of the reference's score: the search avoids what is likely to break it and recommends only what is
likely to keep it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optimer_engine.search.config import SearchConfig
from optimer_engine.search.differences import difference, differences
from optimer_engine.search.objective import Score, Scores
from optimer_engine.search.trials import Told

BASE = "base"
"""The origin of the trial of the base; see `space.Space.known_points`."""
AUGMENTATION = 0.05  # of ParEGO


@dataclass(frozen=True)
class Goal:
    """How scores become a cost; see the module docstring.

    ``weights`` maps terms to g_t, all terms with weight 1 where it is empty; ``limits`` maps terms
    to their ``max_loss``.
    """

    weights: Mapping[str, float]
    limits: Mapping[str, float]
    aggregate: str = "mean"
    relative: bool = False

    @classmethod
    def of(cls, config: SearchConfig) -> Goal:
        """What a configuration asks for."""
        return cls(
            {t.name: t.weight for t in config.objective},
            {t.name: t.max_loss for t in config.objective if t.max_loss is not None},
            config.aggregate,
            config.relative,
        )


@dataclass(frozen=True)
class Point:
    """Weights that were tried: all that is known of them, from one trial or several.

    ``number`` is that of their first trial; ``scores`` is empty where every trial failed.
    """

    number: int
    weights: dict[str, float]
    origin: str
    scores: Scores


def points_of(told: Sequence[Told]) -> list[Point]:
    """The points of a journal in the order of their first trials; equal weights are one point."""
    found: dict[tuple[float, ...], Point] = {}
    for trial in told:
        key = tuple(trial.weights.values())
        scores = trial.scores if trial.status == "ok" else {}
        if key in found:
            first = found[key]
            fuller = {n: _fuller(first.scores.get(n, s), s) for n, s in scores.items()}
            found[key] = Point(
                first.number, first.weights, first.origin, {**first.scores, **fuller}
            )
        else:
            found[key] = Point(trial.number, trial.weights, trial.origin, scores)
    return list(found.values())


@dataclass(frozen=True)
class Observed:
    """What the trials say of a goal, point by point.

    ``costs`` and ``variances`` are float64 [n] and finite; ``limits`` has such a pair per limit,
    positive where the limit is broken; ``terms`` is float64 [n, T], the terms' signed differences
    (nan where a point failed), in the order of ``names``.
    """

    costs: np.ndarray
    variances: np.ndarray
    limits: list[tuple[np.ndarray, np.ndarray]]
    terms: np.ndarray
    names: list[str]


def observe(points: Sequence[Point], goal: Goal, shares: np.ndarray | None = None) -> Observed:
    """Costs of ``points``; ``shares`` is the λ of ``pareto``, without it the mean is taken.

    A failed point costs the worst finite cost plus the spread of the finite ones: bad enough to be
    left, near enough to leave the surrogate its scale.
    """
    names = list(goal.weights) or sorted({n for p in points for n in p.scores})
    reference = reference_of(points)
    if reference is None:
        none, one = np.zeros(len(points)), np.ones(len(points))
        limits = [(one, none) for _ in goal.limits]
        return Observed(one, none, limits, np.full((len(points), len(names)), np.nan), names)
    terms, variances = _differences(points, reference, names)
    g = np.array([goal.weights.get(n, 1.0) for n in names])
    size = np.array([abs(reference.scores[n].value) for n in names])
    size[size == 0] = 1.0
    limits = [
        (_filled(terms[:, i] / size[i] - most), np.nan_to_num(variances[:, i] / size[i] ** 2))
        for i, most in ((names.index(n), most) for n, most in goal.limits.items())
    ]
    unit = size if goal.relative else np.ones(len(names))
    d, v = terms / unit, variances / unit**2
    rows = np.arange(len(points))
    if goal.aggregate == "pareto" and shares is not None:
        low = np.nanmin(d, axis=0) if np.isfinite(d).any() else 0.0
        span = (np.nanmax(d, axis=0) - low) if np.isfinite(d).any() else 1.0
        span = np.where(span > 0, span, 1.0)
        z, slope = shares * (d - low) / span, shares / span
        worst = np.argmax(np.nan_to_num(z), axis=1)
        costs = z[rows, worst] + AUGMENTATION * z.sum(axis=1)
        errors = (slope**2 * v)[rows, worst]
    elif goal.aggregate == "worst":
        worst = np.argmax(np.where(np.isfinite(d) & (g > 0), g * d, -np.inf), axis=1)
        costs, errors = (g * d)[rows, worst], (g**2 * v)[rows, worst]
    else:
        costs, errors = (g * d).sum(axis=1) / g.sum(), (g**2 * v).sum(axis=1) / g.sum() ** 2
    return Observed(_filled(costs), np.nan_to_num(errors), limits, terms, names)


def reference_of(points: Sequence[Point]) -> Point | None:
    """What differences are taken to: the base if it was scored, else the first point that was."""
    scored = [p for p in points if p.scores]
    return next((p for p in scored if is_base(p.origin)), scored[0] if scored else None)


def is_base(origin: str) -> bool:
    """Whether a trial of this origin scores the base itself."""
    return origin.split(", ")[-1] == BASE


def estimated(point: Point, reference: Point, name: str) -> float:
    """Term ``name`` over all examples, by its difference to the reference where only some count."""
    score = point.scores[name]
    if not score.examples:
        return score.value
    return reference.scores[name].value + difference(score, reference.scores[name])


def is_whole(point: Point) -> bool:
    """Whether every term of a point was scored on all of its examples."""
    return bool(point.scores) and not any(s.examples for s in point.scores.values())


def front(observed: Observed, eligible: Sequence[int]) -> list[int]:
    """Which of the ``eligible`` points no other one of them beats in every term."""
    d = observed.terms
    return [
        i
        for i in eligible
        if not any((d[j] <= d[i]).all() and (d[j] < d[i]).any() for j in eligible)
    ]


def _differences(
    points: Sequence[Point], reference: Point, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Signed differences and their variances, both [n, T]; nan where a point failed."""
    weights = np.array([list(point.weights.values()) for point in points])
    at = next(i for i, point in enumerate(points) if point is reference)
    columns = []
    for name in names:
        scores = [point.scores.get(name) for point in points]
        values, variances = differences(scores, weights, at)
        higher = any(score is not None and score.higher_is_better for score in scores)
        columns.append((-values if higher else values, variances))
    return np.stack([d for d, _ in columns], 1), np.stack([v for _, v in columns], 1)


def _fuller(one: Score, other: Score) -> Score:
    """The one over more examples; the later one of equals. A later trial holds the earlier's."""
    if not one.examples and other.examples:
        return one
    return one if other.examples and len(one.examples) > len(other.examples) else other


def _filled(values: np.ndarray) -> np.ndarray:
    good = values[np.isfinite(values)]
    if not good.size:
        return np.ones(len(values))
    spread = float(good.max() - good.min()) or 1.0
    return np.where(np.isfinite(values), values, good.max() + spread)
