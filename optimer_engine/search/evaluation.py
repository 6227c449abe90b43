"""One trial: merge once, score stage by stage, and turn whatever happens into a status."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from optimer_engine.errors import NonFiniteError, OptimerError, RecipeError
from optimer_engine.search.answers import Answers
from optimer_engine.search.objective import Score, Scores, as_scores
from optimer_engine.search.subject import Subject
from optimer_engine.search.trials import Asked, Status, Told

Order = Callable[[int], np.ndarray]
"""The order in which a trial takes the n examples of a term."""


def evaluate_trial(
    trial: Asked,
    subject: Subject,
    answers: Answers,
    stages: Sequence[dict[str, int]],
    order: Order,
    expected: set[str],
    go_on: Callable[[Told], bool],
) -> Told:
    """Score one trial; nothing that ``answers`` knows is scored again.

    Args:
        trial: the weights.
        subject: what scores them.
        answers: what is known already.
        stages: examples of each term, stage by stage; one empty stage scores everything at once.
        order: in which examples are taken.
        expected: terms that must be scored.
        go_on: after each stage but the last, whether the next one is worth its examples.

    Raises:
        OptimerError: of files or settings, which every further trial would meet too; anything else
            that the objective raises becomes the trial's status.
    """
    have = answers.of(trial.weights)
    known = sum(max(len(s.parts), 1) for s in have.values())
    spent = _Spent()
    status: Status = "ok"
    error = ""
    told = _told(trial, "ok", have, "", spent, known)
    for number, sizes in enumerate(stages):
        missing = _missing(have, sizes, subject.counts, order)
        if missing or not have or not (sizes or expected <= have.keys()):
            try:
                fresh = _scored(trial, subject, missing, spent)
                have = have | {
                    n: _with(have.get(n), s, missing.get(n), subject.counts.get(n))
                    for n, s in fresh.items()
                }
            except NonFiniteError as problem:
                status, error = "nan", str(problem)
            except OptimerError:
                raise
            except Exception as problem:  # the objective is foreign code
                status, error = "crashed", f"{type(problem).__name__}: {problem}"
        if status == "ok":
            absent = sorted(expected - have.keys())
            if absent:
                raise RecipeError(
                    f"the objective gave no score {absent[0]!r}; it gave {', '.join(have)}",
                    where="objective",
                    todo="let the terms and the scores have the same names",
                )
            finite = {name: s for name, s in have.items() if math.isfinite(s.value)}
            if len(finite) < len(have):
                bad = min(have.keys() - finite.keys())
                status, error = "nan", f"score {bad!r} is {have[bad].value}"
            have = finite
        told = _told(trial, status, {} if status == "crashed" else have, error, spent, known)
        if status != "ok" or number == len(stages) - 1 or not go_on(told):
            break
    return told


class _Spent:
    """Seconds of one trial; the merge is made once, and only when something must be scored."""

    merge_s = 0.0
    evaluate_s = 0.0
    merged = False


def _scored(trial: Asked, subject: Subject, missing: dict[str, list[int]], spent: _Spent) -> Scores:
    started = time.perf_counter()
    if not spent.merged:
        subject.apply(trial.weights)
        spent.merged = True
        spent.merge_s = time.perf_counter() - started
        started = time.perf_counter()
    try:
        return as_scores(subject.score(dict(trial.weights), missing or None))
    finally:
        spent.evaluate_s += time.perf_counter() - started


def _missing(
    have: Scores, sizes: dict[str, int], counts: dict[str, int], order: Order
) -> dict[str, list[int]]:
    """By term, the examples of this stage that are not known."""
    missing = {}
    for name, size in sizes.items():
        score = have.get(name)
        if score is not None and not score.examples:
            continue
        done = set(score.examples) if score is not None else set()
        lacking = sorted({int(e) for e in order(counts[name])[:size]} - done)
        if lacking:
            missing[name] = lacking
    return missing


def _with(known: Score | None, fresh: Score, examples: list[int] | None, n: int | None) -> Score:
    """``known`` and the ``fresh`` score of further ``examples`` as one; ``n`` is all there are."""
    if examples is None or n is None or len(examples) == n:
        return fresh
    if len(fresh.parts) != len(examples):
        raise RecipeError(
            f"was asked for {len(examples)} examples and gave {len(fresh.parts)} parts",
            where="objective",
            todo="give one part per example, or leave the term out of counts",
        )
    parts = dict(zip(examples, fresh.parts, strict=True))
    sizes = dict(zip(examples, fresh.sizes or [1.0] * len(examples), strict=True))
    if known is not None:
        parts |= zip(known.examples, known.parts, strict=True)
        sizes |= zip(known.examples, known.sizes or [1.0] * len(known.parts), strict=True)
    at = sorted(parts)
    return Score.of(
        [parts[e] for e in at],
        [sizes[e] for e in at],
        higher_is_better=fresh.higher_is_better,
        examples=[] if len(at) == n else at,
    )


def _told(
    trial: Asked, status: Status, scores: Scores, error: str, spent: _Spent, known: int
) -> Told:
    return Told(
        number=trial.number,
        weights=trial.weights,
        origin=trial.origin,
        status=status,
        scores=scores,
        error=error,
        ask_s=trial.ask_s,
        merge_s=round(spent.merge_s, 4),
        evaluate_s=round(spent.evaluate_s, 4),
        expected=trial.expected,
        known=known,
    )
