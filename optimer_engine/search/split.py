"""Held-out data by construction: some examples of each term that the search cannot ask for.

    heldout_share: 0.3        the search sees the other 70 % and is judged on these

Of a corpus, the last blocks are kept apart, since neighbouring blocks are alike; of a task, every
so manieth example, since files of examples are often sorted. The choice depends on the number of
examples alone, so two searches over one file never look at each other's held-out examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from optimer_engine.errors import RecipeError
from optimer_engine.search.objective import Scores, as_scores


class Part:
    """Some examples of an objective, numbered from 0, as an objective of its own.

    Args:
        of: an objective with ``counts``.
        chosen: by term, the numbers of its examples, ascending, int64.
        name: what tells these examples from others with the same source.
    """

    def __init__(self, of: Any, chosen: Mapping[str, np.ndarray], name: str) -> None:
        self.of, self._chosen, self._name = of, dict(chosen), name
        self.takes = getattr(of, "takes", "model")

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """That of the whole, and which part it is."""
        return {n: {**term, "part": self._name} for n, term in self.of.identity.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each term in this part."""
        return {name: len(numbers) for name, numbers in self._chosen.items()}

    def __call__(self, merge: Any, examples: Mapping[str, Sequence[int]] | None = None) -> Scores:
        """Scores of all examples of this part, or of some."""
        wanted = examples or {name: range(n) for name, n in self.counts.items()}
        scores = as_scores(
            self.of(merge, {name: self._at(name, at) for name, at in wanted.items()})
        )
        return {n: msgspec.structs.replace(s, examples=[]) for n, s in scores.items()}

    def backward(self, model: Any, name: str, examples: Sequence[int], weight: float) -> float:
        """See `CorpusObjective.backward`."""
        value: float = self.of.backward(model, name, self._at(name, examples), weight)
        return value

    def _at(self, name: str, examples: Sequence[int]) -> list[int]:
        return [int(i) for i in self._chosen[name][np.asarray(examples, dtype=np.int64)]]


def split(objective: Any, share: float, *, spaced: bool) -> tuple[Part, Part]:
    """What is searched and what is held out of an objective with ``counts``.

    Args:
        share: of the examples of each term that are held out; at least one, and one is left.
        spaced: hold out examples spread over all, instead of the last.

    Raises:
        RecipeError: a term has but one example, or cannot be asked for some of them.
    """
    counts = getattr(objective, "counts", None)
    if not counts:
        raise RecipeError(
            "cannot be asked for some of its examples",
            where=f"heldout_share and the term {next(iter(objective.identity), 'value')!r}",
            todo="leave heldout_share out and name held-out data under heldout",
        )
    kept: dict[str, np.ndarray] = {}
    held: dict[str, np.ndarray] = {}
    for name, n in counts.items():
        if n < 2:
            raise RecipeError(
                "has a single example, so none can be held out",
                where=f"heldout_share and the term {name!r}",
                todo="give it more text or a smaller block_length",
            )
        m = min(n - 1, max(1, round(share * n)))
        at = np.arange(n)
        out = (at * m // n < (at + 1) * m // n) if spaced else (at >= n - m)
        kept[name], held[name] = at[~out], at[out]
    label = f"of {share:g}"
    return Part(objective, kept, f"searched {label}"), Part(objective, held, f"held out {label}")
