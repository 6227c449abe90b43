"""One encoder per way of storing a tensor: a tile of elements in, the bytes of its parts out.

An encoder is asked for tiles by several threads at once and placed by one at a time, in order.
Tiles are whole chunks of `exact` and whole groups of int8 and int4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from optimer_engine import ops
from optimer_engine.errors import MismatchError, NonFiniteError, quoted
from optimer_engine.kernels.packed import SCRATCH_BYTES, pack_exact, quantise
from optimer_engine.kernels.reference_packed import (
    BLOCK,
    CHUNK,
    CHUNK_BLOCKS,
    GROUP,
    HEADER_BYTES,
    block_bytes,
)
from optimer_engine.operands import Operand
from optimer_engine.packing.store import PartsFile, Published
from optimer_engine.types import DType, TensorInfo
from optimer_engine.vectors.format import Description, part_name
from optimer_engine.vectors.tensors import codes, group_count

TILE_ELEMS = 8 * CHUNK

File = PartsFile | Published
Placed = list[tuple[int, np.ndarray]]
"""Bytes and where in the file they go."""


class Hands:
    """A thread's buffers, by use; each is kept and grows to the largest size asked for."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, use: str, size: int) -> np.ndarray:
        """`size` bytes (uint8) for `use`, with the contents of their last use."""
        held = self._held.get(use)
        if held is None or held.size < size:
            held = self._held[use] = np.zeros(size, np.uint8)
        return held[:size]


class Pair(NamedTuple):
    """A tensor of the base and what came of it; `source` None where nothing did."""

    name: str
    shape: tuple[int, ...]
    elems: int
    base: Operand
    source: Operand | None

    def read(self, start: int, stop: int, hands: Hands) -> tuple[np.ndarray, np.ndarray]:
        """The stored elements of both."""
        assert self.source is not None
        count = stop - start
        base_buffer = hands.take("base", count * self.base.dtype.itemsize)
        base = self.base.read(start, stop, base_buffer, None)
        source_buffer = hands.take("source", count * self.source.dtype.itemsize)
        return base, self.source.read(start, stop, source_buffer, base)

    def delta(self, start: int, stop: int, hands: Hands, dtype: DType = DType.F32) -> np.ndarray:
        """tau in `dtype`, rounded once.

        Raises:
            NonFiniteError: where it is NaN or infinite.
        """
        out = hands.take("delta", (stop - start) * dtype.itemsize).view(dtype.storage)
        base, source = self.read(start, stop, hands)
        assert self.source is not None
        bad = ops.linear_kernel("cpu")(
            base, self.base.dtype, [source], [self.source.dtype], [self.source.is_delta], [1.0],
            out, dtype, False,
        )  # fmt: skip
        if bad:
            first = start + int(ops.nonfinite(out, dtype).argmax())
            raise NonFiniteError(
                f"{quoted(self.name)} holds NaN or infinity: first at element {first}",
                where="source",
                todo="repair it, or use mode exact, which stores any bits",
            )
        return out


class Encoder:
    """How one tensor is stored; this one stores nothing.

    Attributes:
        pair: what is stored. `tiles`: (start, stop) of the pieces it is encoded in.
        description: its line in the file's metadata; None if it needs none.
        unit: the sizes of its parts are multiples of so many bytes.
        stores: whether a tile has bytes.
    """

    description: Description | None = None
    unit = 8
    stores = False

    def __init__(self, pair: Pair) -> None:
        self.pair, self.tiles = pair, tiles_of(pair.elems)

    def encode(self, start: int, stop: int, hands: Hands) -> list[np.ndarray]:
        """The bytes of a tile, by part; they may lie in `hands`."""
        return []

    def place(self, file: File, start: int, pieces: list[np.ndarray]) -> Placed:
        """Decide where they go; called tile after tile, in order."""
        return []

    def kept(self, file: File, start: int, stop: int) -> bool:
        """Place a tile that an earlier run left in the file, in its turn; False if it did not."""
        return False

    def finish(self, file: File) -> Placed:
        """What is stored once all tensors of the file are placed."""
        return []


def tiles_of(elems: int) -> list[tuple[int, int]]:
    """The pieces of a tensor; an empty one has one empty piece."""
    starts = range(0, max(1, elems), TILE_ELEMS)
    return [(start, min(start + TILE_ELEMS, elems)) for start in starts]


class Exact(Encoder):
    """Distances from the base, see `kernels.reference_packed`."""

    stores = True

    def __init__(self, pair: Pair) -> None:
        assert pair.source is not None
        super().__init__(pair)
        dtype, base = pair.source.dtype, pair.base.dtype
        self.description = Description("exact", pair.shape, dtype, base)
        self._codes = codes(dtype, base)
        self._sizes: list[np.ndarray] = []

    def encode(self, start: int, stop: int, hands: Hands) -> list[np.ndarray]:
        """The chunks' bytes, and their sizes."""
        base, trained = self.pair.read(start, stop, hands)
        count, size = stop - start, trained.itemsize
        blocks = -(-count // BLOCK)
        out = hands.take("out", blocks * (HEADER_BYTES + BLOCK * size) + 64)
        sizes = np.zeros(-(-count // CHUNK), np.int64)
        used = pack_exact(size, *self._codes)(
            trained.ctypes.data, base.ctypes.data, count, out.ctypes.data, sizes.ctypes.data,
            hands.take("scratch", SCRATCH_BYTES).ctypes.data,
        )  # fmt: skip
        return [out[:used], sizes]

    def place(self, file: File, start: int, pieces: list[np.ndarray]) -> Placed:
        """Behind the chunks before."""
        stream, sizes = pieces
        name = part_name(self.pair.name, "stream")
        self._sizes.append(sizes)
        return [(file.layout.append(name, stream.size), stream)]

    def kept(self, file: File, start: int, stop: int) -> bool:
        """Its chunks lie where the next ones would; each block says how long it is."""
        begin, blocks = file.layout.end, -(-(stop - start) // BLOCK)
        if not file.keeps(begin, begin + blocks * HEADER_BYTES):
            return False
        assert self.description is not None
        itemsize = self.description.dtype.itemsize
        data = file.read(begin, blocks * (HEADER_BYTES + BLOCK * itemsize))
        ends = [0]
        for _ in range(blocks):
            size = block_bytes(data[ends[-1] :][:HEADER_BYTES], 8 * itemsize)
            if not size:
                return False
            ends.append(ends[-1] + size)
        if not file.keeps(begin, begin + ends[-1]):
            return False
        chunks = [*ends[:-1:CHUNK_BLOCKS], ends[-1]]
        self._sizes.append(np.diff(chunks))
        file.layout.append(part_name(self.pair.name, "stream"), ends[-1])
        return True

    def finish(self, file: File) -> Placed:
        """The index: where each chunk begins, and the end."""
        index = np.concatenate([[0], *self._sizes]).cumsum().astype("<u8")
        name = part_name(self.pair.name, "index")
        return [(file.layout.add(name, DType.U64, index.shape), index.view(np.uint8))]


class Quantised(Encoder):
    """int8 or int4 with a scale for 64 elements."""

    stores = True

    def __init__(self, pair: Pair, bits: int) -> None:
        super().__init__(pair)
        self.bits = bits
        self.description = Description(f"int{bits}", pair.shape)
        self._starts: list[int] = []

    def encode(self, start: int, stop: int, hands: Hands) -> list[np.ndarray]:
        """Quantised bytes and scales."""
        delta = self.pair.delta(start, stop, hands)
        groups = group_count(delta.size)
        q = hands.take("out", groups * GROUP * self.bits // 8)
        scales = hands.take("scales", 2 * groups)
        q[:], scales[:] = 0, 0
        quantise(self.bits)(delta.ctypes.data, delta.size, q.ctypes.data, scales.ctypes.data)
        return [q, scales]

    def place(self, file: File, start: int, pieces: list[np.ndarray]) -> Placed:
        """At their place in parts whose sizes are known."""
        return list(zip(self._offsets(file, start), pieces, strict=True))

    def kept(self, file: File, start: int, stop: int) -> bool:
        """Both pieces are where they belong."""
        groups = group_count(stop - start)
        q, scales = self._offsets(file, start)
        return file.keeps(q, q + groups * GROUP * self.bits // 8) and file.keeps(
            scales, scales + 2 * groups
        )

    def _offsets(self, file: File, start: int) -> tuple[int, int]:
        groups = group_count(self.pair.elems)
        group_bytes = GROUP * self.bits // 8
        if not self._starts:
            name = self.pair.name
            self._starts = [
                file.layout.add(part_name(name, "q"), DType.U8, (groups * group_bytes,)),
                file.layout.add(part_name(name, "scale"), DType.BF16, (groups,)),
            ]
        first = start // GROUP
        return self._starts[0] + first * group_bytes, self._starts[1] + first * 2


class Plain(Encoder):
    """The delta as it is, in fp32 or bf16."""

    stores = True

    def __init__(self, pair: Pair, dtype: DType) -> None:
        super().__init__(pair)
        self.dtype, self.unit = dtype, dtype.itemsize
        self._begin: int | None = None

    def encode(self, start: int, stop: int, hands: Hands) -> list[np.ndarray]:
        """The values' bytes."""
        return [self.pair.delta(start, stop, hands, self.dtype).view(np.uint8)]

    def place(self, file: File, start: int, pieces: list[np.ndarray]) -> Placed:
        """At their place."""
        return [(self._offset(file, start), pieces[0])]

    def kept(self, file: File, start: int, stop: int) -> bool:
        """It is where it belongs."""
        begin = self._offset(file, start)
        return file.keeps(begin, begin + (stop - start) * self.dtype.itemsize)

    def _offset(self, file: File, start: int) -> int:
        if self._begin is None:
            self._begin = file.layout.add(self.pair.name, self.dtype, self.pair.shape)
        return self._begin + start * self.dtype.itemsize


class Zero(Encoder):
    """No delta at all: nothing is stored but its shape."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self.tiles = [(0, 0)]
        self.description = Description("zero", pair.shape)


class Equal(Encoder):
    """A tensor that is no floating-point one: it must equal the base's and is not stored."""

    def encode(self, start: int, stop: int, hands: Hands) -> list[np.ndarray]:
        """Nothing; raises MismatchError where the two differ."""
        base, source = self.pair.read(start, stop, hands)
        if not np.array_equal(base, source):
            raise MismatchError(
                f"{quoted(self.pair.name)} is {self.pair.base.dtype.code} and differs from the"
                " base's; only floating-point tensors can be trained",
                where="source",
                todo="use a source whose other tensors equal the base's",
            )
        return []


def pair_of(info: TensorInfo, base: Operand, source: Operand | None) -> Pair:
    """A tensor of the base with its operands."""
    return Pair(info.name, info.shape, info.elems, base, source)
