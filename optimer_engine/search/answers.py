"""What has been measured already: no merge is scored twice on an example, in this run or beside it.

A measurement is known by content: the base's fingerprint, the vectors' fingerprints with their
weights (a weight of 0 is no vector), the model's settings and the term's data. So a second search
over a pool of which only a part is the same still finds the base, the single vectors and whatever
else it shares with the runs in the same parent folder, under any name. Terms whose identity is
unknown (a plain Python function) are shared with nothing but the run itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimer_engine.errors import RecipeError
from optimer_engine.search.objective import Score, Scores
from optimer_engine.search.trials import Told, read


class Answers:
    """Scores by what was measured, for the run with the given identity."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self._identity = identity
        self._names: set[str] = set(identity["terms"])
        self._found: dict[tuple[str, str], Score] = {}

    def learn(self, told: Iterable[Told], identity: dict[str, Any] | None = None) -> None:
        """Take over the scores of ``told``, from a run with ``identity`` (by default this one)."""
        owner = identity or self._identity
        for trial in told:
            merge = _merge(owner, trial.weights)
            for name, score in trial.scores.items():
                term = _term(owner, name, own=identity is None)
                if identity is None:
                    self._names.add(name)
                if term is not None and trial.status == "ok":
                    known = self._found.get((merge, term))
                    if known is None or _fuller(score, known):
                        self._found[merge, term] = score

    def learn_beside(self, run: Path, journal: str) -> None:
        """Take over the scores of the runs that lie in the same folder as ``run``."""
        for path in sorted(run.resolve().parent.glob(f"*/{journal}")):
            if path.parent == run.resolve():
                continue
            try:
                other, told = read(path)
                self.learn(told, other.identity)
            except (RecipeError, KeyError, TypeError, AttributeError):
                continue  # not a journal that this version can use: nothing to take over

    def of(self, weights: dict[str, float]) -> Scores:
        """By term of this run: what is known of the merge with ``weights``."""
        merge = _merge(self._identity, weights)
        names = {name: _term(self._identity, name, own=True) for name in sorted(self._names)}
        found = {name: self._found.get((merge, str(term))) for name, term in names.items()}
        return {name: score for name, score in found.items() if score is not None}


def _merge(identity: dict[str, Any], weights: dict[str, float]) -> str:
    vectors, merge = identity["vectors"], identity.get("merge")
    used: list[Any]
    if merge is None:
        used = sorted((str(vectors[name]), w) for name, w in weights.items() if w)
    else:  # by name: a vector's mask may depend on it
        used = [merge, vectors, weights]
    return json.dumps([identity["base"], identity["model"], used], sort_keys=True)


def _term(identity: dict[str, Any], name: str, *, own: bool) -> str | None:
    """Key of a term; one without an identity is known by its name, to its own run alone."""
    measured = identity["terms"].get(name)
    if measured:
        return json.dumps(measured, sort_keys=True)
    return f"own {name}" if own else None


def _fuller(score: Score, known: Score) -> bool:
    if not known.examples:
        return False
    return not score.examples or len(score.examples) > len(known.examples)
