"""What an expansion will do, in words and numbers: one entry for tensors treated alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.mergekit.expansion import Expansion
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.tensor_recipe import Ref, TensorRecipe
from optimer_engine.types import format_bytes


@dataclass
class Group:
    """Tensors with one formula.

    Attributes:
        formula: with the numbers in it.
        tensors: their names, in the order of the output.
        dtype: what is written.
        read_bytes, write_bytes: of all of them, in one pass over the inputs.
        gathered: whether rows are put in the order of another vocabulary.
    """

    formula: str
    tensors: list[str]
    dtype: str
    gathered: bool
    read_bytes: int = 0
    write_bytes: int = 0


def explain(expansion: Expansion, checkpoints: Mapping[ModelRef, Checkpoint]) -> list[Group]:
    """The groups of an expansion, in the order in which the output first meets them."""
    labels = _labels(expansion.models)
    groups: dict[tuple[Any, ...], Group] = {}
    for row in expansion.rows:
        inputs = [ref for ref in (row.base, *row.sources) if ref is not None]
        gathered = row.name in expansion.row_maps
        key = (
            row.method,
            row.settings,
            row.base and row.base.checkpoint,
            tuple(ref.checkpoint for ref in row.sources),
            row.dtype,
            gathered,
        )
        if key not in groups:
            groups[key] = Group(_formula(row, labels), [], row.dtype.torch_name, gathered)
        group = groups[key]
        group.tensors.append(row.name)
        infos = [checkpoints[expansion.models[ref.checkpoint]].tensors[ref.name] for ref in inputs]
        group.read_bytes += sum(info.nbytes for info in infos)
        group.write_bytes += math.prod(row.shape) * row.dtype.itemsize
    return list(groups.values())


def lines(groups: list[Group]) -> list[str]:
    """`groups` as text, two lines each."""
    text = []
    for group in groups:
        first, last, count = group.tensors[0], group.tensors[-1], len(group.tensors)
        which = first if count == 1 else f"{count} tensors, {first} to {last}"
        rows = ", rows by token" if group.gathered else ""
        sizes = f"{format_bytes(group.read_bytes)} in, {format_bytes(group.write_bytes)} out"
        text += [f"{which}: {sizes}, {group.dtype}{rows}", f"    {group.formula}"]
    return text


def _labels(models: tuple[ModelRef, ...]) -> list[str]:
    """Each model's last path component, or its whole name where that is not its own."""
    short = [
        PurePath(m.path).name + (f"+{PurePath(m.lora).name}" if m.lora else "") for m in models
    ]
    return [
        name if short.count(name) == 1 else str(model)
        for name, model in zip(short, models, strict=True)
    ]


def _formula(row: TensorRecipe, labels: list[str]) -> str:
    def label(ref: Ref) -> str:
        return labels[ref.checkpoint]

    shared = dict(row.settings.shared)
    names = [label(ref) for ref in row.sources]
    base = label(row.base) if row.base is not None else ""
    if row.method == "copy":
        return f"{base}, unchanged (the others must equal it)" if names else f"{base}, unchanged"
    if row.method == "passthrough":
        scale = row.settings.column("scale")[0]
        return names[0] if scale == 1 else f"{scale:g} {names[0]}"
    if row.method in ("linear", "task_arithmetic"):
        weights = row.settings.column("weight")
        total = sum(weights)
        terms = [
            f"{weight:g} ({name} - {base})" if base else f"{weight:g} {name}"
            for weight, name in zip(weights, names, strict=True)
        ]
        merged = " + ".join(terms)
        if shared.get("normalize"):
            merged = f"({merged}) / {total:g}"
        if shared.get("lambda", 1.0) != 1.0:
            merged = f"{shared['lambda']:g} ({merged})"
        return f"{base} + {merged}" if base else merged
    inputs = [
        f"{name} {{{_pairs(dict(own))}}}" if own else name
        for name, own in zip(names, row.settings.per_source, strict=True)
    ]
    listed = ", ".join([base, *inputs] if base else inputs)
    return f"{row.method}({listed}{'; ' + _pairs(shared) if shared else ''})"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {str(value).lower() if isinstance(value, bool) else format(value, 'g')}"
        for key, value in values.items()
    )
