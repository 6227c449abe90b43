"""The output's tokenizer, and which row of each model belongs to which of its tokens.

What the output's tokens are is worked out in `tokenizer_json`, what the rows of its embeddings are
made of here, as arrays over the whole vocabulary (see `rowmap`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine.errors import RecipeError, quoted
from optimer_engine.mergekit.config import Tokenizer, TokenRow
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.mergekit.rowmap import MEAN, PADDING, ZERO, RowMap
from optimer_engine.mergekit.tokenizer_json import (
    TOKENIZER_FILES,
    TokenizerFile,
    plain_token,
    stripped,
    token_numbers,
    union,
    with_tokens,
    written_files,
)


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
    read: dict[bytes, TokenizerFile] = {}  # most have the very file of others, a large one
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
        vocabularies[number] = TokenizerFile.read(folder, vocab_sizes[number], read)
    kept = vocabularies[base]
    data = kept.data
    folder = kept.folder
    if isinstance(asked.source, ModelRef):
        folder = folders[asked.source]
        data = TokenizerFile.read(folder, None).data
    else:
        data = stripped(kept)
        if asked.source == "union":
            data = union(data, [vocabularies[number] for number in order], warnings)
    data = with_tokens(data, [plain_token(token) for token in asked.tokens])
    files = written_files(folder, data)
    ids = token_numbers(data)
    size = max(ids.values(), default=-1) + 1
    tokens: list[str | None] = [None] * size
    for token, number in ids.items():
        tokens[number] = token
    multiple = asked.pad_to_multiple_of or 1
    rows = -(-size // multiple) * multiple
    return TokenizerPlan(tokens, rows, vocabularies, asked.tokens, models, files, warnings)


def changed_files(
    folder: Path, files: Mapping[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Of tokenizer files: those that differ from a folder's, and its own that are none of them.

    Without `files` the folder's are kept: ({}, ()).
    """
    present = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    same = {name for name, path in present.items() if files.get(name) == path.read_bytes()}
    omitted = tuple(sorted(present.keys() - files.keys())) if files else ()
    return {name: data for name, data in files.items() if name not in same}, omitted


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """What config.json says of the number of rows, at its top or of its language model."""
    inner = config.get("text_config")
    for level in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(level.get("vocab_size"), int):
            return level["vocab_size"]
    return None
