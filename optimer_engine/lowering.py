"""A mergekit recipe's rows, by name, become the engine's rows: opened tensors and treatments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from optimer_engine import methods
from optimer_engine.adapter import Adapted, LowRank, adapter_tensors
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.mergekit import Expansion, GatheredRows
from optimer_engine.operands import Operand, Stored
from optimer_engine.quantized import as_input
from optimer_engine.runs import JOINED, Row, Treatment, anchored, fold
from optimer_engine.tensor_recipe import Ref, Settings, TensorRecipe
from optimer_engine.types import TensorInfo

Given = TensorInfo | Operand | None


def lower(
    expansion: Expansion,
    checkpoints: tuple[Checkpoint, ...],
    adapters: dict[int, Checkpoint],
    options: Mapping[str, Any],
) -> tuple[list[Row], list[Treatment]]:
    """The rows of an expansion, not yet placed, and their treatments.

    Args:
        checkpoints: opened, in the order of `expansion.models`.
        adapters: the adapter of each model that has one, by the model's number.
        options: `compat` and `seed`, which mergekit's files cannot say.

    Raises:
        RecipeError: a method's parameters, or its inputs, are not as it needs them.
        MismatchError: an adapter does not fit its model.
    """
    inputs = _Inputs(expansion, checkpoints, adapters)
    treatments: dict[Treatment, int] = {}
    rows = []
    for recipe in expansion.rows:
        unfolded = _treatment(recipe, options)
        treatment = _fold(unfolded)
        joined = treatment.method in JOINED
        base = None if recipe.base is None else inputs.theta(recipe, recipe.base)
        given = [inputs.source(recipe, ref, joined) for ref in recipe.sources]
        size = math.prod(recipe.shape) * recipe.dtype.itemsize
        out = TensorInfo(recipe.name, recipe.dtype, recipe.shape, 0, 0, size)
        number = treatments.setdefault(treatment, len(treatments))
        rows.append(anchored(Row(out, (base, *given), number), treatment, unfolded))
    return rows, list(treatments)


def _treatment(recipe: TensorRecipe, options: Mapping[str, Any]) -> Treatment:
    base = -1 if recipe.base is None else recipe.base.checkpoint
    numbers = (base, *(ref.checkpoint for ref in recipe.sources))
    if recipe.method == "copy":
        weights = Settings.of({}, [{"weight": 1.0} for _ in recipe.sources])
        return Treatment("task_arithmetic", weights, numbers)
    method = methods.get(recipe.method)
    known = {"compat", *method.parameters}
    shared = {key: value for key, value in options.items() if key in known}
    given = [dict(pairs) for pairs in recipe.settings.per_source]
    settings = method.settings({**shared, **dict(recipe.settings.shared)}, given)
    return Treatment(recipe.method, settings, numbers, method.skips_zero)


_fold: Callable[[Treatment], Treatment] = cache(fold)


class _Inputs:
    """Finds the tensor, or builds the operand, behind a reference."""

    def __init__(
        self,
        expansion: Expansion,
        checkpoints: tuple[Checkpoint, ...],
        adapters: dict[int, Checkpoint],
    ) -> None:
        self.expansion, self.checkpoints = expansion, checkpoints
        self.adapted: dict[int, dict[str, Operand]] = {}
        for number, adapter in adapters.items():
            names = checkpoints[number].tensors
            self.adapted[number] = {}
            for name, tensor in adapter_tensors(adapter).items():
                self.adapted[number][name] = (
                    Stored(adapter, tensor, False) if isinstance(tensor, TensorInfo) else tensor
                )
                if name not in names or names[name].shape != tensor.shape:
                    found = list(names[name].shape) if name in names else "no such tensor"
                    raise MismatchError(
                        f"{quoted(name)} is {list(tensor.shape)}, the model has {found}",
                        where=str(adapter.folder),
                        todo="use the adapter with the model that it was trained on",
                    )
        self.plain = {
            number: i
            for number, model in enumerate(expansion.models)
            for i, other in enumerate(expansion.models)
            if model.lora
            and (other.path, other.revision, other.lora) == (model.path, model.revision, None)
        }

    def theta(self, recipe: TensorRecipe, ref: Ref) -> TensorInfo | Operand:
        """A model's tensor; with its adapter's delta, where it has one."""
        row_map = self.expansion.row_maps.get(recipe.name)
        if row_map is not None:
            needed = row_map.readers(ref.checkpoint)
            spelled = {r.checkpoint: r.name for r in (*recipe.sources, recipe.base) if r}
            matrices = {number: self._matrix(Ref(number, spelled[number])) for number in needed}
            return GatheredRows(row_map, ref.checkpoint, matrices)
        given = self.adapted.get(ref.checkpoint, {}).get(ref.name)
        if given is None:
            checkpoint = self.checkpoints[ref.checkpoint]
            return as_input(checkpoint, checkpoint.tensors[ref.name])
        return self._matrix(ref)

    def _matrix(self, ref: Ref) -> Operand:
        checkpoint = self.checkpoints[ref.checkpoint]
        stored: TensorInfo | Operand = as_input(checkpoint, checkpoint.tensors[ref.name])
        if isinstance(stored, TensorInfo):
            stored = Stored(checkpoint, stored, is_delta=False)
        given = self.adapted.get(ref.checkpoint, {}).get(ref.name)
        if given is None:
            return stored
        return Adapted(stored, given) if isinstance(given, LowRank) else given

    def source(self, recipe: TensorRecipe, ref: Ref, joined: bool) -> Given:
        """A source's tensor; of an adapter of the base itself, the delta alone, exactly."""
        base = recipe.base
        own = base is not None and self.plain.get(ref.checkpoint) == base.checkpoint
        if own and recipe.name not in self.expansion.row_maps:
            given = self.adapted[ref.checkpoint].get(ref.name)
            if isinstance(given, LowRank):
                return given
            if given is None and joined:
                return None  # the adapter leaves this tensor alone: its delta is zero
        return self.theta(recipe, ref)
