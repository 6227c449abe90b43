"""What is searched: something that weights can be applied to and that is then scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from optimer_engine.errors import RecipeError
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.objective import Evaluate, Examples, Scored


class Subject(Protocol):
    """A pool and its objective. `live.LivePool` is the one that merges."""

    @property
    def identity(self) -> dict[str, Any]:
        """``base``, ``vectors``, ``model`` and ``terms``, by content."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each term that can be asked for one by one; empty where none can."""
        ...

    def prepare(self) -> None:
        """Load what trials need; called once, before the first of them."""

    @property
    def final(self) -> dict[str, str]:
        """Fingerprints of the vectors that take the place of searched ones in the winner."""
        ...

    def apply(self, weights: dict[str, float], *, final: bool = False) -> None:
        """Become the merge with ``weights``, of the searched vectors or of the final ones."""

    def score(self, weights: dict[str, float], examples: Examples | None) -> Scored:
        """Scores of what `apply` made: of all terms, or of these examples of these terms."""
        ...

    @property
    def heldout_identity(self) -> dict[str, Any]:
        """What the held-out terms measure, by content; empty where there are none."""
        ...

    def score_heldout(self) -> Scored:
        """Held-out scores of what `apply` made."""
        ...

    def gradient_start(self) -> dict[str, float]:
        """The weights that gradients lead to; asked for only with ``gradient_steps``."""
        ...

    def write(self, weights: dict[str, float], out: Path) -> None:
        """Write the merge with ``weights`` into the run folder ``out``."""

    def close(self) -> None:
        """Remove what trials left; called once, after the search."""


class FunctionSubject:
    """A Python function of the weights as the subject of a search; nothing is merged.

    A function with ``counts`` takes the examples to score as its second argument.
    """

    def __init__(self, config: SearchConfig, evaluate: Evaluate) -> None:
        needs_model = config.heldout or config.heldout_share or config.gradient_steps
        if needs_model or any(vector.final for vector in config.vectors):
            raise RecipeError(
                "need a model, and a function of the weights has none",
                where="heldout, gradient_steps and final",
                todo="leave them out",
            )
        self.final: dict[str, str] = {}
        self._evaluate = evaluate
        self.heldout_identity: dict[str, Any] = {}
        self.counts: dict[str, int] = dict(getattr(evaluate, "counts", {}))
        self.identity = {
            "base": config.base,
            "vectors": {v.name: v.model for v in config.vectors},
            "model": {},
            "terms": getattr(evaluate, "identity", {}),
        }

    def prepare(self) -> None:
        """Nothing to load."""

    def apply(self, weights: dict[str, float], *, final: bool = False) -> None:
        """Nothing to merge."""

    def score(self, weights: dict[str, float], examples: Examples | None) -> Scored:
        """What the function says."""
        return self._evaluate(weights) if examples is None else self._evaluate(weights, examples)

    def score_heldout(self) -> Scored:
        """Never asked for."""
        raise NotImplementedError

    def gradient_start(self) -> dict[str, float]:
        """Never asked for."""
        raise NotImplementedError

    def write(self, weights: dict[str, float], out: Path) -> None:
        """Nothing to write."""

    def close(self) -> None:
        """Nothing to remove."""
