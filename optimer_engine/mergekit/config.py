"""A mergekit recipe, read strictly and resolved as far as the file alone allows.

mergekit ignores keys that it does not know; here a misspelt or unsupported key is refused with its
path. What mergekit itself reads without any effect (`int8_mask` for slerp) is allowed, since
recipes in use are full of it, and becomes a warning.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from optimer_engine.errors import RecipeError
from optimer_engine.mergekit import schema
from optimer_engine.mergekit.reference import ModelRef, Reference, only
from optimer_engine.mergekit.settings import (
    SIGNATURES,
    Setting,
    Signature,
    check_parameter,
    read_setting,
    typed,
)
from optimer_engine.recipe import decode, read_yaml
from optimer_engine.types import DType

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


@dataclass(frozen=True)
class TokenRow:
    """Where a token's embedding comes from: "zero", a model's row of it, or a row by id or text."""

    model: ModelRef | Literal["zero"] | None
    token: str | int | None
    force: bool


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer asked for: "union", "base" or a model's."""

    source: ModelRef | str
    tokens: dict[str, TokenRow]
    pad_to_multiple_of: int | None


@dataclass(frozen=True)
class MergekitConfig:
    """A mergekit recipe (0.1.5) whose every key has been understood; no model is looked up yet.

    Attributes:
        method: the value of merge_method.
        modules: by name; "default" for a file with `models` or `slices` at the top.
        parameters: those at the top.
        base: base_model at the top.
        out_dtype: out_dtype, else dtype, else None (as the inputs have it).
        tokenizer, chat_template: as asked for; None where the base's are kept.
        warnings: what stands in the file without an effect.
        written: the file as plain data, for reports and fingerprints.
    """

    method: str
    modules: dict[str, Module]
    parameters: Settings
    base: ModelRef | None
    out_dtype: DType | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    warnings: tuple[str, ...]
    written: dict[str, Any]

    @property
    def signature(self) -> Signature:
        """How mergekit calls the method."""
        return SIGNATURES[self.method]

    def models(self) -> tuple[ModelRef, ...]:
        """The models whose weights are read: as the file's inputs name them, then other bases.

        `Ref.checkpoint` in the rows of an expansion counts this tuple.
        """
        slices = [part for module in self.modules.values() for part in module.slices]
        inputs = dict.fromkeys(source.model for part in slices for source in part.sources)
        bases = [*(part.base for part in slices), self.base]
        return tuple(inputs | dict.fromkeys(base for base in bases if base is not None))

    def tokenizer_models(self) -> tuple[ModelRef, ...]:
        """The models of which nothing but the tokenizer is read."""
        if self.tokenizer is None or not isinstance(self.tokenizer.source, ModelRef):
            return ()
        return () if self.tokenizer.source in self.models() else (self.tokenizer.source,)


def load(config: MergekitConfig | Mapping[str, Any] | str | Path) -> MergekitConfig:
    """Read a mergekit recipe from a YAML file's path or a mapping; check all that needs no model.

    Raises:
        RecipeError: naming the file, the key by its path, and the nearest right key.
    """
    if isinstance(config, MergekitConfig):
        return config
    where = "recipe" if isinstance(config, Mapping) else str(config)
    data = dict(config) if isinstance(config, Mapping) else _read(Path(config))
    document = decode(data, schema.Document, where)
    try:
        return _resolve(document)
    except RecipeError as error:
        at = f"{where}: {error.where}" if error.where else where
        raise RecipeError(error.what, where=at, todo=error.todo) from None


def _read(path: Path) -> object:
    try:
        return read_yaml(path)
    except RecipeError as error:
        if "another document" not in error.what:
            raise
        raise RecipeError(
            "holds several documents (---), a multi-merge, which is not supported",
            where=str(path),
            todo="put each document into a file of its own and run them in order",
        ) from None


def _resolve(document: schema.Document) -> MergekitConfig:
    given = [key for key in ("models", "slices", "modules") if getattr(document, key)]
    if len(given) != 1:
        raise RecipeError(
            f"found {' and '.join(given) or 'none'}",
            where="models, slices, modules",
            todo="write exactly one of the three",
        )
    if document.merge_method not in SIGNATURES:
        near = difflib.get_close_matches(document.merge_method, SIGNATURES, n=1)
        raise RecipeError(
            f"no method is named {document.merge_method!r}",
            where="merge_method",
            todo=f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(SIGNATURES)}",
        )
    reader = _Reader(document)
    modules = document.modules or {"": schema.Module(document.slices, document.models)}
    return MergekitConfig(
        document.merge_method,
        {
            name or "default": reader.module(module, f"modules.{name}." if name else "")
            for name, module in modules.items()
        },
        reader.settings(document.parameters, "parameters"),
        reader.base,
        _dtype(document),
        _tokenizer(document),
        document.chat_template,
        tuple(reader.warnings),
        _plain(document),
    )


class _Reader:
    """Turns the file's models, slices and parameters into resolved ones, noting warnings."""

    def __init__(self, document: schema.Document) -> None:
        self.method = document.merge_method
        self.signature = SIGNATURES[self.method]
        base = document.base_model
        self.base = None if base is None else ModelRef.parse(base, "base_model")
        self.warnings: list[str] = []

    def module(self, module: schema.Module, at: str) -> Module:
        if bool(module.slices) == bool(module.models):
            raise RecipeError("needs either models or slices", where=at.rstrip("."))
        slices = list(self.slices(module, at))
        for part in slices:
            self.check(part)
        return Module(tuple(slices), self.settings(module.parameters, f"{at}parameters"))

    def slices(self, module: schema.Module, at: str) -> Iterator[Slice]:
        if module.models:
            sources = []
            for number, entry in enumerate(module.models):
                here = f"{at}models[{number}]"
                sources.append(self.source(entry.model, None, entry.parameters, here, self.base))
            if self.base is not None and self.base not in [s.model for s in sources]:
                sources.append(Source(self.base, None, {}))
            yield Slice(f"{at}models", tuple(sources), self.base, {})
        for number, part in enumerate(module.slices or []):
            path = f"{at}slices[{number}]"
            base = self.base
            if part.base_model is not None:
                base = ModelRef.parse(part.base_model, f"{path}.base_model")
            inputs = tuple(
                self.source(s.model, s.layer_range, s.parameters, f"{path}.sources[{place}]", base)
                for place, s in enumerate(part.sources)
            )
            yield Slice(path, inputs, base, self.settings(part.parameters, f"{path}.parameters"))

    def source(
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

    def check(self, part: Slice) -> None:
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


def _dtype(document: schema.Document) -> DType | None:
    dtype = None
    for key in ("dtype", "out_dtype"):  # the last one given decides
        name = getattr(document, key)
        try:
            dtype = DType.parse(name) if name else dtype
        except RecipeError as error:
            raise RecipeError(error.what, where=key, todo=error.todo) from None
    return dtype


def _tokenizer(document: schema.Document) -> Tokenizer | None:
    asked, at = document.tokenizer, "tokenizer.source"
    if asked is None:
        if document.tokenizer_source is None:
            return None
        asked, at = schema.Tokenizer(document.tokenizer_source), "tokenizer_source"
    elif document.tokenizer_source is not None:
        raise RecipeError(
            "stand both in the file",
            where="tokenizer, tokenizer_source",
            todo="keep tokenizer, with its key source",
        )
    multiple = asked.pad_to_multiple_of
    if multiple is not None and multiple < 1:
        raise RecipeError(
            f"is {multiple}, expected 1 or more", where=f"{at[:9]}.pad_to_multiple_of"
        )
    source: ModelRef | str = "union"
    if asked.source == "base":
        source = "base"
    elif asked.source != "union":
        source = ModelRef.parse(asked.source, at)
    tokens = {
        token: _token_row(row, f"tokenizer.tokens.{token}")
        for token, row in (asked.tokens or {}).items()
    }
    return Tokenizer(source, tokens, multiple)


def _token_row(row: schema.TokenSource, at: str) -> TokenRow:
    source = row.source
    if source is None:
        if row.force:
            raise RecipeError("force needs a source", where=at, todo="add `source: MODEL`")
        return TokenRow(None, None, False)
    if not (isinstance(source, dict) and "kind" in source):
        return TokenRow(ModelRef.parse(source, f"{at}.source"), None, row.force)
    if source["kind"] == "zero":
        only(source, {"kind"}, f"{at}.source")
        return TokenRow("zero", None, row.force)
    if source["kind"] != "model_token":
        raise RecipeError(
            f"is {source['kind']!r}, expected zero or model_token", where=f"{at}.source.kind"
        )
    only(source, {"kind", "model", "token", "token_id"}, f"{at}.source")
    token = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    if len(token) != 1 or "model" not in source:
        raise RecipeError(
            "needs model, and either token or token_id", where=f"{at}.source", todo="give one each"
        )
    wanted = int if source.get("token_id") is not None else str
    if type(token[0]) is not wanted:
        raise RecipeError(f"is {token[0]!r}, expected {wanted.__name__}", where=f"{at}.source")
    return TokenRow(ModelRef.parse(source["model"], f"{at}.source.model"), token[0], row.force)


def _plain(document: schema.Document) -> dict[str, Any]:
    def without_none(data: Any) -> Any:
        if isinstance(data, dict):
            return {k: without_none(v) for k, v in data.items() if v is not None}
        return [without_none(item) for item in data] if isinstance(data, list | tuple) else data

    return without_none(msgspec.to_builtins(document))
