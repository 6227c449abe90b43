"""What a user writes to describe a search: the pool, the objective, the budget.

    base: models/base
    vectors:
      - {name: ja, model: vectors/ja}
      - {name: math, model: vectors/math, range: [-0.5, 1.0]}
    objective:
      - {name: ja, corpus: data/ja.dev.txt}                     # bits per byte, lower is better
      - {name: sums, task: sums, metric: acc, tasks_dir: tasks} # lm-eval
    trials: 40
    seed: 0

Names belong to the user: they are never derived from folders, so two checkpoints of one run keep
two weights. Paths are taken as written, relative to the working folder.
"""

from __future__ import annotations

import math

import msgspec

from optimer_engine.errors import RecipeError

MOST_SEED = 2**31 - 1


class Vector(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One searched weight: a distribution vector or a full checkpoint, and the range of its weight.

    ``range`` is [low, high]; weights below 0 subtract the vector.
    """

    name: str
    model: str
    range: tuple[float, float] = (0.0, 1.0)
    revision: str | None = None

    def __post_init__(self) -> None:
        low, high = self.range
        if not self.name or not self.name.isprintable():
            raise RecipeError(f"name {self.name!r} is empty or not printable")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise RecipeError(f"range of {self.name!r} must be [low, high] with low < high")


class Term(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One part of the objective: a corpus (bits per byte) or an lm-eval task's metric.

    ``weight`` is its share of the cost; it also carries the exchange rate between units where bits
    per byte and accuracies are mixed. ``limit`` keeps the first so many blocks or examples.
    A term with neither corpus nor task only gives a weight to a score that a Python callable
    returns under that name.
    """

    name: str
    weight: float = 1.0
    corpus: str | None = None
    task: str | None = None
    metric: str | None = None
    tasks_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise RecipeError(f"weight of {self.name!r} must be a positive number")
        if self.corpus is not None and self.task is not None:
            raise RecipeError(f"term {self.name!r} has both a corpus and a task; write two terms")
        if (self.task is None) != (self.metric is None):
            raise RecipeError(f"term {self.name!r} needs both task and metric, for example acc")
        if self.task is None and (self.tasks_dir is not None or self.num_fewshot is not None):
            raise RecipeError(f"term {self.name!r}: tasks_dir and num_fewshot belong to a task")
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"limit of {self.name!r} must be 1 or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise RecipeError(f"num_fewshot of {self.name!r} must be 0 or more")


class SearchConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A whole search.

    Args:
        base: the checkpoint every vector is added to; also gives the tokenizer.
        vectors: the pool, with unique names.
        objective: the terms; the cost is defined in ``objective.py``.
        trials: evaluations in all; by default 40 up to four vectors and 60 above.
        seed: equal seed and equal trials give equal proposals.
        block_length: tokens per block of a corpus; by default the model's context, at most 1024.
        batch_size: blocks or requests evaluated at once.
        dtype, device: of the live model that trials are merged into.
        out_dtype: of the winner on disk; by default that of the base.
        allow_task_code: allow lm-eval task files that import Python code (``!function``).
    """

    base: str
    vectors: list[Vector]
    objective: list[Term] = []
    base_revision: str | None = None
    trials: int | None = None
    seed: int = 0
    block_length: int | None = None
    batch_size: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    out_dtype: str | None = None
    allow_task_code: bool = False

    def __post_init__(self) -> None:
        if not self.vectors:
            raise RecipeError("vectors is empty; a search needs at least one")
        for what, names in (
            ("vectors", [v.name for v in self.vectors]),
            ("objective", [t.name for t in self.objective]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise RecipeError(f"{what}: the name {twice[0]!r} is used twice; names are unique")
        if not 0 <= self.seed <= MOST_SEED:
            raise RecipeError(f"seed must lie in 0..{MOST_SEED}, got {self.seed}")
        for field, least in (("trials", 1), ("block_length", 2), ("batch_size", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise RecipeError(f"{field} must be {least} or more, got {value}")

    @property
    def total_trials(self) -> int:
        """Evaluations this search makes, the default filled in."""
        if self.trials is not None:
            return self.trials
        return 40 if len(self.vectors) <= 4 else 60
