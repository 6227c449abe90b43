"""What a run is about, by content, and what follows from it: continue, reuse or refuse.

A run folder may only be continued by the search that began it, and trials may only be reused where
their scores mean the same. Both are decided by comparing identities part by part, so the refusal
says what differs, and never by comparing paths, which move.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.errors import MismatchError
from optimer_engine.search.config import SearchConfig, is_range
from optimer_engine.search.space import Space
from optimer_engine.search.trials import REUSED, Told, read


def identity(config: SearchConfig, found: dict[str, Any]) -> dict[str, Any]:
    """What a run is about, by content: equal identities make trials exchangeable.

    ``found`` is what a `runner.Subject` says of itself. Folders may move and the number of trials
    may grow; all else that can change a score or a proposal is in here.
    """
    weights = {t.name: t.weight for t in config.objective}
    terms = {name: found["terms"].get(name, {}) for name in sorted(weights.keys() | found["terms"])}
    space = Space.of(config)
    ranges = {x.name: [x.low, x.high] for x in space.dimensions}
    return {
        "space": ranges, **found, "terms": terms, "weights": weights, "seed": config.seed,
        **_merge(config, space), **_protocol(config),
    }  # fmt: skip


def _merge(config: SearchConfig, space: Space) -> dict[str, Any]:
    """How points are merged, where it is not the plain weighted sum."""
    if config.is_weighted_sum:
        return {}
    fixed = {
        name: {k: v for k, v in given.items() if not is_range(v)}
        for name, given in [
            ("", config.parameters),
            *((v.name, v.parameters) for v in config.vectors),
        ]
    }
    return {
        "merge": {
            "method": config.merge_method,
            "layer_groups": config.layer_groups,
            "parameters": {name: own for name, own in fixed.items() if own},
            "dimensions": [msgspec.to_builtins(x) for x in space.dimensions],
        }
    }


def _protocol(config: SearchConfig) -> dict[str, Any]:
    """The settings that change proposals, where they are not the default."""
    limits = {t.name: t.max_loss for t in config.objective if t.max_loss is not None}
    settings = {
        name: getattr(config, name)
        for name in ("aggregate", "relative", "method", "first_share", "gradient_steps")
        if getattr(config, name) != _DEFAULTS[name]
    } | ({"max_loss": limits} if limits else {})
    return {"protocol": settings} if settings else {}


_DEFAULTS = dict(zip(SearchConfig.__struct_fields__[-len(SearchConfig.__struct_defaults__) :],
                     SearchConfig.__struct_defaults__, strict=True))  # fmt: skip


def rescored(run: Path, this: dict[str, Any]) -> list[Told]:
    """Finished trials of ``run`` with just the scores that ``this`` asks for, numbered anew.

    Raises:
        MismatchError: another pool, space or model, or a term that was not scored there.
        RecipeError: there are no trials.
    """
    other, told = read(run)
    here = f"{run} cannot be reused"
    for part in ("space", "merge", "base", "vectors", "model"):
        refuse_other({part: this.get(part)}, {part: other.identity.get(part)}, here)
    called: dict[str, str] = {}
    for name, term in this["terms"].items():
        measured = other.identity.get("terms", {})
        alike = [n for n, t in measured.items() if t and t == term]  # under another name
        called[name] = name if name in measured else next(iter(alike), name)
        there = measured.get(called[name])
        if there is None:
            raise MismatchError(
                f"its trials have no score named {name!r}; they have " + ", ".join(measured),
                where=here,
                todo="measure it on the same data as there, or search without --reuse",
            )
        refuse_other({f"term {name}": term}, {f"term {name}": there}, here)
    kept: list[Told] = []
    for trial in told:
        scores = {n: trial.scores[old] for n, old in called.items() if old in trial.scores}
        complete = trial.status != "crashed" and len(scores) == len(called)
        kept.append(
            Told(
                number=len(kept),
                weights=trial.weights,
                origin=f"{REUSED} {trial.number}, {trial.origin}",
                status="ok" if complete else trial.status,
                scores=scores,
                error="" if complete else trial.error,
            )
        )
    return kept


def refuse_other(mine: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    """Compare two identities part by part.

    Raises:
        MismatchError: naming each part that differs, with both values.
    """
    lines = [
        f"{part} {key}".rstrip() + f": here {_short(a)}, there {_short(b)}"
        for part in mine.keys() | theirs.keys()
        for key, a, b in _differences(mine.get(part), theirs.get(part))
    ]
    if lines:
        raise MismatchError(
            "; ".join(sorted(lines)),
            where=what,
            todo="search into another folder (--reuse may keep its trials) or restore its settings",
        )


def _differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b) and sorted(a) == sorted(b):
            return [("order", list(a), list(b))]
        return [(k, a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
    return [("", a, b)] if a != b else []


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "..."
