"""The output's tokenizer, and which row of each model belongs to which of its tokens.

A tokenizer is its tokenizer.json; the work is done on that data, and the `tokenizers` library only
confirms the result. A union keeps the base's tokenizer, with its merges, normaliser and token
numbers, and appends the tokens that other models have as added tokens: ordinary ones first, then
added and special ones, model by model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine.errors import CheckpointError, MissingExtraError, RecipeError, quoted
from optimer_engine.mergekit.config import Tokenizer, TokenRow
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.mergekit.rowmap import MEAN, PADDING, ZERO, RowMap
from optimer_engine.mergekit.templates import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
"""Every file beside the weights that a tokenizer may consist of."""

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
          "special": False}  # fmt: skip


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json.

    Attributes:
        folder: where it lies.
        data: its content.
        ids: token to number, ordinary and added ones.
        limit: tokens with numbers from here on have no row in the model.
    """

    folder: Path
    data: dict[str, Any]
    ids: dict[str, int]
    limit: int

    @classmethod
    def read(cls, folder: Path, rows: int | None) -> TokenizerFile:
        """From a folder; `rows` is the model's vocab_size where its config tells.

        Raises:
            CheckpointError: when there is none, or it is not as it must be.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                "no tokenizer.json, which aligning vocabularies needs",
                where=str(folder),
                todo="write it with Transformers: AutoTokenizer.from_pretrained(...)"
                ".save_pretrained(...)",
            )
        data = read_json(path)
        try:
            ids = _ids(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"is not a tokenizer as the tokenizers library writes it: {error}", where=str(path)
            ) from error
        return cls(folder, data, ids, len(ids) if rows is None else rows)

    @property
    def added(self) -> list[dict[str, Any]]:
        """Added tokens by number."""
        return sorted(self.data.get("added_tokens") or [], key=lambda entry: entry["id"])


def _ids(data: dict[str, Any]) -> dict[str, int]:
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score], numbered as they stand
        ids = {token: number for number, (token, _) in enumerate(vocabulary)}
    else:
        ids = {str(token): int(number) for token, number in vocabulary.items()}
    ids.update({entry["content"]: entry["id"] for entry in data.get("added_tokens") or []})
    if ids and min(ids.values()) < 0:
        raise ValueError("a negative token number")
    return ids


@dataclass
class TokenizerPlan:
    """The output's vocabulary.

    Attributes:
        tokens: by number; None for a number that no token has.
        rows: of the output's embeddings: all tokens, padded as asked.
        vocabularies: of every model, by its number.
        asked: tokens with a source of their own.
        models: by number.
        files: tokenizer files to write; empty when the donor's are the output's.
        warnings: what was noticed.
    """

    tokens: list[str | None]
    rows: int
    vocabularies: dict[int, TokenizerFile]
    asked: dict[str, TokenRow]
    models: tuple[ModelRef, ...]
    files: dict[str, bytes]
    warnings: list[str] = field(default_factory=list)
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def permutation(self, model: int) -> np.ndarray:
        """int64 [len(tokens)]: the model's row for each token, -1 where it has none."""
        vocabulary = self.vocabularies[model]
        key = (id(vocabulary.ids), vocabulary.limit)
        if key not in self._cache:
            found = map(vocabulary.ids.get, self.tokens, repeat(-1))  # type: ignore[arg-type]
            own = np.fromiter(found, np.int64, len(self.tokens))
            self._cache[key] = np.where(own < vocabulary.limit, own, -1)
        return self._cache[key]

    def row_map(self, models: tuple[int, ...], base: int | None, rows: Mapping[int, int]) -> RowMap:
        """How a matrix with a row per token is put together.

        A model's stand-in for a token that it lacks is, in this order: what the recipe says for
        the token; the row of the only model that has it; zeros if none has it; the base's row; the
        mean of all that have it.

        Args:
            models: the numbers of the models merged; `base` is one of them, or None.
            rows: how many rows each model's matrix has.

        Raises:
            RecipeError: when a token's source is not among the models, or lacks the token.
        """
        key = (models, base, tuple(rows[model] for model in models))
        if key not in self._cache:
            self._cache[key] = self._row_map(models, base, rows)
        return self._cache[key]

    def _row_map(
        self, models: tuple[int, ...], base: int | None, rows: Mapping[int, int]
    ) -> RowMap:
        count = len(self.tokens)
        own = {m: np.full(self.rows, -1, np.int64) for m in models}
        for model in models:
            found = self.permutation(model)
            own[model][:count] = np.where(found < rows[model], found, -1)
        present = np.stack([own[m] >= 0 for m in models])
        having = present.sum(axis=0)
        donor = np.full(self.rows, MEAN, np.int64)
        if base is not None:
            donor[own[base] >= 0] = base
        only = having == 1
        donor[only] = np.asarray(models)[present.argmax(axis=0)[only]]
        donor[having == 0] = ZERO
        donor_row = np.zeros(self.rows, np.int64)
        for model in models:
            donor_row = np.where(donor == model, own[model], donor_row)
        named = np.fromiter((token is not None for token in self.tokens), bool, count)
        donor[count:] = PADDING
        donor[:count][~named] = PADDING
        self._apply_asked(own, donor, donor_row, rows)
        lost = int(((donor == ZERO) & (having == 0)).sum())
        if lost:
            self.warnings.append(
                f"{lost} tokens of the output are in no model: their rows are zero"
            )
        return RowMap(self.rows, own, donor, donor_row)

    def _apply_asked(
        self,
        own: dict[int, np.ndarray],
        donor: np.ndarray,
        donor_row: np.ndarray,
        rows: Mapping[int, int],
    ) -> None:
        numbers = {token: n for n, token in enumerate(self.tokens) if token in self.asked}
        for token, row in self.asked.items():
            number, at = numbers[token], f"tokenizer.tokens.{quoted(token)}.source"
            if row.model is None:
                continue
            if row.model == "zero":
                donor[number] = ZERO
            else:
                if row.model not in self.models or self.models.index(row.model) not in own:
                    raise RecipeError(f"{row.model} is not among the models merged", where=at)
                donor[number] = self.models.index(row.model)
                donor_row[number] = self._row_of(row, token, own, rows, at)
            if row.force:
                for each in own.values():
                    each[number] = -1

    def _row_of(
        self,
        row: TokenRow,
        token: str,
        own: dict[int, np.ndarray],
        rows: Mapping[int, int],
        at: str,
    ) -> int:
        assert isinstance(row.model, ModelRef)
        model = self.models.index(row.model)
        wanted = row.token if isinstance(row.token, int) else None
        if wanted is None:
            name = token if row.token is None else str(row.token)
            wanted = self.vocabularies[model].ids.get(name, -1)
            if wanted < 0:
                raise RecipeError(f"{row.model} has no token {quoted(name)!r}", where=at)
        if not 0 <= wanted < rows[model]:
            raise RecipeError(f"{row.model} has no row {wanted}, only {rows[model]}", where=at)
        return wanted


def build_tokenizer(
    asked: Tokenizer,
    models: tuple[ModelRef, ...],
    base: int,
    folders: Mapping[ModelRef, Path],
    vocab_sizes: Sequence[int | None],
) -> TokenizerPlan:
    """The output's vocabulary for `tokenizer: asked`.

    Args:
        models: in the order of the recipe; `base` is the number of the one whose tokenizer is kept
            or extended.
        folders: of every model and of the one that is asked for.
        vocab_sizes: of config.json, by model.

    Raises:
        CheckpointError: a tokenizer is missing or not usable.
        RecipeError: the tokenizers cannot be put together.
    """
    vocabularies: dict[int, TokenizerFile] = {}
    warnings: list[str] = []
    order = [base, *(number for number in range(len(models)) if number != base)]
    for number in order:
        folder = folders[models[number]]
        if number != base and not any((folder / name).exists() for name in TOKENIZER_FILES):
            warnings.append(f"{models[number]} has no tokenizer; taken to be {models[base]}'s")
            known = vocabularies[base]
            size = vocab_sizes[number]
            vocabularies[number] = TokenizerFile(
                known.folder, known.data, known.ids, known.limit if size is None else size
            )
            continue
        vocabularies[number] = TokenizerFile.read(folder, vocab_sizes[number])
    kept = vocabularies[base]
    data = kept.data
    folder = kept.folder
    if isinstance(asked.source, ModelRef):
        folder = folders[asked.source]
        data = TokenizerFile.read(folder, None).data
    else:
        data = _stripped(kept)
        if asked.source == "union":
            data = _union(data, [vocabularies[number] for number in order], warnings)
    data = _with_tokens(data, [_added(token) for token in asked.tokens])
    files = _files(folder, data)
    ids = _ids(data)
    size = max(ids.values(), default=-1) + 1
    tokens: list[str | None] = [None] * size
    for token, number in ids.items():
        tokens[number] = token
    multiple = asked.pad_to_multiple_of or 1
    rows = -(-size // multiple) * multiple
    return TokenizerPlan(tokens, rows, vocabularies, asked.tokens, models, files, warnings)


def _added(token: str) -> dict[str, Any]:
    return {"content": token, **_PLAIN}


def _stripped(tokenizer: TokenizerFile) -> dict[str, Any]:
    """Without the tokens for which the model has no row."""
    beyond = {token for token, number in tokenizer.ids.items() if number >= tokenizer.limit}
    if not beyond:
        return tokenizer.data
    model = tokenizer.data["model"]
    if model.get("type") != "BPE":
        raise RecipeError(
            f"{len(beyond)} tokens have no row in the model, and tokens can only be taken out of a"
            f" BPE tokenizer, not {model.get('type')}",
            where=str(tokenizer.folder),
        )

    def kept(merge: Any) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        return beyond.isdisjoint((*parts, "".join(parts)))

    return {
        **tokenizer.data,
        "added_tokens": [e for e in tokenizer.added if e["id"] < tokenizer.limit],
        "model": {
            **model,
            "vocab": {t: n for t, n in model["vocab"].items() if t not in beyond},
            "merges": [merge for merge in model.get("merges", ()) if kept(merge)],
        },
    }


def _union(
    data: dict[str, Any], tokenizers: list[TokenizerFile], warnings: list[str]
) -> dict[str, Any]:
    """The base's tokenizer (`data`, and first in the list) with the tokens that others add."""
    ordinary: dict[str, None] = {}
    added: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for tokenizer in tokenizers:
        if id(tokenizer.ids) in seen:
            continue
        seen.add(id(tokenizer.ids))
        entries = {entry["content"]: entry for entry in tokenizer.added}
        in_order = sorted(tokenizer.ids.items(), key=lambda item: item[1])
        ordinary.update(
            (token, None)
            for token, number in in_order
            if number < tokenizer.limit and token not in entries
        )
        for token, entry in entries.items():
            if entry["id"] >= tokenizer.limit:
                continue
            first = added.setdefault(token, entry)
            if {**first, "id": 0} != {**entry, "id": 0}:
                warnings.append(
                    f"token {quoted(token)} is added with different settings; the first model's"
                    " hold"
                )
    known = _ids(data)
    fresh = [_added(token) for token in ordinary if token not in known and token not in added]
    return _with_tokens(data, fresh + list(added.values()))


def _with_tokens(data: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """With more added tokens, numbered on from the last; those it has already stay as they are."""
    ids = _ids(data)
    have = {entry["content"] for entry in data.get("added_tokens") or []}
    following = max(ids.values(), default=-1) + 1
    new = []
    for entry in entries:
        token = entry["content"]
        if token in have or (token in ids and entry == _added(token)):
            continue
        have.add(token)
        if token not in ids:
            ids[token], following = following, following + 1
        new.append({"id": ids[token], **{k: v for k, v in entry.items() if k != "id"}})
    if not new:
        return data
    everything = [*(data.get("added_tokens") or []), *new]
    return {**data, "added_tokens": sorted(everything, key=lambda entry: entry["id"])}


def _files(folder: Path, data: dict[str, Any]) -> dict[str, bytes]:
    """Every tokenizer file of `folder` with tokenizer.json replaced by `data`."""
    found = {name: (folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    original = read_json(folder / "tokenizer.json")
    if original == data:
        return {name: path.read_bytes() for name, path in found.items()}
    _confirm(data, folder)
    files = {
        name: path.read_bytes()
        for name, path in found.items()
        if name in ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
    }
    files["tokenizer.json"] = dump_json(data)
    settings = copy.deepcopy(read_json(folder / "tokenizer_config.json"))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(entry["id"]): {k: v for k, v in entry.items() if k != "id"}
            for entry in data.get("added_tokens") or []
        }
    files["tokenizer_config.json"] = dump_json(settings)
    return files


def dump_json(data: dict[str, Any]) -> bytes:
    """As Transformers writes it."""
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _confirm(data: dict[str, Any], folder: Path) -> None:
    """Have the tokenizers library read what will be written, and number the tokens the same."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise MissingExtraError(
            "tokenizers is not installed", todo="pip install tokenizers"
        ) from None
    try:
        read = Library.from_str(json.dumps(data, ensure_ascii=False)).get_vocab()
    except Exception as error:
        raise RecipeError(
            f"the tokenizers do not fit together: {error}", where=str(folder)
        ) from error
    wanted = _ids(data)
    if read != wanted:
        wrong = sorted(t for t in read.keys() | wanted.keys() if read.get(t) != wanted.get(t))
        raise RecipeError(
            f"the tokenizers library numbers {len(wrong)} tokens otherwise, first"
            f" {quoted(wrong[0])!r}: {read.get(wrong[0])} for {wanted.get(wrong[0])}",
            where=str(folder),
            todo="save the base's tokenizer again with Transformers, so that its numbers are dense",
        )
