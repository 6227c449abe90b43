"""The inputs of a recipe, `models`, `slices` and `modules`, as slices with checked parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from optimer_engine.errors import RecipeError
from optimer_engine.mergekit import schema
from optimer_engine.mergekit.reference import ModelRef, Reference
from optimer_engine.mergekit.settings import (
    Setting,
    Signature,
    check_parameter,
    read_setting,
    typed,
)

Settings = dict[str, Setting]


@dataclass(frozen=True)
class Source:
    """One input of a slice; `layers` is (first, one past the last), None for a whole model."""

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True)
class Slice:
    """Output layers and what they are merged from; `at` is its path in the file."""

    at: str
    sources: tuple[Source, ...]
    base: ModelRef | None
    parameters: Settings


@dataclass(frozen=True)
class Module:
    """Slices in the order of the output; one without layer ranges where the file says `models`."""

    slices: tuple[Slice, ...]
    parameters: Settings


class SliceReader:
    """Turns the file's models, slices and parameters into resolved ones, noting warnings."""

    def __init__(self, document: schema.Document, signature: Signature) -> None:
        self.method, self.signature = document.merge_method, signature
        base = document.base_model
        self.base = None if base is None else ModelRef.parse(base, "base_model")
        self.warnings: list[str] = []

    def module(self, module: schema.Module, at: str) -> Module:
        """A module, whose path in the file is `at`.

        Raises:
            RecipeError: when it does not say what the method needs.
        """
        if bool(module.slices) == bool(module.models):
            raise RecipeError("needs either models or slices", where=at.rstrip("."))
        slices = list(self._slices(module, at))
        for part in slices:
            self._check(part)
        return Module(tuple(slices), self.settings(module.parameters, f"{at}parameters"))

    def _slices(self, module: schema.Module, at: str) -> Iterator[Slice]:
        """Its slices; its `models` are a single one over all layers, with the base added."""
        if module.models:
            sources = []
            for number, entry in enumerate(module.models):
                here = f"{at}models[{number}]"
                sources.append(self._source(entry.model, None, entry.parameters, here, self.base))
            if self.base is not None and self.base not in [s.model for s in sources]:
                sources.append(Source(self.base, None, {}))
            yield Slice(f"{at}models", tuple(sources), self.base, {})
        for number, part in enumerate(module.slices or []):
            path = f"{at}slices[{number}]"
            base = self.base
            if part.base_model is not None:
                base = ModelRef.parse(part.base_model, f"{path}.base_model")
            inputs = tuple(
                self._source(s.model, s.layer_range, s.parameters, f"{path}.sources[{place}]", base)
                for place, s in enumerate(part.sources)
            )
            yield Slice(path, inputs, base, self.settings(part.parameters, f"{path}.parameters"))

    def _source(
        self,
        model: Reference,
        layers: tuple[int, int] | None,
        parameters: schema.Parameters,
        at: str,
        base: ModelRef | None,
    ) -> Source:
        if layers is not None and not 0 <= layers[0] < layers[1]:
            raise RecipeError(
                f"is {list(layers)}, expected [first, one past the last]", where=f"{at}.layer_range"
            )
        reference = ModelRef.parse(model, f"{at}.model")
        settings = self.settings(parameters, f"{at}.parameters")
        is_base = reference == base and self.signature.base != "ordinary"
        for name in [*settings]:
            path = f"{at}.parameters.{name}"
            if name in self.signature.shared:
                self.warnings.append(
                    f"{path} changes nothing (nor in mergekit): {name} holds for all models; write"
                    " it at the top, or under a slice"
                )
                del settings[name]
            elif is_base:
                self.warnings.append(f"{path} changes nothing: the base has no {name}")
        return Source(reference, layers, settings)

    def settings(self, parameters: schema.Parameters, at: str) -> Settings:
        """The parameters that the method has, with values of their kind."""
        known = {**self.signature.shared, **self.signature.per_source}
        found = {}
        for name, value in (parameters or {}).items():
            setting = read_setting(value, f"{at}.{name}")
            warning = check_parameter(name, self.method, self.signature, f"{at}.{name}")
            if warning is None:
                found[name] = typed(setting, known[name].kind, f"{at}.{name}")
            else:
                self.warnings.append(warning)
        return found

    def _check(self, part: Slice) -> None:
        models = [source.model for source in part.sources]
        twice = sorted({str(model) for model in models if models.count(model) > 1})
        if twice:
            raise RecipeError(f"{twice[0]!r} stands twice", where=part.at, todo="name it once")
        lengths = sorted({s.layers[1] - s.layers[0] for s in part.sources if s.layers})
        if len(lengths) > 1:
            counts = " and ".join(map(str, lengths))
            raise RecipeError(
                f"its sources have {counts} layers", where=part.at, todo="give each as many"
            )
        count = len(models)
        if self.signature.base == "required" and part.base is None:
            raise RecipeError(f"{self.method} needs a base", where="base_model", todo="name it")
        if self.signature.base != "ordinary" and part.base is not None:
            if part.base not in models:
                raise RecipeError(
                    f"the base {str(part.base)!r} is not among the sources",
                    where=part.at,
                    todo="add it as a source, with its layer_range",
                )
            count -= 1
        low, high = self.signature.sources
        if not low <= count <= (count if high is None else high):
            wanted = f"{low}" if low == high else f"at least {low}"
            beside = " beside the base" if part.base and self.signature.base != "ordinary" else ""
            raise RecipeError(
                f"{self.method} takes {wanted} models{beside}, found {count}", where=part.at
            )
