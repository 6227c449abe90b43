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

That is all most searches need; docs/search.md says what every other key does and costs. Names
belong to the user: they are never derived from folders, so two checkpoints of one run keep two
weights. Paths are taken as written, relative to the working folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from optimer_engine.errors import RecipeError
from optimer_engine.redaction import redacted, redacted_data

MOST_SEED = 2**31 - 1


class Vector(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One searched weight: a distribution vector or a full checkpoint, and the range of its weight.

    ``range`` is [low, high]; weights below 0 subtract the vector. ``parameters`` are the merge
    method's, for this vector alone; see `SearchConfig`.
    ``range`` is [low, high]; weights below 0 subtract the vector. ``final`` takes the place of
    ``model`` in the winner on disk: the exact vector, where a packed one is searched.
    """

    name: str
    model: str
    range: tuple[float, float] = (0.0, 1.0)
    revision: str | None = None
    parameters: dict[str, Any] = {}
    final: str | None = None

    def __post_init__(self) -> None:
        low, high = self.range
        if not self.name or not self.name.isprintable():
            raise RecipeError(f"name {self.name!r} is empty or not printable")
        if redacted(self.name) != self.name:
            raise RecipeError("the name of a vector looks like a token, and names are written down")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise RecipeError(f"range of {self.name!r} must be [low, high] with low < high")


class Term(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One part of the objective: a corpus (bits per byte), an lm-eval task's metric or a command.

    ``weight`` is its share of the cost; it also carries the exchange rate between units where bits
    per byte and accuracies are mixed. ``limit`` keeps the first so many blocks or examples.
    ``max_loss: 0.01`` says that the score may not become more than 1 % worse than the base's; with
    ``weight: 0`` the term is nothing but that limit. ``command`` is a program and its arguments
    that prints a score of the merge in the folder ``{model}``; see ``command.py``.
    A term with none of these only gives a weight to a score that a Python callable returns under
    that name.
    """

    name: str
    weight: float = 1.0
    max_loss: float | None = None
    corpus: str | None = None
    task: str | None = None
    command: list[str] | None = None
    higher_is_better: bool | None = None
    metric: str | None = None
    tasks_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        if redacted(self.name) != self.name:
            raise RecipeError("the name of a term looks like a token, and names are written down")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise RecipeError(f"weight of {self.name!r} must be a positive number")
        if self.weight == 0 and self.max_loss is None:
            raise RecipeError(f"weight of {self.name!r} is 0 and it has no max_loss")
        if self.max_loss is not None and not (math.isfinite(self.max_loss) and self.max_loss >= 0):
            raise RecipeError(f"max_loss of {self.name!r} must be 0 or more; 0.01 is one per cent")
        kinds = [k for k in ("corpus", "task", "command") if getattr(self, k) is not None]
        if len(kinds) > 1:
            both = " and a ".join(kinds)
            raise RecipeError(f"term {self.name!r} has both a {both}; write two terms")
        if (self.command is None) != (self.higher_is_better is None):
            raise RecipeError(f"term {self.name!r} needs both command and higher_is_better")
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
        merge_method: how trials and the winner are merged; see docs/methods.md.
        parameters: of that method; [low, high] in place of a number has it searched.
        layer_groups: search a weight per vector for each of so many groups of consecutive layers.
        objective: the terms; the cost is defined in ``cost.py``.
        heldout: terms that the search never sees: only the base, the uniform average, the best
            single vector and the winner are scored on them, when it is over.
        heldout_share: instead, share of the examples of each term that is kept apart so.
        aggregate: ``mean`` of the terms; ``worst``, the term that gains least; or ``pareto``, which
            looks for all best compromises. ``cost.py`` has the formulas.
        relative: measure each term in per cent of the base's score.
        method: ``smac``, or ``paper``: independent TPE, 100 trials of which 20 random, on the first
            100 examples, the best 3 again on 300; see ``paper.py``.
        trials: merges tried at most; by default 15 for each searched number, at least 60, and 100
            with the paper's method.
        patience: stop after so many trials without progress; 0 makes all of them.
        first_share: share of the examples that every trial is scored on; only the hopeful go on,
            twice as many each time, up to all. 1 scores all at once.
        gradient_steps: L-BFGS steps along exact gradients before the search; corpora only.
        trial_limit_s: seconds after which a trial is given up and counts as failed.
        seed: equal seed and equal trials give equal proposals.
        block_length: tokens per block of a corpus; by default the model's context, at most 1024.
        batch_size: blocks or requests evaluated at once.
        dtype, device: of the live model that trials are merged into.
        resident_mem: GPU memory, such as 60GB, in which base and vectors stay from trial to trial;
            trials are then merged on the model's GPU, where that pays. Leave room for model and
            evaluation.
        out_dtype: of the winner on disk; by default that of the base.
        engine: what runs lm-eval tasks: the live model, or vLLM reloading each merge.
        allow_task_code: allow lm-eval task files that import Python code (``!function``).
    """

    base: str
    vectors: list[Vector]
    objective: list[Term] = []
    heldout: list[Term] = []
    heldout_share: float = 0.0
    base_revision: str | None = None
    merge_method: str = "task_arithmetic"
    parameters: dict[str, Any] = {}
    layer_groups: int = 1
    aggregate: Literal["mean", "worst", "pareto"] = "mean"
    relative: bool = False
    method: Literal["smac", "paper"] = "smac"
    trials: int | None = None
    patience: int = 15
    first_share: float = 0.125
    gradient_steps: int = 0
    trial_limit_s: float | None = None
    seed: int = 0
    block_length: int | None = None
    batch_size: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    resident_mem: str | None = None
    out_dtype: str | None = None
    engine: Literal["hf", "vllm"] = "hf"
    allow_task_code: bool = False

    def __post_init__(self) -> None:
        if not self.vectors:
            raise RecipeError("vectors is empty; a search needs at least one")
        for what, names in (
            ("vectors", [v.name for v in self.vectors]),
            ("objective", [t.name for t in self.objective]),
            ("heldout", [t.name for t in self.heldout]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise RecipeError(f"{what}: the name {twice[0]!r} is used twice; names are unique")
        if not 0 <= self.seed <= MOST_SEED:
            raise RecipeError(f"seed must lie in 0..{MOST_SEED}, got {self.seed}")
        if not 0.0 <= self.heldout_share < 1.0:
            raise RecipeError(f"heldout_share must lie in [0, 1), got {self.heldout_share}")
        if self.heldout_share and self.heldout:
            raise RecipeError("give either heldout or heldout_share")
        if not 0.0 < self.first_share <= 1.0:
            raise RecipeError(f"first_share must lie in (0, 1], got {self.first_share}")
        if self.resident_mem is not None and not self.device.startswith("cuda"):
            raise RecipeError(f"resident_mem is of a GPU, the device is {self.device}")
        if self.objective and not any(t.weight for t in self.objective):
            raise RecipeError("every term has weight 0: nothing is left to search for")
        if self.aggregate == "pareto" and len([t for t in self.objective if t.weight]) < 2:
            raise RecipeError("aggregate: pareto needs two terms or more")
        if self.trial_limit_s is not None and not 0.0 < self.trial_limit_s < math.inf:
            raise RecipeError(f"trial_limit_s must be above 0, got {self.trial_limit_s}")
        least_of = {
            "trials": 1, "block_length": 2, "batch_size": 1, "patience": 0, "layer_groups": 1
        }  # fmt: skip
        for field, least in {**least_of, "gradient_steps": 0}.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise RecipeError(f"{field} must be {least} or more, got {value}")
        if self.is_weighted_sum:
            return
        if self.gradient_steps:
            raise RecipeError("gradient_steps are for one weight per vector and nothing else")
        _check_parameters(self)

    @property
    def is_weighted_sum(self) -> bool:
        """Whether a point is one weight per vector and nothing else."""
        plain = self.merge_method == "task_arithmetic" and self.layer_groups == 1
        return plain and not self.parameters and not any(v.parameters for v in self.vectors)

    def to_yaml(self) -> str:
        """A file that reads as this configuration; what is left at its default is left out."""
        import yaml

        return yaml.safe_dump(redacted_data(_written(self)), sort_keys=False, allow_unicode=True)

    @property
    def total_trials(self) -> int:
        """Merges this search tries at most, the default filled in."""
        if self.trials is not None:
            return self.trials
        return 100 if self.method == "paper" else max(60, 15 * self.dimensions)

    @property
    def dimensions(self) -> int:
        """Numbers that are searched."""
        given = [self.parameters, *(v.parameters for v in self.vectors)]
        ranges = sum(is_range(value) for own in given for value in own.values())
        return self.layer_groups * len(self.vectors) + ranges


def _written(item: msgspec.Struct) -> dict[str, Any]:
    """The fields of a Struct that are not at their default, as plain data."""
    found = {}
    for field in msgspec.structs.fields(item):
        value = getattr(item, field.name)
        if isinstance(value, list):
            value = [_written(x) if isinstance(x, msgspec.Struct) else x for x in value]
        made = field.default_factory is not msgspec.NODEFAULT
        default = field.default_factory() if made else field.default
        if value != default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def with_objective(config: SearchConfig, changes: dict[str, Any], where: str) -> SearchConfig:
    """``config`` with the keys of ``changes``, and nothing of its own objective.

    Raises:
        RecipeError: ``changes`` has no objective, or what comes out makes no sense; naming
            ``where`` it was written.
    """
    from optimer_engine.recipe import decode

    if not changes.get("objective"):
        raise RecipeError(
            "has no objective", where=where, todo="- {name: ja, corpus: ja.dev.txt} under it"
        )
    kept = _written(config)
    for key in ("objective", "heldout", "heldout_share", "aggregate", "relative"):
        kept.pop(key, None)
    return decode(kept | changes, SearchConfig, where)


def with_absolute_paths(config: SearchConfig) -> SearchConfig:
    """The same search for a process in another working folder; names of the Hub stay."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).exists() else name

    def moved(term: Term) -> Term:
        paths = {k: getattr(term, k) for k in ("corpus", "tasks_dir")}
        return msgspec.structs.replace(
            term, **{k: absolute(path) for k, path in paths.items() if path is not None}
        )

    return msgspec.structs.replace(
        config,
        base=absolute(config.base),
        vectors=[
            msgspec.structs.replace(
                v, model=absolute(v.model), final=None if v.final is None else absolute(v.final)
            )
            for v in config.vectors
        ],
        objective=[moved(t) for t in config.objective],
        heldout=[moved(t) for t in config.heldout],
    )


def is_range(value: Any) -> bool:
    """Whether a parameter's value is [low, high], to be searched."""
    return isinstance(value, list | tuple)


def _check_parameters(config: SearchConfig) -> None:
    """Refuse what the merge method cannot take, at either end of a range, before any trial."""
    from optimer_engine import methods

    method = methods.get(config.merge_method)
    if "weight" not in method.parameters:
        raise RecipeError(f"merge_method {method.name} has no weights to search")
    given = [config.parameters, *(v.parameters for v in config.vectors)]
    for value in (value for own in given for value in own.values()):
        if is_range(value) and not (
            len(value) == 2
            and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
            and value[0] < value[1]
        ):
            raise RecipeError(f"a searched parameter must be [low, high], got {value}")
    for end in (0, 1):
        shared, *own = [
            {k: float(v[end]) if is_range(v) else v for k, v in parameters.items()}
            for parameters in given
        ]
        method.settings(shared, [{"weight": 1.0, **parameters} for parameters in own])
