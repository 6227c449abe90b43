"""A mergekit recipe, read strictly and resolved as far as the file alone allows.

mergekit ignores keys that it does not know; here a misspelt or unsupported key is refused with its
path. What mergekit itself reads without any effect (`int8_mask` for slerp) is allowed, since
recipes in use are full of it, and becomes a warning.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from optimer_engine.errors import RecipeError
from optimer_engine.mergekit import schema
from optimer_engine.mergekit.reference import ModelRef, only
from optimer_engine.mergekit.settings import NOT_HERE, SIGNATURES, Signature, signature_of
from optimer_engine.mergekit.slices import Module, Settings, SliceReader
from optimer_engine.recipe import decode, read_yaml
from optimer_engine.types import DType


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
        method: the value of merge_method; `signature`: how it is called.
        modules: by name; "default" for a file with `models` or `slices` at the top.
        parameters: those at the top.
        base: base_model at the top.
        out_dtype: out_dtype, else dtype, else None (as the inputs have it).
        tokenizer, chat_template: as asked for; None where the base's are kept.
        warnings: what stands in the file without an effect.
        written: the file as plain data, for reports and fingerprints.
    """

    method: str
    signature: Signature
    modules: dict[str, Module]
    parameters: Settings
    base: ModelRef | None
    out_dtype: DType | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    warnings: tuple[str, ...]
    written: dict[str, Any]

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
    signature = signature_of(document.merge_method)
    if signature is None:
        near = difflib.get_close_matches(document.merge_method, SIGNATURES, n=1)
        here = "known here, only to mergekit" if document.merge_method in NOT_HERE else "a method"
        raise RecipeError(
            f"{document.merge_method!r} is not {here}",
            where="merge_method",
            todo=f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(SIGNATURES)}",
        )
    reader = SliceReader(document, signature)
    if document.name is not None:
        reader.warnings.append("name changes nothing: it is for files of several documents")
    modules = document.modules or {"": schema.Module(document.slices, document.models)}
    return MergekitConfig(
        document.merge_method,
        signature,
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
