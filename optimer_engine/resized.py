"""Embeddings whose vocabularies differ in size: one input, read as if it had other rows."""

from __future__ import annotations

import numpy as np

from optimer_engine.operands import Operand, as_float
from optimer_engine.types import DType


class Resized:
    """An operand of more or fewer rows than the tensor it reads.

    Rows past the tensor's end are another operand's, or, without one, those that leave the merge
    as it is: the base's for a model, zeros for a delta.

    Args:
        tensor: what is stored.
        rows: of the result; other dimensions stay.
        beyond: operand of at least that many rows, in place of the base's.
        base_dtype: of the base, whose rows may be needed.
    """

    note = "other rows than stored"

    def __init__(
        self, tensor: Operand, rows: int, base_dtype: DType, beyond: Operand | None = None
    ) -> None:
        self.tensor, self.beyond, self.base_dtype = tensor, beyond, base_dtype
        self.shape = (rows, *tensor.shape[1:])
        self.width = int(np.prod(tensor.shape[1:], dtype=np.int64))
        self.is_delta = tensor.is_delta
        self.filler = beyond.dtype if beyond is not None else base_dtype
        self.dtype = tensor.dtype if tensor.dtype == self.filler or self.is_delta else DType.F32
        self.read_bytes_per_elem = tensor.read_bytes_per_elem
        self.reads = (*tensor.reads, *(beyond.reads if beyond is not None else ()))

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """Elements start..stop; see `operands.Operand`."""
        out = buffer[: (stop - start) * self.dtype.itemsize].view(self.dtype.storage)
        end = min(max(start, self.tensor.shape[0] * self.width), stop)
        if start < end:
            own = None if base is None else base[: end - start]
            scratch = np.empty((end - start) * self.tensor.dtype.itemsize, np.uint8)
            stored = self.tensor.read(start, end, scratch, own)
            out[: end - start] = self._converted(stored, self.tensor.dtype)
        if end < stop:
            out[end - start :] = self._beyond(end, stop, start, base)
        return out

    def _beyond(self, end: int, stop: int, start: int, base: np.ndarray | None) -> np.ndarray | int:
        if self.beyond is not None:
            scratch = np.empty((stop - end) * self.beyond.dtype.itemsize, np.uint8)
            return self._converted(self.beyond.read(end, stop, scratch, None), self.beyond.dtype)
        if self.is_delta:
            return 0
        assert base is not None
        return self._converted(base[end - start :], self.base_dtype)

    def _converted(self, stored: np.ndarray, dtype: DType) -> np.ndarray:
        return stored if dtype == self.dtype else as_float(stored, dtype)

    def scratch_bytes(self, elems: int) -> int:
        """The tile as stored, and converted."""
        wide = self.tensor.dtype.itemsize + self.filler.itemsize + 8
        return elems * wide + self.tensor.scratch_bytes(elems)
