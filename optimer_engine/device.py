"""A merge's tiles on GPUs: pinned buffers, a stream for each worker, sources that stay.

The engine's worker threads each do the whole of a tile, and this module keeps it so. Every worker
has a `Lane`: a stream of its own, buffers in pinned memory that it reads files into, and buffers on
the GPU. A tile goes host -> GPU -> host on the worker's stream, so while one worker's tile is
copied in, another's is merged and a third's is copied out: the GPU has an engine for each, and a
few workers keep all three busy without a queue between stages. The alternative, one thread for each
stage, needs queues and overlaps no more.

`Devices` hands out the lanes. Tiles are dealt to GPUs by where they lie in the model, so that a
tile meets the same GPU in every trial of a search, and with `resident_bytes` what was copied there
stays: a second merge of the same checkpoints copies nothing in.

Where kvikio is installed, plain tensors are read from the file into GPU memory without passing
through main memory (GPUDirect Storage); where the system lacks it, kvikio reads by itself as pread
does.

What is torch's or kvikio's is behind `Backend` (`cuda.Cuda` is the real one), so that all of this
runs in tests without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from optimer_engine.operands import Operand, Stored
from optimer_engine.runs import Run
from optimer_engine.types import DType

TILE_BYTES = 16 << 20
"""Of the widest operand: a copy that takes ten times what its launch costs on PCIe 5."""

WORKERS = 4
"""Workers for each GPU: one reads, one copies in, one merges, one copies out."""


class Backend(Protocol):
    """One GPU, as far as a lane needs it.

    Tensors are flat bytes on the device. All work of a stream is done in order, and beside that of
    other streams.
    """

    def stream(self) -> Any:
        """A new stream."""

    def pinned(self, size: int) -> np.ndarray:
        """uint8 in main memory that the GPU reads and writes by itself."""

    def empty(self, size: int) -> Any:
        """Bytes on the GPU."""

    def upload(self, stream: Any, source: np.ndarray, target: Any) -> None:
        """Begin to copy bytes to the GPU."""

    def download(self, stream: Any, source: Any, target: np.ndarray) -> None:
        """Begin to copy bytes from the GPU."""

    def merge(
        self, stream: Any, base: Any, base_dtype: DType, sources: Sequence[Any],
        dtypes: Sequence[DType], is_delta: Sequence[bool], weights: Sequence[float], out: Any,
        out_dtype: DType, add_base: bool,
    ) -> Any:  # fmt: skip
        """Begin the fused linear merge; the flag that becomes true on NaN or infinity."""

    def wait(self, stream: Any) -> None:
        """Until all work of the stream is done."""

    def read_direct(self, path: Path, offset: int, target: Any) -> bool:
        """Read a file's bytes to the GPU; False where that cannot be done."""


@dataclass
class _Resident:
    """Tiles kept on one GPU, up to a number of bytes; none is given up for another."""

    limit_bytes: int
    used_bytes: int = 0
    tiles: dict[tuple[Any, ...], tuple[Any, Operand]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: tuple[Any, ...]) -> Any:
        with self.lock:
            tile, _ = self.tiles.get(key, (None, None))
            return tile

    def reserve(self, size: int) -> bool:
        """Whether there is room for `size` more bytes; if so they are taken."""
        with self.lock:
            fits = self.used_bytes + size <= self.limit_bytes
            self.used_bytes += size if fits else 0
            return fits

    def keep(self, key: tuple[Any, ...], tile: Any, operand: Operand) -> None:
        """The operand is kept with its tile: another one's `id` will not be the same."""
        with self.lock:
            self.tiles[key] = tile, operand


class Merged(NamedTuple):
    """A tile's merge, begun.

    Attributes:
        out: the merged bytes on the GPU, valid until the lane's next merge.
        nonfinite: becomes true on NaN or infinity; `Lane.wait` first.
        tiles: what was read, the base first, in main memory; None where it did not pass there.
        read_bytes: what was read.
    """

    out: Any
    nonfinite: Any
    tiles: list[np.ndarray] | None
    read_bytes: int


class Lane:
    """One worker's way to one GPU and back.

    Args:
        operands, row_bytes: the most operands of a tile, and bytes of the widest.
    """

    def __init__(
        self, backend: Backend, operands: int, row_bytes: int, resident: _Resident
    ) -> None:
        self.backend, self.resident = backend, resident
        self.stream = backend.stream()
        self.host = [backend.pinned(row_bytes) for _ in range(operands + 1)]
        self.buffers = [backend.empty(row_bytes) for _ in range(operands + 1)]

    def merge(
        self, run: Run, start: int, stop: int, weights: Sequence[float], add_base: bool
    ) -> Merged:
        """Read elements start..stop of a run's operands and begin to merge them.

        Args:
            weights: one for each of the run's sources.

        Raises:
            OptimerError: from reading.
        """
        assert run.base is not None
        tiles: list[Any] = []
        hosts: list[np.ndarray | None] = []
        read_bytes = 0
        for place, operand in enumerate(run.operands):
            tile, host, size = self._tile(run, operand, start, stop, place, hosts)
            tiles.append(tile)
            hosts.append(host)
            read_bytes += size
        out = self.buffers[-1][: (stop - start) * run.computed.itemsize]
        sources = [operand for _, operand in run.sources]
        flag = self.backend.merge(
            self.stream, tiles[0], run.base.dtype, tiles[1:],
            [operand.dtype for operand in sources], [operand.is_delta for operand in sources],
            weights, out, run.computed, add_base,
        )  # fmt: skip
        passed = [host for host in hosts if host is not None]
        return Merged(out, flag, passed if len(passed) == len(hosts) else None, read_bytes)

    def fetch(self, out: Any) -> np.ndarray:
        """The merged bytes in main memory, valid until the lane's next merge; waits for them."""
        merged = self.host[-1][: len(out)]
        self.backend.download(self.stream, out, merged)
        self.wait()
        return merged

    def wait(self) -> None:
        """Until all that was begun is done."""
        self.backend.wait(self.stream)

    def _tile(
        self, run: Run, operand: Operand, start: int, stop: int, place: int,
        hosts: list[np.ndarray | None],
    ) -> tuple[Any, np.ndarray | None, int]:  # fmt: skip
        """An operand's tile on the GPU; in main memory if it passed there; bytes read."""
        size = (stop - start) * operand.dtype.itemsize
        key = (*_identity(operand), start, stop)
        kept = self.resident.get(key)
        if kept is not None:
            return kept, None, 0
        stays = self.resident.reserve(size)
        tile = self.backend.empty(size) if stays else self.buffers[place][:size]
        host = None
        if not (isinstance(operand, Stored) and self._read_direct(operand, start, tile)):
            host = self._read(run, operand, start, stop, place, hosts)
            self.backend.upload(self.stream, host.view(np.uint8), tile)
        if stays:
            self.wait()  # before other streams may find it
            self.resident.keep(key, tile, operand)
        return tile, host, size

    def _read(
        self, run: Run, operand: Operand, start: int, stop: int, place: int,
        hosts: list[np.ndarray | None],
    ) -> np.ndarray:  # fmt: skip
        """An operand's elements in pinned memory."""
        base = hosts[0] if hosts else None
        if place and base is None and not isinstance(operand, Stored):
            assert run.base is not None  # on the GPU alone: packed forms start from it here
            base = run.base.read(start, stop, self.host[0], None)
        read = operand.read(start, stop, self.host[place], base)
        host = self.host[place][: read.nbytes].view(read.dtype)
        if read.ctypes.data != host.ctypes.data:  # a view of a mapped file
            host[:] = read
        return host

    def _read_direct(self, operand: Stored, start: int, tile: Any) -> bool:
        path = operand.checkpoint.files[operand.file].path
        offset = operand.offset + start * operand.dtype.itemsize
        return self.backend.read_direct(Path(path), offset, tile)


def _identity(operand: Operand) -> tuple[Any, ...]:
    """What makes two operands of two plans the same tensor."""
    if isinstance(operand, Stored):  # made anew for each plan, of checkpoints that stay open
        return id(operand.checkpoint), operand.file, operand.offset
    return (id(operand),)


class Devices:
    """The GPUs of a merge.

    Args:
        backends: one for each GPU.
        resident_bytes: what may stay on each GPU from one run to the next.
    """

    def __init__(self, backends: Sequence[Backend], resident_bytes: int = 0) -> None:
        self.backends = list(backends)
        self.resident = [_Resident(resident_bytes) for _ in self.backends]

    @property
    def workers(self) -> int:
        """Threads that keep all GPUs busy."""
        return WORKERS * len(self.backends)

    def lanes(self, operands: int, row_bytes: int) -> list[Lane]:
        """A worker's lanes, one to each GPU."""
        pairs = zip(self.backends, self.resident, strict=True)
        return [Lane(backend, operands, row_bytes, kept) for backend, kept in pairs]

    def owner(self, run: Run, start: int, stop: int) -> int:
        """The number of the GPU that merges a tile: by its place in the output, the same always."""
        begin = run.out.offset + start * run.out.dtype.itemsize
        step = max(1, (stop - start) * run.out.dtype.itemsize)
        return (run.out.file + begin // step) % len(self.backends)
