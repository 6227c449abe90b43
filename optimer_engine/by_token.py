"""Embeddings and output heads of other vocabularies, aligned row by row by what the rows stand for.

The tokens and the rows of each model are those that mergekit files get for `tokenizer_source`
(`mergekit.tokenizer`, `mergekit.rowmap`): the output keeps the base's tokens under their numbers
and, unless the base's alone are wanted, appends those that only sources have. A source that lacks
a token is taken to have the base's row for it, so its delta is zero there; where the base lacks it
the row of the only source that has it stands in, or the mean of those that have it. Rows of the
base that no token has, such as padding, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import RecipeError
from optimer_engine.mergekit import GatheredRows, RowMap
from optimer_engine.mergekit.config import Tokenizer
from optimer_engine.mergekit.reference import ModelRef
from optimer_engine.mergekit.rowmap import PADDING, ZERO
from optimer_engine.mergekit.tokenizer import build_tokenizer, changed_files, vocab_size
from optimer_engine.operands import Operand


class ByToken:
    """The output's vocabulary, and every input's rows in its order.

    Args:
        inputs: the base, then each source that has rows of its own; None for the others, whose
            rows are the base's: vectors, and most adapters.

    Attributes:
        files: tokenizer files to write in place of the base's; `omitted` are not to be copied.
        warnings: what was noticed.

    Raises:
        CheckpointError, RecipeError: a tokenizer is missing, or they cannot be put together.
    """

    def __init__(
        self, inputs: Sequence[Checkpoint | None], vocabulary: Literal["union", "base"]
    ) -> None:
        opened = {number: c for number, c in enumerate(inputs) if c is not None}
        self.place = {number: at for at, number in enumerate(opened)}
        models = tuple(ModelRef(str(checkpoint.folder)) for checkpoint in opened.values())
        self.plan = build_tokenizer(
            Tokenizer(vocabulary, {}, None),
            models,
            0,
            {m: c.folder for m, c in zip(models, opened.values(), strict=True)},
            [vocab_size(checkpoint.config) for checkpoint in opened.values()],
        )
        self.files, self.omitted = changed_files(opened[0].folder, self.plan.files)
        self.warnings = self.plan.warnings

    def aligned(
        self, operands: Sequence[Operand | None]
    ) -> tuple[tuple[int, ...], list[Operand | None]]:
        """The output's shape, and the operands (the base's first) as if all had it.

        Raises:
            RecipeError: for a vector that is stored as distances to rows that move.
        """
        base = operands[0]
        assert base is not None
        models = {
            self.place[number]: operand
            for number, operand in enumerate(operands)
            if operand is not None and not operand.is_delta and number in self.place
        }
        rows = {at: operand.shape[0] for at, operand in models.items()}
        found = self._with_padding(self.plan.row_map(tuple(models), 0, rows), rows)
        shape = (found.rows, *base.shape[1:])
        if set(rows.values()) == {found.rows} and found.is_identity(found.rows):
            return shape, list(operands)
        made: list[Operand | None] = []
        for number, operand in enumerate(operands):
            if operand is None:
                made.append(None)
            elif operand.is_delta:
                made.append(_delta_rows(found, operand))
            elif number in self.place:
                at = self.place[number]
                made.append(GatheredRows(found, at, {n: models[n] for n in found.readers(at)}))
            else:
                raise RecipeError(
                    "an exact vector is stored as distances to the base's rows, which move here",
                    where=f"rows: by_token, source {number}",
                    todo="unpack it first (optimer unpack), and give the model",
                )
        return shape, made

    def _with_padding(self, row_map: RowMap, rows: Mapping[int, int]) -> RowMap:
        """With all rows of the base: those that stand for no token are the same in all models."""
        more = max(0, rows[0] - row_map.rows)
        own = {n: np.pad(each, (0, more), constant_values=-1) for n, each in row_map.own.items()}
        donor = np.pad(row_map.donor, (0, more), constant_values=PADDING)
        donor_row = np.pad(row_map.donor_row, (0, more))
        unnamed = np.flatnonzero(donor == PADDING)
        for number, each in own.items():
            tokens = np.fromiter(self.plan.vocabularies[number].ids.values(), np.int64)
            free = unnamed[(unnamed < rows[number]) & ~np.isin(unnamed, tokens)]
            each[free] = free
        donor[unnamed], donor_row[unnamed] = 0, unnamed
        return RowMap(len(donor), own, donor, donor_row)


def _delta_rows(found: RowMap, delta: Operand) -> Operand:
    """A delta to the base's rows, in the output's order; zero for tokens that the base lacks."""
    own = found.own[0]
    if np.array_equal(own, np.arange(delta.shape[0])):
        return delta
    zeros = np.full(found.rows, ZERO, np.int64)
    return GatheredRows(RowMap(found.rows, {0: own}, zeros, zeros), 0, {0: delta})
