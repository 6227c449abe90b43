"""The pool as one loaded model whose parameters become any merge of it.

A trial needs a merged model in memory for seconds. Writing a checkpoint and loading it again costs
more than most evaluations; so the merge engine runs with the loaded model's parameters as its
sink. The recipe of a trial is that of the winner on disk, weights apart: what is scored is what is
written, rounding to the output's dtype included.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine.durable import replace_file
from optimer_engine.errors import MissingExtraError
from optimer_engine.redaction import redacted_data
from optimer_engine.search.config import SearchConfig, is_range
from optimer_engine.search.corpus import CorpusObjective
from optimer_engine.search.objective import Examples, Objective, Scored
from optimer_engine.search.space import Space
from optimer_engine.types import DType


class LivePool:
    """Base, vectors and objective of a search; see ``subject.Subject`` for what a search needs.

    Checkpoints are opened (headers only) and the objective's data is read at once, so that
    mistakes are found before anything is written; the model is loaded for the first trial.
    Objectives that take a folder (programs) get the trial as a checkpoint in a temporary one; those
    that take a recipe (vLLM) merge it themselves.
    """

    def __init__(
        self, config: SearchConfig, objective: Objective | Callable[[Any], Scored] | None = None
    ) -> None:
        from optimer_engine.planner import plan
        from optimer_engine.search.objectives import Measures, make_objective

        self._config = config
        self._dtype = DType.parse(config.dtype).torch_name
        self._space = Space.of(config)
        # the middle: memory for masks is planned for
        middle = self.recipe(self._space.to_weights(np.full(len(self._space.names), 0.5)))
        # Sending every input to a GPU for each trial would take longer than sending the merge.
        gpu = config.device if ":" in config.device else "cuda:0"
        self._plan = plan(
            middle,
            device=gpu if config.resident_mem else "cpu",
            resident_mem=config.resident_mem or 0,
        )
        base = str(self._plan.base.folder)
        self._final = None
        if any(v.final for v in config.vectors):
            self._final = plan(
                self.recipe(
                    self._space.to_weights(np.full(len(self._space.names), 0.5)), final=True
                )
            )
        own = None if objective is None else Measures([objective])
        self._objective = own or make_objective(config, config.objective, base)
        self._heldout = make_objective(config, config.heldout, base) if config.heldout else None
        if config.heldout_share:
            self._objective, self._heldout = self._objective.split(config.heldout_share)
        if config.gradient_steps:
            self._objective.only(CorpusObjective)  # refused now rather than in a trial
        self._given: dict[str, Any] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Fingerprints of base and vectors, the live model's dtype, and what each term measures."""
        names = [v.name for v in self._config.vectors]
        return {
            "base": self._plan.base.fingerprint,
            "vectors": {
                name: source.fingerprint
                for name, source in zip(names, self._plan.sources, strict=True)
                if source is not None
            },
            "model": {"dtype": self._dtype, "out_dtype": self._config.out_dtype},
            "terms": self._objective.identity,
        }

    @property
    def final(self) -> dict[str, str]:
        """Fingerprints of what the winner is merged from instead of the searched vectors."""
        if self._final is None:
            return {}
        vectors = zip(self._config.vectors, self._final.sources, strict=True)
        return {v.name: c.fingerprint for v, c in vectors if v.final and c is not None}

    @property
    def heldout_identity(self) -> dict[str, Any]:
        """What each held-out term measures."""
        return self._heldout.identity if self._heldout else {}

    @property
    def counts(self) -> dict[str, int]:
        """Examples of each term that can be scored one by one."""
        return self._objective.counts

    def prepare(self) -> None:
        """Load the model, where anything scores it in memory."""
        used = [o for o in (self._objective, self._heldout) if o is not None]
        if any(o.takes("model") for o in used) and "model" not in self._given:
            self._given["model"] = load_model(
                str(self._plan.base.folder), dtype=self._dtype, device=self._config.device
            )
        if any(o.takes("folder") for o in used) and self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="optimer-trial-")
            self._given["folder"] = Path(self._scratch.name) / "model"

    def apply(self, weights: dict[str, float], *, final: bool = False) -> None:
        """Make the live model the merge with ``weights``, and the trial's folder."""
        from optimer_engine.engine import merge
        from optimer_engine.sink import LiveModelSink

        if "model" in self._given:
            made = self._final if final and self._final is not None else self._plan
            made.with_settings(self.recipe(weights, final=final)).run(
                LiveModelSink(self._given["model"])
            )
        self._given["recipe"] = self.recipe(weights, final=final).to_dict()
        if "folder" in self._given:
            shutil.rmtree(self._given["folder"], ignore_errors=True)
            merge(self.recipe(weights, final=final), self._given["folder"], discard=True)

    def score(self, weights: dict[str, float], examples: Examples | None) -> Scored:
        """What the objective says of the merge."""
        return self._objective(self._given, examples)

    def score_heldout(self) -> Scored:
        """What the held-out terms say of the merge."""
        assert self._heldout is not None
        return self._heldout(self._given, None)

    def gradient_start(self) -> dict[str, float]:
        """The point that the configured number of gradient steps leads to."""
        import msgspec

        from optimer_engine.planner import plan
        from optimer_engine.search.gradient import descend
        from optimer_engine.search.staging import drawn

        config = self._config
        corpora = self._objective.only(CorpusObjective)
        zero = self.recipe({v.name: 0.0 for v in config.vectors})
        share = min(1.0, 2.0 * config.first_share)
        examples = {
            name: sorted(int(e) for e in drawn(config.seed, 0, n)[: math.ceil(share * n)])
            for name, n in corpora.counts.items()
        }
        return descend(
            plan(msgspec.structs.replace(zero, out_dtype="float32")),
            self._given["model"],
            corpora,
            {t.name: t.weight for t in config.objective if t.name in examples},
            self._space,
            steps=config.gradient_steps,
            examples=examples,
        )

    def write(self, weights: dict[str, float], out: Path) -> None:
        """Merge ``weights`` to ``out/best`` and its recipe to ``out/best.yaml``, once."""
        from optimer_engine.engine import merge

        recipe, folder, text = self.recipe(weights, final=True), out / "best", out / "best.yaml"
        written = type(recipe).load(redacted_data(recipe.to_dict())).to_yaml().encode()
        if folder.exists() and text.exists() and text.read_bytes() == written:
            return
        text.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        merge(recipe, folder, discard=True)
        replace_file(text, written)

    def close(self) -> None:
        """Remove the trials' folder."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def recipe(self, weights: dict[str, float], *, final: bool = False) -> Any:
        """The recipe that merges the pool with ``weights``."""
        from optimer_engine.recipe import Recipe, Source

        config = self._config
        fixed = [
            {k: v for k, v in given.items() if not is_range(v)}
            for given in (config.parameters, *(v.parameters for v in config.vectors))
        ]
        sources = [
            Source(
                name=v.name,
                model=(v.final if final else None) or v.model,
                revision=None if final and v.final else v.revision,
                parameters=given,
            )
            for v, given in zip(config.vectors, fixed[1:], strict=True)
        ]
        plain = Recipe(
            base=config.base,
            sources=sources,
            base_revision=config.base_revision,
            out_dtype=config.out_dtype,
            method=config.merge_method,
            parameters=fixed[0],
        )
        return self._space.recipe(plain, weights)


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
