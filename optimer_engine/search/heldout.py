"""Scores on data that the search never saw: what may be reported.

A search fits its development data, if only by a few weights. So the terms under ``heldout`` are
scored when it is over, and only for the points a table needs: base, uniform average, best single
vector and winner. Intervals are paired bootstraps: examples are drawn again with replacement, the
same for both models (Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from optimer_engine.durable import replace_file
from optimer_engine.errors import RecipeError
from optimer_engine.search.config import SearchConfig, Term
from optimer_engine.search.objective import Score, Scores

RESAMPLES = 2000
FILE = "heldout.json"


class HeldoutRow(msgspec.Struct, frozen=True):
    """One model on held-out data.

    ``cost`` is the weighted mean of its terms' signed differences to the base, as in ``cost.py``;
    ``low`` and ``high`` bound it with 95 % confidence (both None where examples are not known).
    ``gap`` is how much worse that is than the cost on the search's own data.
    """

    name: str
    scores: dict[str, float]
    cost: float
    low: float | None
    high: float | None
    gap: float


def refuse_overlap(searched: Mapping[str, object], heldout: Mapping[str, object]) -> None:
    """Refuse held-out terms that measure what the search measures.

    Raises:
        RecipeError: naming both terms.
    """
    for name, term in heldout.items():
        for other, measured in searched.items():
            if term and term == measured:
                raise RecipeError(
                    f"measures just what {other!r} of the objective measures",
                    where=f"heldout {name!r}",
                    todo="give it data of its own",
                )


def refuse_same_source(config: SearchConfig) -> None:
    """Refuse held-out terms that read a file or task of the objective, if only other examples.

    Raises:
        RecipeError: naming both terms.
    """

    def source(term: Term) -> tuple[str, str] | None:
        if term.corpus is not None:
            return "file", str(Path(term.corpus).resolve())
        return None if term.task is None else (f"task {term.task}", str(term.tasks_dir))

    searched = {source(term): term.name for term in config.objective}
    for term in config.heldout:
        found = source(term)
        if found is not None and found in searched:
            raise RecipeError(
                f"reads the same {found[0]} as {searched[found]!r} of the objective",
                where=f"heldout {term.name!r}",
                todo="give it data of its own, or leave heldout out and set heldout_share: 0.3",
            )


def heldout_rows(
    score: Callable[[dict[str, float]], Scores],
    weights: Mapping[str, float],
    chosen: Mapping[str, tuple[dict[str, float], float]],
    out: Path,
) -> list[HeldoutRow]:
    """A row for each of ``chosen``: name to weights and cost on the search's data; base first.

    ``score`` gives the held-out scores of a merge, ``weights`` are those of the terms. Scores are
    kept in ``out/heldout.json``: a finished run that is run again evaluates nothing.
    """
    path = out / FILE
    stored: dict[str, Scores] = {}
    if path.exists():
        stored = msgspec.json.decode(path.read_bytes(), type=dict[str, Scores])
    found: dict[str, Scores] = {}
    for name, (point, _) in chosen.items():
        key = msgspec.json.encode(sorted(point.items())).decode()
        if key not in stored:
            stored[key] = score(point)
            replace_file(path, msgspec.json.format(msgspec.json.encode(stored), indent=1))
        found[name] = stored[key]
    base = found["base"]
    rows = []
    for name, (_, searched) in chosen.items():
        cost, low, high = difference(found[name], base, weights)
        values = {term: s.value for term, s in found[name].items()}
        rows.append(HeldoutRow(name, values, cost, low, high, cost - searched))
    return rows


def difference(
    scores: Scores, base: Scores, weights: Mapping[str, float]
) -> tuple[float, float | None, float | None]:
    """How much worse than ``base``: the cost, and the ends of its bootstrap interval."""
    rng = np.random.default_rng(0)
    total = sum(weights.values())
    cost, known = 0.0, True
    draws = np.zeros(RESAMPLES)
    for name, g in weights.items():
        sign = -g / total if scores[name].higher_is_better else g / total
        cost += sign * (scores[name].value - base[name].value)
        pair = _resampled(scores[name], base[name], rng)
        if pair is None:
            known = False
        else:
            draws += sign * pair
    if not known:
        return cost, None, None
    low, high = np.percentile(draws, [2.5, 97.5])
    return cost, float(low), float(high)


def _resampled(score: Score, base: Score, rng: np.random.Generator) -> np.ndarray | None:
    """Differences over resampled examples, float64 [RESAMPLES]."""
    n = len(score.parts)
    if not n or len(base.parts) != n:
        return None
    a, base_a = np.array(score.parts), np.array(base.parts)
    b = np.array(score.sizes) if score.sizes else np.ones(n)
    base_b = np.array(base.sizes) if base.sizes else np.ones(n)
    times = rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES)
    return np.asarray((times @ a) / (times @ b) - (times @ base_a) / (times @ base_b))
