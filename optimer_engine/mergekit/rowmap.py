"""Rows of an embedding matrix in the order of another vocabulary, gathered as they are needed.

An output row is a token. A model that has the token contributes its own row of it; one that lacks
it contributes a stand-in, chosen for each token once: another model's row, zeros, or the mean of
the rows of all models that have it. Rows past the last token (a padded vocabulary) are the mean of
the model's rows for tokens. The matrix is never built: `RowMap.gather` gives any stretch of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from optimer_engine.operands import Operand
from optimer_engine.types import DType

ZERO, MEAN, PADDING = -1, -2, -3
"""Stand-ins that are no model's row; see `RowMap.donor`."""

BLOCK_ROWS = 1024
"""Rows summed at a time for the mean of all rows."""

ReadRows = Callable[[int, np.ndarray], np.ndarray]
"""read(model, rows) -> [len(rows), width]: rows (int64, any order) of the model's own matrix."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """What every row of an output matrix is made of.

    Attributes:
        rows: of the output.
        own: for each model (number of its checkpoint), int64 [rows]: the row of its own matrix, or
            -1 where it lacks the token or the stand-in was asked for by force.
        donor: int64 [rows]: the stand-in, a model's number, or ZERO, MEAN, PADDING.
        donor_row: int64 [rows]: the row of the donor's matrix, where the donor is a model.
    """

    rows: int
    own: Mapping[int, np.ndarray]
    donor: np.ndarray
    donor_row: np.ndarray

    def is_identity(self, rows: int) -> bool:
        """Whether every model's matrix, of `rows` rows, is used as it is."""
        return self.rows == rows and all(
            np.array_equal(own, np.arange(rows)) for own in self.own.values()
        )

    def is_exact(self, model: int) -> bool:
        """Whether all rows of a model's operand are copies (no mean is taken)."""
        return not np.any((self.own[model] < 0) & (self.donor <= MEAN))

    def readers(self, model: int) -> set[int]:
        """The models whose rows a model's operand needs."""
        absent = self.own[model] < 0
        needed = set(np.unique(self.donor[absent & (self.donor >= 0)]).tolist())
        if not self.is_exact(model):
            needed |= set(self.own)
        return {model} | needed

    def gather(
        self, model: int, start: int, stop: int, read: ReadRows, padding: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows start..stop of a model's operand.

        Args:
            read: gives stored rows; their dtype is the result's, and must be a float where
                `is_exact` is false.
            padding: the row for PADDING, from `mean_row`; needed where there is one.

        Returns:
            [stop - start, width]; means are taken in fp64 and rounded once.
        """
        part = slice(start, stop)
        own, donor, row = self.own[model][part], self.donor[part], self.donor_row[part]
        present = own >= 0
        first = read(model, own[present])
        out = np.zeros((stop - start, first.shape[1]), first.dtype)
        out[present] = first
        absent = ~present
        for number in np.unique(donor[absent & (donor >= 0)]).tolist():
            chosen = absent & (donor == number)
            out[chosen] = read(number, row[chosen])
        averaged = absent & (donor == MEAN)
        if averaged.any():
            total = np.zeros((int(averaged.sum()), out.shape[1]))
            count = np.zeros((len(total), 1))
            for number, rows in self.own.items():
                there = rows[part][averaged]
                total[there >= 0] += read(number, there[there >= 0])
                count[there >= 0] += 1
            out[averaged] = total / count
        if padding is not None:
            out[absent & (donor == PADDING)] = padding
        return out

    def mean_row(self, model: int, read: ReadRows) -> np.ndarray:
        """fp64 [width]: the mean of the model's rows for tokens, which fills padding rows."""
        tokens = np.flatnonzero((self.own[model] >= 0) | (self.donor != PADDING))
        total: np.ndarray | float = 0.0
        for start in range(0, self.rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, self.rows)
            inside = tokens[(tokens >= start) & (tokens < stop)] - start
            block = self.gather(model, start, stop, read)[inside]
            total = total + block.sum(axis=0, dtype=np.float64)
        return np.asarray(total) / max(1, len(tokens))


class GatheredRows:
    """An `operands.Operand`: one model's matrix with its rows in the output's order.

    Args:
        row_map: of the tensor.
        model: the number of the model.
        matrices: an operand for each of `row_map.readers(model)`: theta, or tau where it is alone.
    """

    note = "rows by token"

    def __init__(self, row_map: RowMap, model: int, matrices: Mapping[int, Operand]) -> None:
        self.row_map, self.model, self.matrices = row_map, model, matrices
        used = {matrices[number].dtype for number in row_map.readers(model)}
        self.exact = row_map.is_exact(model) and len(used) == 1
        self.dtype, self.is_delta = matrices[model].dtype, matrices[model].is_delta
        if not self.exact:
            self.dtype = DType.F64 if DType.F64 in used else DType.F32
        tail = matrices[model].shape[1:]
        self.width = int(np.prod(tail, dtype=np.int64))
        self.shape = (row_map.rows, *tail)
        self.read_bytes_per_elem: float = matrices[model].read_bytes_per_elem
        readers = row_map.readers(model)
        self.reads = tuple(file for number in readers for file in matrices[number].reads)
        self._lock = threading.Lock()
        self._padding: np.ndarray | None = None

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """Elements start..stop; see `operands.Operand`."""
        first, last = start // self.width, -(-stop // self.width)
        rows = self.row_map.gather(self.model, first, last, self._rows, self._padding_row())
        offset = start - first * self.width
        out = buffer[: (stop - start) * self.dtype.itemsize].view(self.dtype.storage)
        out[:] = rows.reshape(-1)[offset : offset + stop - start]
        return out

    def scratch_bytes(self, elems: int) -> int:
        """The gathered rows, those of one model as stored and as numbers, and sums of a mean."""
        width = 8 if self.dtype is DType.F64 else 4
        return (elems + 2 * self.width) * (3 * width + (0 if self.exact else 16))

    def _rows(self, model: int, rows: np.ndarray) -> np.ndarray:
        matrix, width = self.matrices[model], self.width
        out = np.empty((len(rows), width), self.dtype.storage)
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        scratch = np.empty(len(rows) * width * matrix.dtype.itemsize, np.uint8)
        begin = 0
        for end in ends if len(rows) else []:
            low, high = int(rows[begin]) * width, (int(rows[end - 1]) + 1) * width
            stored = matrix.read(low, high, scratch, None)
            values = stored if self.exact else _values(stored, matrix.dtype)
            out[begin:end] = values.reshape(-1, width)
            begin = end
        return out

    def _padding_row(self) -> np.ndarray | None:
        if not np.any(self.row_map.donor == PADDING):
            return None
        with self._lock:
            if self._padding is None:
                self._padding = self.row_map.mean_row(self.model, self._rows)
        return self._padding


def _values(stored: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers of stored elements, exactly."""
    if dtype is DType.BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16) if dtype is DType.F16 else stored
