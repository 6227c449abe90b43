"""From the terms of a configuration to what scores a merge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from optimer_engine.errors import RecipeError
from optimer_engine.search.config import SearchConfig, Term
from optimer_engine.search.corpus import CorpusObjective, default_block_length
from optimer_engine.search.live import load_tokenizer
from optimer_engine.search.objective import Examples, Scores, as_scores
from optimer_engine.search.split import split

T = TypeVar("T")


class Measures:
    """Several objectives as one: the union of their scores.

    An objective takes the live model, or what its ``takes`` names: the ``folder`` of the merge, or
    its ``recipe`` as plain data.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = list(parts)

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """Of all parts."""
        return {n: t for part in self._parts for n, t in getattr(part, "identity", {}).items()}

    @property
    def counts(self) -> dict[str, int]:
        """Of all parts; a part that cannot be asked for examples is one example."""
        if not any(hasattr(part, "counts") for part in self._parts):
            return {}
        return {
            name: n
            for part in self._parts
            for name, n in getattr(part, "counts", dict.fromkeys(part.identity, 1)).items()
        }

    def takes(self, kind: str) -> bool:
        """Whether any part takes a ``model``, a ``folder`` or a ``recipe``."""
        return any(_takes(part) == kind for part in self._parts)

    def only(self, kind: type[T]) -> T:
        """The one part there is, of class ``kind`` or a part of one.

        Raises:
            RecipeError: there are others.
        """
        whole = [getattr(part, "of", part) for part in self._parts]
        if len(whole) != 1 or not isinstance(whole[0], kind):
            raise RecipeError(
                "only an objective of nothing but corpora has gradients",
                where="gradient_steps",
                todo="leave it out; the search needs no gradients",
            )
        found: T = self._parts[0]
        return found

    def split(self, share: float) -> tuple[Measures, Measures]:
        """What is searched, and the ``share`` of every term that is held out.

        Raises:
            RecipeError: a term has no examples to keep apart.
        """
        pairs = [split(p, share, spaced=not isinstance(p, CorpusObjective)) for p in self._parts]
        return Measures([kept for kept, _ in pairs]), Measures([held for _, held in pairs])

    def __call__(self, given: dict[str, Any], examples: Examples | None) -> Scores:
        """The scores of all parts, or those of some examples of some terms."""
        found: Scores = {}
        for part in self._parts:
            merge = given[_takes(part)]
            if examples is None:
                found |= as_scores(part(merge))
                continue
            names = getattr(part, "counts", None) or part.identity
            wanted = {n: e for n, e in examples.items() if n in names}
            if wanted:
                found |= as_scores(part(merge, wanted) if hasattr(part, "counts") else part(merge))
        return found


def _takes(part: Any) -> str:
    return str(getattr(part, "takes", "model"))


def make_objective(config: SearchConfig, terms: Sequence[Term], base_folder: str) -> Measures:
    """The objective that ``terms``, those of ``config`` or its held-out ones, describe.

    Raises:
        RecipeError: there are no terms, or one names neither a corpus nor a task; and whatever
            reading corpora and tasks raises.
    """
    if not terms:
        raise RecipeError(
            "the objective has no terms",
            where="objective",
            todo="name a held-out text: - {name: ja, corpus: ja.dev.txt}",
        )
    for term in terms:
        if term.corpus is None and term.task is None and term.command is None:
            raise RecipeError(
                "names neither a corpus nor a task nor a command", where=f"objective {term.name!r}",
                todo="add corpus: FILE, or task: NAME with metric: NAME",
            )  # fmt: skip
    parts: list[Any] = []
    commands = [t for t in terms if t.command is not None]
    tokenizer = load_tokenizer(base_folder) if len(commands) < len(terms) else None
    corpora = {t.name: t.corpus for t in terms if t.corpus is not None}
    if corpora:
        from transformers import AutoConfig

        length = config.block_length or default_block_length(
            AutoConfig.from_pretrained(base_folder, trust_remote_code=False)
        )
        limits = {t.name: t.limit for t in terms if t.limit is not None}
        parts.append(
            CorpusObjective(
                corpora, tokenizer,
                block_length=length, batch_size=config.batch_size, limits=limits,
            )
        )  # fmt: skip
    tasks = [t for t in terms if t.task is not None]
    if tasks:
        from optimer_engine.search.tasks import TaskObjective
        from optimer_engine.search.vllm import VllmTasks

        made: Any = TaskObjective
        if config.engine == "vllm":
            made = partial(VllmTasks, base_folder=base_folder)
        parts.append(
            made(
                tasks, tokenizer,
                batch_size=config.batch_size, allow_task_code=config.allow_task_code,
            )
        )  # fmt: skip
    if commands:
        from optimer_engine.search.command import CommandObjective

        parts.append(CommandObjective(commands, config.trial_limit_s))
    return Measures(parts)
