"""What the engine reads: one input of one output tensor, as a flat range of elements.

An operand knows where its numbers come from; the engine only asks for elements start..stop. The
plain case is a tensor as it lies in a file. Others compute their elements tile by tile and never as
a whole: see `adapter` for LoRA.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from optimer_engine.errors import MismatchError
from optimer_engine.types import FP8, DType, TensorInfo

if TYPE_CHECKING:
    from optimer_engine.checkpoint import Checkpoint


class Operand(Protocol):
    """One input tensor, or a run of tensors that adjoin in its file."""

    @property
    def dtype(self) -> DType:
        """Of the elements that `read` gives."""
        ...

    @property
    def is_delta(self) -> bool:
        """Whether they are a distribution vector's (tau) or a model's (theta)."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor; of the first one, for a run."""
        ...

    @property
    def reads(self) -> tuple[tuple[Checkpoint, int], ...]:
        """The files, as checkpoint and number, that must be here before `read` is called."""
        ...

    @property
    def read_bytes_per_elem(self) -> float:
        """Bytes of the source behind one element, for projections."""

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """Elements start..stop, flat, in `dtype.storage`.

        Args:
            buffer: uint8 scratch of at least (stop - start) * dtype.itemsize bytes, which the
                result may use; the result is valid until the buffer's next use.
            base: the base's elements of the same range, for formats that store a distance to it.
        """
        ...

    def scratch_bytes(self, elems: int) -> int:
        """Memory that reading `elems` elements takes beside the buffer."""
        ...


Place = tuple["Checkpoint", int, int]
"""Checkpoint, number of a file, offset in it."""


@runtime_checkable
class Placed(Protocol):
    """An operand of which it is known how far its files have been read."""

    def places(self, start: int) -> list[Place]:
        """Where `read` has nothing more to fetch once it is done with the elements before start."""
        ...


class Stored:
    """Elements as they lie in a file, from byte `offset` of file number `file`."""

    __slots__ = (
        "checkpoint", "dtype", "file", "is_delta", "offset", "read_bytes_per_elem", "shape",
    )  # fmt: skip

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo, is_delta: bool) -> None:
        self.checkpoint, self.file, self.offset = checkpoint, info.file, info.offset
        self.dtype, self.is_delta, self.shape = info.dtype, is_delta, info.shape
        self.read_bytes_per_elem: float = info.dtype.itemsize

    @property
    def reads(self) -> tuple[tuple[Checkpoint, int], ...]:
        """Its file."""
        return ((self.checkpoint, self.file),)

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """See `Operand`; raises CheckpointError when the file fails or ends early."""
        size = self.dtype.itemsize
        return self.checkpoint.read_elems(
            self.file, self.offset + start * size, (stop - start) * size, buffer
        ).view(self.dtype.storage)

    def places(self, start: int) -> list[Place]:
        """See `Placed`."""
        return [(self.checkpoint, self.file, self.offset + start * self.dtype.itemsize)]

    def scratch_bytes(self, elems: int) -> int:
        """None."""
        return 0


def as_float(stored: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers of stored elements as fp32: exactly, but for fp64, which is rounded.

    Raises:
        MismatchError: for dtypes that are not numbers to compute with.
    """
    if dtype is DType.BF16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype is DType.F16:
        return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)
    if dtype in (DType.F32, DType.F64):
        return stored.astype(np.float32)
    if dtype in FP8:
        return fp8_values(dtype)[stored]
    raise MismatchError(f"{dtype.code} cannot be added to; floating point expected", where="tensor")


@cache
def fp8_values(dtype: DType) -> np.ndarray:
    """fp32 [256]: the number of every bit pattern (Micikevicius et al., arXiv 2209.05433)."""
    mantissa_bits, bias = (3, 7) if dtype is DType.F8_E4M3 else (2, 15)
    bits = np.arange(256)
    exponent = (bits & 0x7F) >> mantissa_bits
    mantissa = (bits & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    scale = np.exp2(np.maximum(exponent, 1).astype(np.float64) - bias)
    values = np.where(exponent > 0, 1 + mantissa, mantissa) * scale
    if dtype is DType.F8_E4M3:
        values[(bits & 0x7F) == 0x7F] = np.nan
    else:
        values[(bits & 0x7F) == 0x7C] = np.inf
        values[(bits & 0x7F) > 0x7C] = np.nan
    return np.where(bits < 128, values, -values).astype(np.float32)
