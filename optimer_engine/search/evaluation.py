"""One trial, step by step: which examples are missing, what was scored, is more worth it?

A trial is a generator: it yields the examples it wants scored, is sent what scoring them gave, and
returns what is told of it. So the search decides in one place and in one thread, whoever scores:
this process, or a worker far away (``crew.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.search.crew import Answer
from optimer_engine.search.objective import Examples, Score, Scores
from optimer_engine.search.trials import Asked, Status, Told

Order = Callable[[int], np.ndarray]
"""The order in which a trial takes the n examples of a term."""
Steps: TypeAlias = Generator[Examples | None, Answer, Told]


def trial_steps(
    trial: Asked,
    have: Scores,
    counts: dict[str, int],
    stages: Sequence[dict[str, int]],
    order: Order,
    expected: set[str],
    go_on: Callable[[Told], bool],
) -> Steps:
    """The steps of one trial; nothing that is known is scored again.

    Args:
        trial: the weights.
        have: what is known of them already.
        counts: examples of each term that can be asked for one by one.
        stages: examples of each term, stage by stage; one empty stage scores everything at once.
        order: in which examples are taken.
        expected: terms that must be scored.
        go_on: after each stage but the last, whether the next one is worth its examples.

    Yields:
        The examples to score, None for everything; to be sent the `crew.Answer`.

    Raises:
        RecipeError: the objective does not give the scores that were asked for.
    """
    known = sum(max(len(s.parts), 1) for s in have.values())
    merge_s = evaluate_s = 0.0
    status: Status = "ok"
    error = ""

    def told(scores: Scores) -> Told:
        return Told(
            number=trial.number,
            weights=trial.weights,
            origin=trial.origin,
            status=status,
            scores=scores,
            error=error,
            ask_s=trial.ask_s,
            merge_s=round(merge_s, 4),
            evaluate_s=round(evaluate_s, 4),
            expected=trial.expected,
            known=known,
        )

    now = told(have)
    for number, sizes in enumerate(stages):
        missing = _missing(have, sizes, counts, order)
        if missing or not have or not (sizes or expected <= have.keys()):
            answer = yield missing or None
            status, error = answer.status, answer.error
            merge_s, evaluate_s = merge_s + answer.merge_s, evaluate_s + answer.evaluate_s
            have = have | {
                n: _with(have.get(n), s, missing.get(n), counts.get(n))
                for n, s in answer.scores.items()
            }
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
        now = told({} if status == "crashed" else have)
        if status != "ok" or number == len(stages) - 1 or not go_on(now):
            break
    return now


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
