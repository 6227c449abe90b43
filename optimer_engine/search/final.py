"""A search on packed vectors that ends in a merge of exact ones, and what the change of form costs.

Trials read every vector, so small ones make them quicker; what is published should have the whole
of the vectors. A vector's ``final`` is the folder that takes its place in the winner. Both forms of
the winner are scored on all examples of the objective, and the report states the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from optimer_engine.durable import replace_file
from optimer_engine.search.heldout import difference
from optimer_engine.search.objective import Scores, as_scores
from optimer_engine.search.subject import Subject

FILE = "final.json"


class FinalDifference(msgspec.Struct, frozen=True):
    """The winner from the vectors that were searched, and from those that were merged in the end.

    ``cost`` is the weighted mean of the terms' signed differences, positive where the final merge
    is worse; ``low`` and ``high`` bound it with 95 % confidence (None where examples are unknown).
    """

    vectors: list[str]
    searched: dict[str, float]
    final: dict[str, float]
    cost: float
    low: float | None
    high: float | None


def final_difference(
    subject: Subject, goal: Mapping[str, float], weights: dict[str, float], out: Path
) -> FinalDifference:
    """Score the winner in both forms; kept in ``out/final.json``, so that it is done once.

    Args:
        goal: the weight of each term; empty for equal ones.
        weights: of the winner.
    """
    path = out / FILE
    key = msgspec.json.encode([sorted(weights.items()), subject.final]).decode()
    stored: dict[str, Scores] = {}
    if path.exists():
        stored = msgspec.json.decode(path.read_bytes(), type=dict[str, Scores])
    for form in ("searched", "final"):
        name = f"{form} {key}"
        if name not in stored:
            subject.prepare()
            subject.apply(weights, final=form == "final")
            stored[name] = as_scores(subject.score(weights, None))
            replace_file(path, msgspec.json.format(msgspec.json.encode(stored), indent=1))
    searched, final = stored[f"searched {key}"], stored[f"final {key}"]
    terms = {name: goal.get(name, 1.0) for name in final} if goal else dict.fromkeys(final, 1.0)
    cost, low, high = difference(final, searched, terms)
    return FinalDifference(
        sorted(subject.final),
        {name: score.value for name, score in searched.items()},
        {name: score.value for name, score in final.items()},
        cost,
        low,
        high,
    )
