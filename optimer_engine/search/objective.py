"""What a merge is worth: scores by term, kept example by example.

An **objective** is any callable ``objective(model) -> dict of scores``: a name for each term, a
`Score` (or a plain number, lower is better) for each name. `corpus.CorpusObjective` and
`tasks.TaskObjective` are the two kinds that a configuration file can name; a Python user passes a
function of their own to ``run_search``.

An objective that also has ``counts``, the number of examples of each term, can be asked for some of
them: ``objective(model, {"ja": [3, 17, 40]})``. Then a search scores most merges on a few examples
(staging.py). Scores are stored raw, example by example, so another objective can be computed from
finished trials; how they become the cost that is minimised is said in ``cost.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """One term's result for one model: ``value = Σ parts / Σ sizes``.

    ``parts`` has one number per example or block (bits of a block; 0 or 1 for an answer) and
    ``sizes`` what each counts for (bytes of a block); empty sizes are all 1. Parts may be empty
    where a metric is no such ratio; then only ``value`` is known. ``examples`` numbers the examples
    that the parts stand for, ascending; it is empty where they are all there are.
    """

    value: float
    higher_is_better: bool = False
    parts: list[float] = []
    sizes: list[float] = []
    examples: list[int] = []

    @classmethod
    def of(
        cls,
        parts: Sequence[float] | np.ndarray,
        sizes: Sequence[float] | np.ndarray | None = None,
        *,
        higher_is_better: bool = False,
        examples: Sequence[int] = (),
    ) -> Score:
        """Score from per-example numbers [n]; they are kept to 7 digits, the value in full."""
        p = np.asarray(parts, dtype=np.float64)
        s = np.ones_like(p) if sizes is None else np.asarray(sizes, dtype=np.float64)
        kept = [[float(f"{x:.7g}") for x in a] for a in (p, s)]
        counted = [] if (s == 1.0).all() else kept[1]
        return cls(float(p.sum() / s.sum()), higher_is_better, kept[0], counted, list(examples))


Scores: TypeAlias = dict[str, Score]
Examples: TypeAlias = dict[str, list[int]]
"""By term, the numbers of the examples to score."""
Scored: TypeAlias = float | Mapping[str, float | Score]
Evaluate: TypeAlias = Callable[..., Scored]


class Objective(Protocol):
    """Anything that scores a model.

    ``identity`` says what is measured, by content; trials of another run are re-used only where it
    is equal. A plain function will do where nothing but the terms' names needs to agree. One that
    can score some of its examples has ``counts`` as well, and takes a second argument: by term,
    the numbers of the examples to score; terms not named in it are left out.
    """

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """By term: what is measured."""
        ...

    def __call__(self, model: Any) -> Scored:
        """Score the model."""
        ...


def as_scores(result: Scored) -> Scores:
    """What an objective returned, as scores; a single number becomes the term ``value``."""
    named = result if isinstance(result, Mapping) else {"value": result}
    return {k: v if isinstance(v, Score) else Score(float(v)) for k, v in named.items()}
