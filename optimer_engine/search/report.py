"""What a search found, as data: the winner, what it beats, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from optimer_engine.report import versions
from optimer_engine.search import paper
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.cost import Goal, estimated, front, reference_of
from optimer_engine.search.final import FinalDifference
from optimer_engine.search.heldout import HeldoutRow
from optimer_engine.search.landscape import Landscape
from optimer_engine.search.proposals import without_confirmations
from optimer_engine.search.space import Space
from optimer_engine.search.trials import REUSED, Told

RATIOS_NOTE = (
    "weights clipped at 0 and divided by their sum; how a search's weights turn into a data"
    " mixture is an assumption of this project"
)


class Row(msgspec.Struct, frozen=True):
    """One point in the table: its scores by term, its cost and the standard error of that.

    A point that was scored on some examples only has a standard error, and its scores are those
    of the reference plus the difference on these examples.
    """

    name: str
    number: int
    weights: dict[str, float]
    scores: dict[str, float]
    cost: float
    cost_se: float = 0.0


class SearchReport(msgspec.Struct, kw_only=True):
    """The result of a search.

    Attributes:
        best_weights: value of each dimension of `space.Space`, which is the weight by vector where
            nothing else is searched; the evaluated point with the lowest surrogate mean.
        best_number: the first trial of it.
        best_cost: its observed cost; 0 is the base, negative a gain, see ``cost.py``.
        predicted_cost, predicted_sd: the surrogate's mean and standard deviation there.
        noise_sd: the observation noise the surrogate learned, in units of the cost.
        sum_of_weights: over the vectors, each with the mean weight of its groups of layers.
        ratios: the weights read as shares of a data mixture; see ``ratios_note``.
        ended: why the search stopped.
        table: base, uniform average, single vectors and the best.
        front: of a ``pareto`` search, the points that no other one beats in every term.
        heldout: base, uniform average, best single vector and the best, on held-out data.
        final: the best from the vectors searched and from their ``final`` forms, where some have
            one.
        sensitivity: by vector, how much the surrogate's cost rises when the best weight is moved
            by 0.1, to the worse side.
        higher_is_better: by term.
        trials, reused: evaluations made here, and trials taken from another run.
        failed: trials that crashed or gave NaN.
        examples: example-evaluations made; ``examples_known`` were not made, their scores being
            known from an earlier trial, here or in a run beside this one.
        seconds: in all trials made here, by merge, evaluate and ask.
        identity: what was searched, by fingerprint.
        versions: of the libraries used.
    """

    best_weights: dict[str, float]
    best_number: int
    best_cost: float
    predicted_cost: float
    predicted_sd: float
    noise_sd: float
    sum_of_weights: float
    ratios: dict[str, float]
    ratios_note: str = RATIOS_NOTE
    ended: str
    table: list[Row]
    front: list[Row]
    heldout: list[HeldoutRow] = []
    final: FinalDifference | None = None
    sensitivity: dict[str, float]
    higher_is_better: dict[str, bool]
    trials: int
    reused: int
    failed: int
    examples: int
    examples_known: int
    seconds: dict[str, float]
    identity: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return msgspec.to_builtins(self)


def make_report(
    config: SearchConfig, identity: dict[str, Any], told: list[Told], ended: str
) -> SearchReport:
    """The report of the finished trials ``told``, at least one of them ok; why they ``ended``."""
    space, goal = Space.of(config), Goal.of(config)
    landscape = Landscape(space, told, goal)
    points, seen = landscape.points, landscape.observed
    scored = [i for i, p in enumerate(points) if p.scores]
    best, reference = landscape.best, reference_of(points)
    if config.method == "paper":
        best = paper.winner(points, goal)
    assert best is not None and reference is not None

    def row(name: str, i: int) -> Row:
        point = points[i]
        scores = {term: estimated(point, reference, term) for term in point.scores}
        sd = float(seen.variances[i] ** 0.5)
        return Row(name, point.number, point.weights, scores, float(seen.costs[i]), sd)

    known = space.known_points().items()
    table = [row(n, i) for n, w in known for i in scored if points[i].weights == w]
    weights = points[best].weights
    by_vector = space.by_vector(weights)
    positive = {name: max(w, 0.0) for name, w in by_vector.items()}
    total = sum(positive.values())
    reused = sum(t.origin.startswith(REUSED) for t in told)
    return SearchReport(
        best_weights=weights,
        best_number=points[best].number,
        best_cost=float(seen.costs[best]),
        predicted_cost=float(landscape.mean[best]),
        predicted_sd=float(landscape.variance[best] ** 0.5),
        noise_sd=landscape.model.noise_sd,
        ended=ended,
        sum_of_weights=sum(by_vector.values()),
        ratios={name: w / total if total else 0.0 for name, w in positive.items()},
        table=[*table, row("best", best)],
        front=[
            row(f"trial {points[i].number}", i)
            for i in (front(seen, scored) if goal.aggregate == "pareto" else [])
        ],
        sensitivity=sensitivity(landscape, best),
        higher_is_better={n: s.higher_is_better for n, s in points[best].scores.items()},
        trials=len(without_confirmations(told)) - reused,
        reused=reused,
        failed=sum(t.status != "ok" for t in told),
        examples=examples_scored(told),
        examples_known=sum(t.known for t in told),
        seconds={
            "merge": sum(t.merge_s for t in told),
            "evaluate": sum(t.evaluate_s for t in told),
            "ask": sum(t.ask_s for t in told),
        },
        identity=identity,
        versions=versions(
            "smac", "ConfigSpace", "numpy", "scipy", "torch", "transformers", "lm_eval"
        ),
    )


def examples_scored(told: Sequence[Told]) -> int:
    """Example-evaluations that trials made; a score without parts counts as one."""
    own = [t for t in told if not t.origin.startswith(REUSED)]
    return sum(max(len(s.parts), 1) for t in own for s in t.scores.values()) - sum(
        t.known for t in own
    )


def sensitivity(landscape: Landscape, best: int) -> dict[str, float]:
    """By vector, how much the surrogate's cost rises when the weight of a point moves by 0.1.

    To the worse side; ``best`` is the index of the point.
    """
    space, weights = landscape.space, landscape.points[best].weights
    rises = {}
    for i, name in enumerate(space.names):
        moved = [weights | {name: weights[name] + step} for step in (-0.1, 0.1)]
        inside = [w for w in moved if space.low[i] <= w[name] <= space.high[i]]
        at = np.array([space.to_unit(w) for w in [weights, *inside]])
        mean, _ = landscape.model.predict(at)
        rises[name] = float(mean.max() - mean[0])
    return rises
