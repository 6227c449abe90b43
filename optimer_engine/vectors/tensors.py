"""A vector's tensors as operands: any range of elements, decoded into the caller's buffer.

Reading takes one pread of the bytes needed and one call that decodes them without the GIL; buffers
for packed bytes belong to the thread and are reused. What lies in a stream is checked while it is
decoded, so a damaged one gives an error that names file and tensor. What the headers say was
checked when the vector was opened, see `reading`.
"""

from __future__ import annotations

import threading
from typing import NoReturn

import numpy as np

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import CheckpointError, MismatchError, quoted
from optimer_engine.kernels.packed import (
    SCRATCH_BYTES,
    SLACK_BYTES,
    dequantise,
    unpack_exact,
)
from optimer_engine.kernels.reference_packed import BLOCK, CHUNK, GROUP, HEADER_BYTES, SAME
from optimer_engine.operands import Operand, Place
from optimer_engine.types import DType, TensorInfo
from optimer_engine.vectors.format import CODES, Description


class Packed:
    """An opened vector.

    Attributes:
        checkpoint: its files.
        tensors: an operand for each tensor, by the base's names, in file order.
        mode: how most of it is stored, as its header says.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.mode = checkpoint.metadata.get("vector_mode", "plain")
        self.tensors: dict[str, Operand] = {}
        self._local = threading.local()

    def scratch(self, size: int, use: str = "packed") -> np.ndarray:
        """This thread's buffer for `use`, at least `size` bytes (uint8), from its last use."""
        held: np.ndarray | None = getattr(self._local, use, None)
        if held is None or held.size < size:
            # Room to grow: new buffers would touch fresh pages again and again.
            held = np.zeros(size + size // 4, np.uint8)
            setattr(self._local, use, held)
        return held

    def check_base(self, base: Checkpoint) -> None:
        """Raises MismatchError unless this is a vector of `base`, tensor by tensor."""
        problems = []
        if self.checkpoint.base_fingerprint != base.fingerprint:
            problems.append(
                f"it was taken from {quoted(self.checkpoint.base_fingerprint)[:16]}, this base is"
                f" {base.fingerprint[:16]}"
            )
        for name, tensor in self.tensors.items():
            info = base.tensors.get(name)
            if info is None or info.shape != tensor.shape:
                found = "lacks it" if info is None else f"has {list(info.shape)}"
                problems.append(f"{quoted(name)} {list(tensor.shape)}: the base {found}")
            elif isinstance(tensor, ExactTensor) and tensor.base_dtype is not info.dtype:
                problems.append(f"{quoted(name)}: the base is now {info.dtype.code}")
        lacking = [i.name for i in base.tensors.values() if i.dtype in CODES]
        problems += [f"lacks {quoted(name)}" for name in lacking if name not in self.tensors]
        if problems:
            more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise MismatchError(
                "does not fit the base:\n  - " + "\n  - ".join(problems[:20]) + more,
                where=str(self.checkpoint.folder),
                todo="use the base that the vector was made from",
            )


class ExactTensor:
    """A trained tensor, restored to the bit from the base's elements and their distances."""

    is_delta = False

    def __init__(
        self, packed: Packed, name: str, said: Description, stream: TensorInfo, index: np.ndarray
    ) -> None:
        self.packed, self.name, self.shape = packed, name, said.shape
        self.dtype, self.base_dtype, self.elems = said.dtype, said.base_dtype, said.elems
        self.stream, self.index = stream, index
        self.read_bytes_per_elem = stream.nbytes / max(1, said.elems)
        self.reads = ((packed.checkpoint, stream.file),)

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """The trained model's elements start..stop; see `operands.Operand`.

        Raises:
            CheckpointError: a stream that is not as it must be, or cannot be read.
            MismatchError: without the base's elements.
        """
        size, count = self.dtype.itemsize, stop - start
        out = buffer[: count * size]
        if not count:
            return out.view(self.dtype.storage)
        base = self._checked(base, count)
        first = start // CHUNK
        ends = self.index[first : -(-stop // CHUNK) + 1]
        nbytes = int(ends[-1] - ends[0])
        scratch = self.packed.scratch(SCRATCH_BYTES + nbytes + SLACK_BYTES)
        data = scratch[SCRATCH_BYTES : SCRATCH_BYTES + nbytes]
        begin = self.stream.offset + int(ends[0])
        self.packed.checkpoint.read_into(self.stream.file, begin, data.data)
        sizes = np.diff(ends)
        failed = unpack_exact(size, *codes(self.dtype, self.base_dtype))(
            data.ctypes.data,
            sizes.ctypes.data,
            start - first * CHUNK,
            self.elems - first * CHUNK,
            count,
            base.ctypes.data,
            out.ctypes.data,
            scratch.ctypes.data,
        )
        if failed:
            number = first * (CHUNK // BLOCK) + failed - 1
            refuse(self.packed.checkpoint, self.stream, self.name, f"block {number} is damaged")
        return out.view(self.dtype.storage)

    def chunks(self, start: int, stop: int, buffer: np.ndarray) -> tuple[int, np.ndarray] | None:
        """Elements start..stop as they are packed, for a GPU to unpack.

        Args:
            buffer: uint8, aligned to 8 bytes; holds the result.

        Returns:
            (bytes of the stream, these bytes and behind them the index as int64: where each chunk
            begins and the last ends); None where a chunk is cut or the buffer is too small.
        """
        first, cut = divmod(start, CHUNK)
        if cut or (stop % CHUNK and stop != self.elems):
            return None
        ends = self.index[first : -(-stop // CHUNK) + 1]
        nbytes = int(ends[-1] - ends[0])
        if nbytes + ends.nbytes > len(buffer):
            return None
        begin = self.stream.offset + int(ends[0])
        self.packed.checkpoint.read_into(self.stream.file, begin, buffer[:nbytes].data)
        buffer[nbytes : nbytes + ends.nbytes] = ends.view(np.uint8)
        return nbytes, buffer[: nbytes + ends.nbytes]

    def places(self, start: int) -> list[Place]:
        """See `operands.Placed`."""
        offset = self.stream.offset + int(self.index[start // CHUNK])
        return [(self.packed.checkpoint, self.stream.file, offset)]

    def _checked(self, base: np.ndarray | None, count: int) -> np.ndarray:
        wanted = count * self.base_dtype.itemsize
        if base is None or base.nbytes != wanted or not base.flags.c_contiguous:
            found = "none" if base is None else f"{base.nbytes} bytes"
            raise MismatchError(
                f"{quoted(self.name)} is stored as distances from {count} elements of"
                f" {self.base_dtype.code}, {found} were given",
                where=str(self.packed.checkpoint.folder),
                todo="read it together with the base that it was packed from",
            )
        return base

    def scratch_bytes(self, elems: int) -> int:
        """The packed bytes of so many elements and the chunk that the first lies in, at most."""
        blocks = -(-elems // CHUNK) * (CHUNK // BLOCK) + CHUNK // BLOCK
        most = SCRATCH_BYTES + SLACK_BYTES + blocks * (HEADER_BYTES + BLOCK * self.dtype.itemsize)
        return most + most // 4


class QuantisedTensor:
    """A delta in int8 or int4 with a scale for every 64 elements; read as fp32."""

    dtype, is_delta = DType.F32, True

    def __init__(
        self, packed: Packed, name: str, said: Description, q: TensorInfo, scale: TensorInfo
    ) -> None:
        self.packed, self.name, self.shape, self.elems = packed, name, said.shape, said.elems
        self.bits, self.q, self.scale = (8 if said.mode == "int8" else 4), q, scale
        self.read_bytes_per_elem = (q.nbytes + scale.nbytes) / max(1, said.elems)
        self.reads = ((packed.checkpoint, q.file), (packed.checkpoint, scale.file))

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """fp32 deltas start..stop; see `operands.Operand`."""
        count = stop - start
        out = buffer[: count * 4].view(np.float32)
        if not count:
            return out
        first, last = start // GROUP, -(-stop // GROUP)
        scratch = self.packed.scratch((GROUP * self.bits // 8 + 2) * (last - first))
        q, scales = self._load(first, last, scratch)
        dequantise(self.bits)(
            q.ctypes.data, scales.ctypes.data, start - first * GROUP, count, out.ctypes.data
        )
        return out

    def groups(self, start: int, stop: int, buffer: np.ndarray) -> tuple[int, np.ndarray] | None:
        """Elements start..stop as they are packed, for a GPU to decode.

        Args:
            buffer: uint8; holds the result.

        Returns:
            (bytes of the numbers, these bytes and behind them the bf16 scales); None where a group
            is cut at the start.
        """
        first, cut = divmod(start, GROUP)
        if cut:
            return None
        q, scales = self._load(first, -(-stop // GROUP), buffer)
        return q.size, buffer[: q.size + scales.size]

    def places(self, start: int) -> list[Place]:
        """See `operands.Placed`; the scales lie behind all the numbers and are few."""
        offset = self.q.offset + start // GROUP * (GROUP * self.bits // 8)
        return [(self.packed.checkpoint, self.q.file, offset)]

    def _load(self, first: int, last: int, buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and scales of groups first..last, as bytes one behind the other."""
        group_bytes, count = GROUP * self.bits // 8, last - first
        q, scales = np.split(buffer[: (group_bytes + 2) * count], [group_bytes * count])
        read = self.packed.checkpoint.read_into
        read(self.q.file, self.q.offset + group_bytes * first, q.data)
        read(self.scale.file, self.scale.offset + 2 * first, scales.data)
        return q, scales

    def scratch_bytes(self, elems: int) -> int:
        """The packed bytes of so many elements, and of the groups cut at both ends."""
        groups = -(-elems // GROUP) + 1
        most = groups * (GROUP * self.bits // 8 + 2)
        return most + most // 4


class ZeroTensor:
    """A delta that is 0 everywhere: a frozen tensor."""

    dtype, is_delta, read_bytes_per_elem = DType.F32, True, 0.0
    reads: tuple[tuple[Checkpoint, int], ...] = ()

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """Zeros; see `operands.Operand`."""
        out = buffer[: (stop - start) * 4].view(np.float32)
        out[:] = 0
        return out

    def scratch_bytes(self, elems: int) -> int:
        """None."""
        return 0


def group_count(elems: int) -> int:
    """Groups of int8 and int4, filled up to whole multiples of 8 bytes of scales."""
    return -(-elems // (4 * GROUP)) * 4


def codes(dtype: DType, base: DType) -> tuple[int, int]:
    """The kernels' codes of the base's dtype and of the trained one."""
    if base is dtype:
        return SAME, 0
    return CODES.index(base), CODES.index(dtype)


def refuse(checkpoint: Checkpoint, info: TensorInfo, name: str, what: str) -> NoReturn:
    """Raise CheckpointError: tensor `name` is not as it must be in the file of its part `info`."""
    raise CheckpointError(
        f"{quoted(name)}: {what}",
        where=str(checkpoint.files[info.file].path),
        todo="copy or pack the vector again",
    )
