"""From slices and tensor names to rows: which inputs, which settings, for every output tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import MismatchError, RecipeError, quoted
from optimer_engine.mergekit.config import MergekitConfig
from optimer_engine.mergekit.precedence import base_place, tensor_settings
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.mergekit.rowmap import RowMap
from optimer_engine.mergekit.slices import Module, Slice, Source
from optimer_engine.mergekit.tokenizer import TokenizerPlan
from optimer_engine.names import (
    HEAD,
    Names,
    comes_first,
    is_buffer,
    is_multimodal,
    is_vocabulary,
    layer,
)
from optimer_engine.tensor_recipe import Ref, Settings, TensorRecipe
from optimer_engine.types import DType, TensorInfo

COPY = "copy"
"""Method of a tensor that is not floating point: the base's bytes; every source must equal them."""

MAX_LISTED = 20

_UNSCALED = Settings.of({}, [{"scale": 1.0}])


@dataclass
class Assembly:
    """The state of one expansion: what is known, and what has been found so far.

    Attributes:
        models: as `config.models()`, with `checkpoints` and `names` in the same order.
        donor: number of the model whose layout and config.json the output has.
        vocabulary: the tokenizer asked for, if any.
        rows, row_maps, warnings: the result, rows by name.
        missing, problems: what is wrong, said by `finish` all at once.
    """

    config: MergekitConfig
    models: tuple[ModelRef, ...]
    checkpoints: tuple[Checkpoint, ...]
    names: tuple[Names, ...]
    donor: int
    vocabulary: TokenizerPlan | None
    rows: dict[str, TensorRecipe] = field(default_factory=dict)
    row_maps: dict[str, RowMap] = field(default_factory=dict)
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    _by_layer: dict[int, dict[int, list[str]]] = field(default_factory=dict)
    _numbers: dict[str, list[int]] = field(default_factory=dict)

    def add_module(self, module: Module, covers: set[str] | None) -> None:
        """Rows of a module; `covers` are the plain names that it is about, None for all."""
        first, last = module.slices[0], module.slices[-1]
        if first.sources[0].layers is None:
            for name in self._outside(first, covers):
                self._add(name, first, module, self._position(name, first), None)
            return
        stack = self._stack(module)
        if stack is None:
            return
        outside = {
            id(part): [n for n in self._outside(part, covers) if not n.startswith(stack)]
            for part in (first, last)
        }
        for name in outside[id(first)]:
            if comes_first(name):
                self._add(name, first, module, self._position(name, first), None)
        out_layer = 0
        for part in module.slices:
            start, stop = part.sources[0].layers or (0, 0)
            for step in range(stop - start):
                t = step / (stop - start - 1) if stop - start > 1 else 1.0
                self._add_layer(stack, out_layer, step, part, module, t)
                out_layer += 1
        for name in outside[id(last)]:
            if not comes_first(name):
                self._add(name, last, module, 0.0, None)

    def number(self, model: ModelRef) -> int:
        """Its place among the models."""
        return self.models.index(model)

    def numbers(self, part: Slice) -> list[int]:
        """Of a slice's sources, and last of the one whose order and shapes are followed."""
        if part.at not in self._numbers:
            inputs = [source.model for source in part.sources]
            lead = part.base if part.base in inputs else inputs[0]
            self._numbers[part.at] = [self.number(model) for model in (*inputs, lead)]
        return self._numbers[part.at]

    def lead(self, part: Slice) -> int:
        """The input of a slice whose order and shapes are followed: the base, else the first."""
        return self.numbers(part)[-1]

    def finish(self) -> None:
        """Say everything that was found wrong.

        Raises:
            RecipeError: for parameters that are not given.
            MismatchError: with up to 20 problems.
        """
        if self.missing:
            lacking = [
                f"{key}{model and ' of '}{model} for {quoted(tensor)}"
                for (key, model), tensor in self.missing.items()
            ]
            raise RecipeError(
                f"{self.config.method} needs parameters that are not given: {'; '.join(lacking)}",
                where="parameters",
                todo="give them, or add `- value: ...` to conditions that leave tensors out",
            )
        listed = sorted(self.problems)
        if len(listed) > MAX_LISTED:
            listed = [*listed[:MAX_LISTED], f"and {len(self.problems) - MAX_LISTED} more"]
        if listed:
            raise MismatchError(
                "the models do not fit the recipe:\n  - " + "\n  - ".join(listed),
                where=str(self.models[self.donor]),
                todo="merge models of one architecture, with the same tensors and shapes",
            )

    def _outside(self, part: Slice, covers: set[str] | None) -> list[str]:
        """Plain names of every tensor of a slice's inputs, in the lead's order."""
        order = reversed(self.numbers(part))
        names = dict.fromkeys(name for number in order for name in self.names[number].stored)
        return [name for name in names if covers is None or name in covers]

    def _position(self, name: str, part: Slice) -> float:
        """t in a whole model: 0 outside the layers and at the first of a stack, 1 at the last."""
        found = layer(name)
        if found is None:
            return 0.0
        layers = self.names[self.lead(part)].stacks.get(found[0], 1)
        return found[1] / (layers - 1) if layers > 1 else 1.0

    def _stack(self, module: Module) -> str | None:
        stacks = set()
        for part in module.slices:
            for place, source in enumerate(part.sources):
                names = self.names[self.number(source.model)]
                at = f"{part.at}.sources[{place}].layer_range"
                if names.text_stack is None:
                    found = ", ".join(names.stacks) or "none"
                    self.problems[
                        f"{source.model}: slices need one stack of layers, found {found}"
                    ] = None
                    return None
                stacks.add(names.text_stack)
                count = names.stacks[names.text_stack]
                if source.layers is None or source.layers[1] > count:
                    self.problems[
                        f"{at} is {list(source.layers or ())}, {source.model} has {count} layers"
                    ] = None
        if len(stacks) > 1:
            self.problems[f"layers are named differently: {', '.join(sorted(stacks))}"] = None
        return None if self.problems else stacks.pop()

    def _add_layer(
        self, stack: str, out_layer: int, step: int, part: Slice, module: Module, t: float
    ) -> None:
        shifts = [(source.layers or (0, 0))[0] + step for source in part.sources]
        lead = self.lead(part)
        order = sorted(
            zip(part.sources, shifts, strict=True), key=lambda s: self.number(s[0].model) != lead
        )
        rests = dict.fromkeys(
            name[len(f"{stack}{shift}") :]
            for source, shift in order
            for name in self._layer_names(self.number(source.model), stack)[shift]
        )
        for rest in rests:
            inputs = [f"{stack}{shift}{rest}" for shift in shifts]
            self._add(f"{stack}{out_layer}{rest}", part, module, t, inputs)

    def _layer_names(self, number: int, stack: str) -> dict[int, list[str]]:
        """Plain names by layer; found once for each model."""
        if number not in self._by_layer:
            layers = range(self.names[number].stacks[stack])
            by_layer: dict[int, list[str]] = {index: [] for index in layers}
            for name in self.names[number].stored:
                if (found := layer(name)) is not None and found[0] == stack:
                    by_layer[found[1]].append(name)
            self._by_layer[number] = by_layer
        return self._by_layer[number]

    def _add(
        self, name: str, part: Slice, module: Module, t: float, inputs: Sequence[str] | None
    ) -> None:
        """The row of output tensor `name` (plain), from `inputs` (plain; None: the same name)."""
        *numbers, leading = self.numbers(part)
        wanted = inputs or [name] * len(numbers)
        stored = [self.names[n].find(want) for n, want in zip(numbers, wanted, strict=True)]
        out_name = self.names[self.donor].spell(name)
        lead = numbers.index(leading)
        if name == HEAD and self._head_is_tied(numbers):
            return
        if None in stored:
            lacking = [n for n, found in zip(numbers, stored, strict=True) if found is None]
            if is_multimodal(name) and not any(self.names[n].multimodal for n in lacking):
                if stored[lead] is None:
                    self.warnings["parts beside the text that the base lacks are left out"] = None
                else:
                    self.warnings["parts beside the text that some lack are the base's"] = None
                    self.keep(name, numbers[lead])
                return
            if is_buffer(name):
                self.warnings["buffers that some models do not store are left out"] = None
                return
            for number, want in zip(numbers, wanted, strict=True):
                if self.names[number].find(want) is None:
                    lacks = quoted(self.names[number].spell(want))
                    self.problems[f"{self.models[number]} lacks {lacks}"] = None
            return
        refs = [Ref(n, found) for n, found in zip(numbers, stored, strict=True) if found]
        infos = [self.checkpoints[ref.checkpoint].tensors[ref.name] for ref in refs]
        base_number = None if part.base is None else self.number(part.base)
        shape = self._shape(name, out_name, infos, refs, lead, base_number)
        if shape is None:
            return
        if not all(info.dtype.mergeable for info in infos):
            self._add_copy(out_name, infos, refs, lead)
            return
        dtype = self.config.out_dtype or _promoted([info.dtype for info in infos])
        spelled = [
            ref.name if want != HEAD else self.names[ref.checkpoint].spell(want)
            for ref, want in zip(refs, wanted, strict=True)
        ]
        place = base_place(self.config, part)
        base = None if place is None else refs[place]
        sources = tuple(ref for ref in refs if ref is not base)
        if base is not None and not sources:  # nothing is merged into the base
            self._put(TensorRecipe(out_name, shape, dtype, "passthrough", _UNSCALED, None, (base,)))
            return
        settings = tensor_settings(self.config, module, part, t, out_name, spelled, self.missing)
        self._put(TensorRecipe(out_name, shape, dtype, self.config.method, settings, base, sources))

    @property
    def unties_head(self) -> bool:
        """Whether the output's head differs from its embeddings though the donor ties the two."""
        return any(each.tied is None for each in self.names) and (
            self.names[self.donor].tied is not None
        )

    def picked_layers(self) -> list[tuple[dict[str, Any], int]] | None:
        """For each layer of a sliced stack, the config.json and index of its leading input."""
        for module in self.config.modules.values():
            if module.slices[0].sources[0].layers is not None:
                return [
                    (self.checkpoints[self.lead(part)].config, index)
                    for part in module.slices
                    for index in range(*self._lead_source(part).layers)  # type: ignore[misc]
                ]
        return None

    def _lead_source(self, part: Slice) -> Source:
        return next(s for s in part.sources if self.number(s.model) == self.lead(part))

    def _head_is_tied(self, numbers: list[int]) -> bool:
        """Whether the output has no head of its own, as every input ties it to the embeddings."""
        names = [self.names[number] for number in numbers]
        if any(each.tied is None for each in names):
            return False
        stored = [HEAD in each.stored for each in names]
        if all(stored) and not all(each.says_tied for each in names):
            return False
        if any(stored):
            self.warnings[
                "lm_head.weight is not written: every model ties it to its embeddings"
            ] = None
        return True

    def keep(self, name: str, lead: int) -> None:
        """The row of a tensor (plain name) that stays as model number `lead` has it."""
        stored, out_name = self.names[lead].stored[name], self.names[self.donor].spell(name)
        info = self.checkpoints[lead].tensors[stored]
        ref = Ref(lead, stored)
        if not info.dtype.mergeable:
            self._add_copy(out_name, [info], [ref], 0)
            return
        dtype = self.config.out_dtype or _promoted([info.dtype])
        self._put(TensorRecipe(out_name, info.shape, dtype, "passthrough", _UNSCALED, None, (ref,)))

    def _add_copy(self, out_name: str, infos: list[TensorInfo], refs: list[Ref], lead: int) -> None:
        found = {info.dtype.code for info in infos}
        if len(found) > 1:
            self.problems[
                f"{quoted(out_name)} is {' and '.join(sorted(found))} in different models"
            ] = None
            return
        sources = tuple(ref for place, ref in enumerate(refs) if place != lead)
        info = infos[lead]
        settings = Settings.of({}, [{} for _ in sources])
        self._put(
            TensorRecipe(out_name, info.shape, info.dtype, COPY, settings, refs[lead], sources)
        )

    def _shape(
        self,
        name: str,
        out_name: str,
        infos: list[TensorInfo],
        refs: list[Ref],
        lead: int,
        base: int | None,
    ) -> tuple[int, ...] | None:
        """The output's shape; None when the inputs' do not fit each other."""
        shapes = [info.shape for info in infos]
        vocabulary = self.vocabulary if is_vocabulary(name) and all(shapes) else None
        if vocabulary is not None and len({shape[1:] for shape in shapes}) == 1:
            counts = {r.checkpoint: shape[0] for r, shape in zip(refs, shapes, strict=True)}
            mapped = vocabulary.row_map(tuple(counts), base if base in counts else None, counts)
            if not all(mapped.is_identity(count) for count in counts.values()):
                self.row_maps[out_name] = mapped
            return (mapped.rows, *shapes[0][1:])
        if len(set(shapes)) == 1:
            return shapes[0]
        wanted = shapes[lead]
        for ref, shape in zip(refs, shapes, strict=True):
            if shape != wanted:
                hint = ""
                if is_vocabulary(name) and shape[1:] == wanted[1:] and self.vocabulary is None:
                    hint = " (tokenizer_source: union aligns rows by token)"
                self.problems[
                    f"{self.models[ref.checkpoint]}: {quoted(ref.name)} has shape {list(shape)},"
                    f" {list(wanted)} expected{hint}"
                ] = None
        return None

    def _put(self, row: TensorRecipe) -> None:
        if row.name in self.rows:
            raise RecipeError("is covered by two modules", where=row.name)
        self.rows[row.name] = row


_WIDTH = {DType.F32: 2, DType.F64: 3}


def _promoted(dtypes: list[DType]) -> DType:
    """The smallest dtype written here that holds the values of all; fp8 counts as bf16."""
    halves = {DType.F16 if d is DType.F16 else DType.BF16 for d in dtypes if d not in _WIDTH}
    wide = [d for d in dtypes if d in _WIDTH] + ([DType.F32] if len(halves) > 1 else [])
    return max(wide, key=_WIDTH.__getitem__) if wide else halves.pop()
