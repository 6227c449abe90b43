"""The pool as one loaded model whose parameters become any merge of it.

A trial needs a merged model in memory for seconds. Writing a checkpoint and loading it again costs
more than most evaluations; so the merge engine runs with the loaded model's parameters as its
sink. The recipe of a trial is that of the winner on disk, weights apart: what is scored is what is
written, rounding to the output's dtype included.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimer_engine.durable import replace_file
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.objective import CorpusObjective, Objective, Scored, default_block_length
from optimer_engine.types import DType


class LivePool:
    """Base, vectors and objective of a search; see ``runner.Subject`` for what a search needs.

    Checkpoints are opened (headers only) and the objective's data is read at once, so that
    mistakes are found before anything is written; the model is loaded for the first trial.
    """

    def __init__(
        self, config: SearchConfig, objective: Objective | Callable[[Any], Scored] | None = None
    ) -> None:
        from optimer_engine.planner import plan

        self._config = config
        self._dtype = DType.parse(config.dtype).torch_name
        self._plan = plan(self.recipe({v.name: 0.0 for v in config.vectors}))
        self._objective = objective or make_objective(config, str(self._plan.base.folder))
        self._model: Any = None

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of base and vectors, the live model's dtype, and what each term measures."""
        names = [v.name for v in self._config.vectors]
        return {
            "base": self._plan.base.fingerprint,
            "vectors": {
                name: source.fingerprint
                for name, source in zip(names, self._plan.sources, strict=True)
            },
            "model": {"dtype": self._dtype, "out_dtype": self._config.out_dtype},
            "terms": getattr(self._objective, "identity", {}),
        }

    def prepare(self) -> None:
        """Load the model."""
        self._model = load_model(
            str(self._plan.base.folder), dtype=self._dtype, device=self._config.device
        )

    def apply(self, weights: dict[str, float]) -> None:
        """Make the live model the merge with ``weights``."""
        from optimer_engine.sink import LiveModelSink

        self._plan.with_weights(weights).run(LiveModelSink(self._model))

    def score(self, weights: dict[str, float]) -> Scored:
        """What the objective says of the live model."""
        return self._objective(self._model)

    def write(self, weights: dict[str, float], out: Path) -> None:
        """Merge ``weights`` to ``out/best`` and its recipe to ``out/best.yaml``, once."""
        from optimer_engine.engine import merge

        recipe, folder, text = self.recipe(weights), out / "best", out / "best.yaml"
        written = recipe.to_yaml().encode()
        if folder.exists() and text.exists() and text.read_bytes() == written:
            return
        text.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        merge(recipe, folder, discard=True)
        replace_file(text, written)

    def recipe(self, weights: dict[str, float]) -> Any:
        """The recipe that merges the pool with ``weights``."""
        from optimer_engine.recipe import Recipe, Source

        sources = [
            Source(name=v.name, model=v.model, weight=weights[v.name], revision=v.revision)
            for v in self._config.vectors
        ]
        return Recipe(
            base=self._config.base,
            sources=sources,
            base_revision=self._config.base_revision,
            out_dtype=self._config.out_dtype,
        )


def load_model(folder: str, *, dtype: str = "float32", device: str = "cpu") -> Any:
    """A causal language model from ``folder``, in eval mode; no code of the checkpoint is run.

    Raises:
        MissingExtraError: Transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise _no_transformers() from error
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=False
    )
    return model.to(device).eval()


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of the checkpoint in ``folder``; no code of it is run."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _no_transformers() from error
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _no_transformers() -> MissingExtraError:
    return MissingExtraError(
        "transformers is not installed", todo="pip install 'optimer-engine[search,eval]'"
    )


def make_objective(config: SearchConfig, base_folder: str) -> Objective:
    """The objective that the terms of ``config`` describe.

    Raises:
        RecipeError: there are no terms, or one names neither a corpus nor a task; and whatever
            reading corpora and tasks raises.
    """
    if not config.objective:
        raise RecipeError(
            "the objective has no terms",
            where="objective",
            todo="name a held-out text: - {name: ja, corpus: ja.dev.txt}",
        )
    for term in config.objective:
        if term.corpus is None and term.task is None:
            raise RecipeError(
                "names neither a corpus nor a task", where=f"objective {term.name!r}",
                todo="add corpus: FILE, or task: NAME with metric: NAME",
            )  # fmt: skip
    tokenizer = load_tokenizer(base_folder)
    parts: list[Objective] = []
    corpora = {t.name: t.corpus for t in config.objective if t.corpus is not None}
    if corpora:
        from transformers import AutoConfig

        length = config.block_length or default_block_length(
            AutoConfig.from_pretrained(base_folder, trust_remote_code=False)
        )
        limits = {t.name: t.limit for t in config.objective if t.limit is not None}
        parts.append(
            CorpusObjective(
                corpora, tokenizer,
                block_length=length, batch_size=config.batch_size, limits=limits,
            )
        )  # fmt: skip
    tasks = [t for t in config.objective if t.task is not None]
    if tasks:
        from optimer_engine.search.tasks import TaskObjective

        parts.append(
            TaskObjective(
                tasks, tokenizer,
                batch_size=config.batch_size, allow_task_code=config.allow_task_code,
            )
        )  # fmt: skip
    return parts[0] if len(parts) == 1 else _Together(parts)


class _Together:
    """Several objectives as one: the union of their scores."""

    def __init__(self, parts: list[Objective]) -> None:
        self._parts = parts

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        return {name: term for part in self._parts for name, term in part.identity.items()}

    def __call__(self, model: Any) -> Scored:
        from optimer_engine.search.objective import as_scores

        return {name: s for part in self._parts for name, s in as_scores(part(model)).items()}
