"""One tile's operands on their way into a GPU's memory, in the smallest form there is.

What crosses the bus is what lies in the file. A plain tensor's bytes are copied as they are; an
int8 or int4 vector stays packed and is decoded in the registers of the merge; an exact vector is
unpacked on the GPU from its stream; a low-rank vector sends its factors, and their product is
formed there. Other forms (resized vocabularies, scaled fp8, adapters upon models) are computed in
main memory as ever and sent as numbers: correct, with more bytes on the bus.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from optimer_engine import methods
from optimer_engine.adapter import LowRank
from optimer_engine.operands import Operand, Stored, as_float
from optimer_engine.runs import Run
from optimer_engine.types import DType
from optimer_engine.vectors.tensors import ExactTensor, QuantisedTensor

if TYPE_CHECKING:
    from optimer_engine.device import Lane

_FACTORS = (DType.BF16, DType.F16, DType.F32)


class Given(NamedTuple):
    """One operand of a launch.

    Attributes:
        data: on the GPU, flat; for `packed` a pair (numbers, bf16 scales).
        dtype: of the numbers, fp32 for packed ones.
        packed: bits of a number of an int8 or int4 vector, otherwise 0.
    """

    data: Any
    dtype: DType
    is_delta: bool
    packed: int = 0


class Adapter(NamedTuple):
    """Factors on the GPU: scale * left [rows, r] @ right [r, columns]."""

    left: Any
    right: Any
    dtype: DType
    scale: float


class Loading:
    """Reads elements start..stop of a run's operands and begins to copy them.

    Attributes:
        read_bytes: what was read.
    """

    def __init__(self, lane: Lane, run: Run, start: int, stop: int) -> None:
        self.lane, self.run, self.start, self.stop = lane, run, start, stop
        self.read_bytes = 0
        self._base: Given | None = None
        self._base_on_host: np.ndarray | None = None

    def tiles(self, fused: bool) -> list[Given]:
        """All operands, the base first; `fused`: for a kernel that takes packed ones."""
        found: list[Given] = []
        for place, operand in enumerate(self.run.operands):
            found.append(self._tile(place, operand, fused))
            if place == 0 and self.run.base is not None:
                self._base = found[0]
        return found

    def adapters(self) -> tuple[Given, list[Adapter]] | None:
        """The base and the factors of every source; None unless all are of low rank, in whole rows.

        The product can then be added to the base in the kernel that forms it.
        """
        sources = [source for _, source in self.run.sources if isinstance(source, LowRank)]
        if not sources or len(sources) < len(self.run.sources) or self.run.base is None:
            return None
        columns = max(1, sources[0].shape[1])
        if self.start % columns or self.stop % columns:
            return None
        found = []
        for place, source in enumerate(sources, start=1):
            adapter = self._adapter(place, source, self.start // columns, self.stop // columns)
            if adapter is None:
                return None
            found.append(adapter)
        return self._tile(0, self.run.base, fused=True), found

    def _tile(self, place: int, operand: Operand, fused: bool) -> Given:
        if isinstance(operand, LowRank):
            product = self._product(place, operand)
            if product is not None:
                return product
        key = (*_identity(operand, self.start), self.stop - self.start, fused)
        kept: Given | None = self.lane.resident.get(key)
        if kept is not None:
            return kept
        pair = isinstance(operand, QuantisedTensor) and self._pair(place, operand, key, fused)
        if pair:
            return pair
        size = (self.stop - self.start) * operand.dtype.itemsize
        stays, room = self._room(place, size)
        given = Given(self.lane.backend.typed(room, operand.dtype), operand.dtype, operand.is_delta)
        direct = isinstance(operand, Stored) and self._read_direct(operand, room)
        unpacked = isinstance(operand, ExactTensor) and self._unpack(place, operand, given)
        if not (direct or unpacked):
            self._copy(place, operand, room)
        self._keep(stays, key, given, operand)
        return given

    def _room(self, place: int, size: int) -> tuple[bool, Any]:
        """Bytes on the GPU for an operand; whether they are its own for good."""
        stays = self.lane.resident.reserve(size)
        return stays, self.lane.backend.empty(size) if stays else self.lane.buffers[place][:size]

    def _keep(self, stays: bool, key: tuple[Any, ...], given: Given, operand: Operand) -> None:
        if stays:
            self.lane.wait(self.run, self.start, self.stop)  # before other streams may find it
            self.lane.resident.keep(key, given, operand)

    def _upload(self, source: np.ndarray, target: Any) -> None:
        self.lane.backend.upload(self.lane.stream, source, target)
        self.read_bytes += source.nbytes

    def _copy(self, place: int, operand: Operand, room: Any) -> None:
        """Read in main memory, then copy."""
        base = None
        if place and not isinstance(operand, Stored):
            base = self._base_in_main_memory()
        buffer = self.lane.host[place]
        read = operand.read(self.start, self.stop, buffer, base)
        host = buffer[: read.nbytes]
        if read.ctypes.data != host.ctypes.data:  # a view of a mapped file
            host.view(read.dtype)[:] = read
        self._upload(host, room)
        if place == 0:
            self._base_on_host = host.view(read.dtype)

    def _base_in_main_memory(self) -> np.ndarray | None:
        base = self.run.base
        if base is not None and self._base_on_host is None:  # it is on the GPU alone
            self._base_on_host = base.read(self.start, self.stop, self.lane.host[0], None)
        return self._base_on_host

    def _read_direct(self, operand: Stored, room: Any) -> bool:
        path = operand.checkpoint.files[operand.file].path
        offset = operand.offset + self.start * operand.dtype.itemsize
        if not self.lane.backend.read_direct(Path(path), offset, room):
            return False
        self.read_bytes += len(room)
        return True

    def _unpack(self, place: int, operand: ExactTensor, given: Given) -> bool:
        """Copy an exact vector's chunks and unpack them there; False where tiles cut them."""
        base, lane = self._base, self.lane
        if base is None or base.packed or base.dtype is not operand.base_dtype:
            return False
        found = operand.chunks(self.start, self.stop, lane.host[place])
        if found is None or operand.dtype.itemsize == 1:
            return False
        stream_bytes, both = found
        room = lane.scratch()[: len(both)]
        self._upload(both, room)
        flag = lane.launch(
            lane.backend.unpack, room[:stream_bytes],
            lane.backend.typed(room[stream_bytes:], DType.I64), base.data, base.dtype, given.data,
            given.dtype,
        )  # fmt: skip
        lane.doubts.append((flag, operand))
        return True

    def _pair(
        self, place: int, operand: QuantisedTensor, key: tuple[Any, ...], fused: bool
    ) -> Given | None:
        """An int8 or int4 vector's numbers and scales; decoded at once where they must be."""
        lane, backend = self.lane, self.lane.backend
        found = operand.groups(self.start, self.stop, lane.host[place])
        if found is None:
            return None
        number_bytes, both = found
        stays, room = self._room(place, len(both)) if fused else (False, lane.scratch())
        self._upload(both, room[: len(both)])
        numbers = backend.typed(room[:number_bytes], DType.I8 if operand.bits == 8 else DType.U8)
        scales = backend.typed(room[number_bytes : len(both)], DType.BF16)
        given = Given((numbers, scales), DType.F32, True, operand.bits)
        if not fused:
            stays, decoded = self._room(place, 4 * (self.stop - self.start))
            out = backend.typed(decoded, DType.F32)
            lane.launch(backend.linear, Given(out, DType.F32, False), [given], [1.0], out,
                        DType.F32, False)  # fmt: skip
            given = Given(out, DType.F32, True)
        self._keep(stays, key, given, operand)
        return given

    def _product(self, place: int, operand: LowRank) -> Given | None:
        """A low-rank delta in fp32, formed on the GPU; None where its rank is too high for it."""
        lane, columns = self.lane, max(1, operand.shape[1])
        first, last = self.start // columns, -(-self.stop // columns)
        adapter = self._adapter(place, operand, first, last)
        if adapter is None:
            return None
        size = 4 * (last - first) * columns
        fits = size <= len(lane.buffers[place])
        room = lane.buffers[place][:size] if fits else lane.room(size)
        out = lane.backend.typed(room, DType.F32)
        shape = last - first, columns
        lane.launch(lane.backend.low_rank, None, shape, [adapter], [1.0], out, DType.F32)
        skip = self.start - first * columns
        return Given(out[skip : skip + self.stop - self.start], DType.F32, True)

    def _adapter(self, place: int, operand: LowRank, first: int, last: int) -> Adapter | None:
        """Rows first..last of the left factor, and the right one, which stays for its tensor."""
        rank = operand.left.shape[1]
        if rank > self.lane.backend.max_rank:
            return None
        dtypes = {operand.left_dtype, operand.right.dtype}
        dtype = dtypes.pop() if len(dtypes) == 1 else DType.F32
        if dtype not in _FACTORS:
            dtype = DType.F32
        left = self._factor(operand.left[first:last], operand.left_dtype, dtype)
        known, right = self.lane.rights.get(place, (None, None))
        if known is not operand:
            right = self._factor(np.asarray(operand.right.stored), operand.right.dtype, dtype)
            self.lane.rights[place] = operand, right
        return Adapter(left, right, dtype, operand.scale)

    def _factor(self, stored: np.ndarray, dtype: DType, wanted: DType) -> Any:
        values = as_float(stored, dtype) if dtype is not wanted else stored
        source = np.array(values, order="C").reshape(-1).view(np.uint8)
        room = self.lane.room(source.nbytes)
        self._upload(source, room)
        return self.lane.backend.typed(room, wanted).reshape(stored.shape)


def as_tile(run: Run, start: int, stop: int, given: list[Given]) -> methods.Tile:
    """The operands as a method takes them."""
    operands = [methods.Operand(g.data, g.dtype, g.is_delta) for g in given]
    base = operands.pop(0) if run.base is not None else None
    return methods.Tile(run.recipe, start, stop, base, tuple(operands))


def _identity(operand: Operand, start: int) -> tuple[Any, ...]:
    """What makes two operands of two plans the same elements."""
    if isinstance(operand, Stored):  # made anew for each plan, of checkpoints that stay open
        offset = operand.offset + start * operand.dtype.itemsize
        return id(operand.checkpoint), operand.file, offset
    return id(operand), start
