"""What a search found, as data: the winner, what it beats, and where the time went."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from optimer_engine.report import versions
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.space import Space
from optimer_engine.search.trials import REUSED, Told, costs

RATIOS_NOTE = (
    "weights clipped at 0 and divided by their sum; how a search's weights turn into a data"
    " mixture is an assumption of this project"
)


class Row(msgspec.Struct, frozen=True):
    """One trial in the table: its scores by term and its cost."""

    name: str
    number: int
    weights: dict[str, float]
    scores: dict[str, float]
    cost: float


class SearchReport(msgspec.Struct, kw_only=True):
    """The result of a search.

    Attributes:
        best_weights: weight by vector; the evaluated point with the lowest surrogate mean.
        best_number: the trial it is.
        best_cost: its observed cost; 0 is the base, negative a gain, see ``objective.py``.
        predicted_cost, predicted_sd: the surrogate's mean and standard deviation there.
        noise_sd: the observation noise the surrogate learned, in units of the cost.
        sum_of_weights: their sum.
        ratios: the weights read as shares of a data mixture; see ``ratios_note``.
        table: base, uniform average, single vectors and the best.
        higher_is_better: by term.
        trials, reused: evaluations made here, and trials taken from another run.
        failed: trials that crashed or gave NaN.
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
    table: list[Row]
    higher_is_better: dict[str, bool]
    trials: int
    reused: int
    failed: int
    seconds: dict[str, float]
    identity: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return msgspec.to_builtins(self)


def make_report(config: SearchConfig, identity: dict[str, Any], told: list[Told]) -> SearchReport:
    """The report of the finished trials ``told``, at least one of them ok."""
    from optimer_engine.search.surrogate import GaussianProcess

    space = Space.of(config.vectors)
    term_weights = {t.name: t.weight for t in config.objective}
    values = costs(told, term_weights)
    points = np.array([space.to_unit(t.weights) for t in told])
    model = GaussianProcess().fit(points, values)
    mean, variance = model.predict(points)
    good = [i for i, t in enumerate(told) if t.status == "ok"]
    best = min(good, key=lambda i: (mean[i], i))

    def row(name: str, i: int) -> Row:
        scores = {term: score.value for term, score in told[i].scores.items()}
        return Row(name, i, told[i].weights, scores, float(values[i]))

    known = space.known_points().items()
    table = [row(n, i) for n, w in known for i in good if told[i].weights == w]
    weights = told[best].weights
    positive = {name: max(w, 0.0) for name, w in weights.items()}
    total = sum(positive.values())
    reused = sum(t.origin.startswith(REUSED) for t in told)
    return SearchReport(
        best_weights=weights,
        best_number=best,
        best_cost=float(values[best]),
        predicted_cost=float(mean[best]),
        predicted_sd=float(variance[best] ** 0.5),
        noise_sd=model.noise_sd,
        sum_of_weights=sum(weights.values()),
        ratios={name: w / total if total else 0.0 for name, w in positive.items()},
        table=[*table, row("best", best)],
        higher_is_better={n: s.higher_is_better for n, s in told[best].scores.items()},
        trials=len(told) - reused,
        reused=reused,
        failed=len(told) - len(good),
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
