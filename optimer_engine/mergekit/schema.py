"""The keys of a mergekit recipe (0.1.5), as msgspec Structs that refuse every other key."""

from __future__ import annotations

from typing import Any

import msgspec

from optimer_engine.mergekit.reference import Reference

Parameters = dict[str, Any] | None


class InputModel(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of `models`: all layers of one model."""

    model: Reference
    parameters: Parameters = None


class InputSlice(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of a slice's `sources`: layers first..last-1 of one model."""

    model: Reference
    layer_range: tuple[int, int]
    parameters: Parameters = None


class OutputSlice(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of `slices`: as many output layers as each of its sources has."""

    sources: list[InputSlice]
    base_model: Reference | None = None
    parameters: Parameters = None


class Module(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of `modules`: one part of a model that has several."""

    slices: list[OutputSlice] | None = None
    models: list[InputModel] | None = None
    parameters: Parameters = None


class TokenSource(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of `tokenizer.tokens`: where the embedding of one token comes from."""

    source: Reference | None = None
    force: bool = False


class Tokenizer(msgspec.Struct, forbid_unknown_fields=True):
    """The key `tokenizer`."""

    source: Reference = "union"
    tokens: dict[str, TokenSource] | None = None
    pad_to_multiple_of: int | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    merge_method: str
    name: str | None = None
    models: list[InputModel] | None = None
    slices: list[OutputSlice] | None = None
    modules: dict[str, Module] | None = None
    base_model: Reference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Reference | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Parameters = None
