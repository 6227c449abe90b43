"""A merge's tiles on GPUs: pinned buffers, a stream for each worker, sources that stay.

The engine's worker threads each do the whole of a tile, and this module keeps it so. Every worker
has a `Lane` to each GPU: a stream of its own, buffers on the GPU, and buffers in pinned memory that
it reads files into. A tile goes host -> GPU -> host on the worker's stream, so while one worker's
tile is copied in, another's is merged and a third's is copied out: the GPU has an engine for each,
and a few workers keep all three busy without a queue between stages. The alternative, one thread
for each stage, needs queues and overlaps no more.

`Devices` hands out the lanes. Tiles are dealt to GPUs by where they lie in the model, so that a
tile meets the same GPU in every pass of a method and in every trial of a search, and what may stay
there stays: a second reading of the same checkpoints copies nothing in.

Where kvikio is installed, plain tensors are read from the file into GPU memory without passing
through main memory (GPUDirect Storage); where the system lacks it, kvikio reads by itself as pread
does.

What is torch's, Triton's or kvikio's is behind `Backend` (`cuda.Cuda` is the real one), so that all
of this runs in tests without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from optimer_engine.errors import CheckpointError
from optimer_engine.gpu_tiles import Adapter, Given, Loading, as_tile
from optimer_engine.methods.protocol import Method, Pass
from optimer_engine.operands import Operand
from optimer_engine.runs import DIFFERENCE, Run
from optimer_engine.types import DType

TILE_BYTES = (16 << 20) - (128 << 10)
"""Of the widest operand: a copy that takes ten times what its launch costs on PCIe 5.

With what a row of buffers needs beside (an exact vector's headers) it stays below a power of two,
to which pinned memory is rounded up."""

WORKERS = 4
"""Workers for each GPU: one reads, one copies in, one merges, one copies out."""


class Backend(Protocol):
    """One GPU, as far as a lane needs it.

    Tensors are flat bytes on the device. All work of a stream is done in order, and beside that of
    other streams.

    Attributes:
        name: as in "cuda:0".
        max_rank: of the factors that `low_rank` takes.
    """

    name: str
    max_rank: int

    def stream(self) -> Any:
        """A new stream."""

    def pinned(self, size: int) -> np.ndarray:
        """uint8 in main memory that the GPU reads and writes by itself.

        Raises:
            MemoryLimitError: when there is no room.
        """

    def empty(self, size: int) -> Any:
        """Bytes on the GPU; raises as `pinned` does."""

    def free_bytes(self) -> int:
        """What `empty` may still take."""

    def typed(self, tile: Any, dtype: DType) -> Any:
        """The same bytes as the elements that kernels take."""

    def upload(self, stream: Any, source: np.ndarray, target: Any) -> None:
        """Begin to copy bytes to the GPU."""

    def download(self, stream: Any, source: Any, target: np.ndarray) -> None:
        """Begin to copy bytes from the GPU."""

    def launch(self, stream: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function whose kernels are to be part of the stream.

        What it returns, a flag for what is wrong, means something after `wait`.
        """

    def linear(
        self, base: Given, sources: Sequence[Given], weights: Sequence[float], out: Any,
        dtype: DType, add_base: bool,
    ) -> Any:  # fmt: skip
        """The fused linear merge; the flag becomes true on NaN or infinity."""

    def low_rank(
        self, base: Given | None, shape: tuple[int, int], adapters: Sequence[Adapter],
        weights: Sequence[float], out: Any, dtype: DType,
    ) -> Any:  # fmt: skip
        """base, or zeros, + sum of weight * product; the flag becomes true on NaN or infinity."""

    def unpack(
        self, data: Any, index: Any, base: Any, base_dtype: DType, out: Any, dtype: DType
    ) -> Any:
        """An exact vector's chunks to the trained elements; the flag, if they are damaged."""

    def wait(self, stream: Any) -> None:
        """Until all work of the stream is done."""

    def read_direct(self, path: Path, offset: int, target: Any) -> bool:
        """Read a file's bytes to the GPU; False where that cannot be done."""

    def close(self) -> None:
        """Close files that `read_direct` opened."""


@dataclass
class _Resident:
    """Tiles kept on one GPU, up to a number of bytes; none is given up for another."""

    limit_bytes: int = 0
    used_bytes: int = 0
    tiles: dict[tuple[Any, ...], tuple[Given, Operand]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: tuple[Any, ...]) -> Given | None:
        with self.lock:
            tile, _ = self.tiles.get(key, (None, None))
            return tile

    def reserve(self, size: int) -> bool:
        """Whether there is room for `size` more bytes; if so they are taken."""
        with self.lock:
            fits = self.used_bytes + size <= self.limit_bytes
            self.used_bytes += size if fits else 0
            return fits

    def keep(self, key: tuple[Any, ...], tile: Given, operand: Operand) -> None:
        """The operand is kept with its tile: another one's `id` will not be the same."""
        with self.lock:
            self.tiles[key] = tile, operand


class Merged(NamedTuple):
    """A tile's merge, begun.

    Attributes:
        out: the merged bytes on the GPU, valid until the lane's next tile.
        nonfinite: becomes true on NaN or infinity; `Lane.wait` first.
        read_bytes: what was read.
    """

    out: Any
    nonfinite: Any
    read_bytes: int


class Lane:
    """One worker's way to one GPU and back.

    Args:
        host: pinned rows, for each operand and the output, that all lanes of a worker share.
        row_bytes: of the rows on the GPU.

    Attributes:
        rights: of low-rank operands by place, the right factor used last.
        doubts: flags of packed operands that may turn out to be damaged.
    """

    def __init__(
        self, backend: Backend, host: list[np.ndarray], row_bytes: int, resident: _Resident
    ) -> None:
        self.backend, self.host, self.resident = backend, host, resident
        self.stream = backend.stream()
        self.buffers = [backend.empty(row_bytes) for _ in host]
        self.rights: dict[int, tuple[Operand, Any]] = {}
        self._held: list[Any] = []
        self.doubts: list[tuple[Any, Operand]] = []
        self._scratch: Any = None

    def map(self, run: Run, start: int, stop: int, wanted: Pass, accumulator: Any) -> int:
        """Take elements start..stop of a run through a pass; what was read, in bytes."""
        loading = Loading(self, run, start, stop)
        tile = as_tile(run, start, stop, loading.tiles(fused=False))
        self.launch(wanted.map, tile, accumulator)
        self.wait(run, start, stop)
        return loading.read_bytes

    def merge(self, run: Run, start: int, stop: int, method: Method | None, state: Any) -> Merged:
        """Read elements start..stop of a run's operands and begin to merge them.

        Args:
            method, state: what merges them, and what its passes found; None for the weighted sum.

        Raises:
            OptimerError: from reading.
        """
        backend, loading = self.backend, Loading(self, run, start, stop)
        out = self.buffers[-1][: (stop - start) * run.computed.itemsize]
        typed = backend.typed(out, run.computed)
        if method is not None:
            tile = as_tile(run, start, stop, loading.tiles(fused=False))
            return Merged(out, self.launch(method.merge, tile, state, typed), loading.read_bytes)
        weights = [run.treatment.weights[number] for number, _ in run.sources]
        add_base = run.treatment.method != DIFFERENCE
        adapters = loading.adapters() if add_base else None
        if adapters is not None:
            base, factors = adapters
            columns = factors[0].right.shape[1]
            shape = (stop - start) // columns, columns
            flag = self.launch(backend.low_rank, base, shape, factors, weights, typed, run.computed)
        else:
            base, *sources = loading.tiles(fused=True)
            flag = self.launch(
                backend.linear, base, sources, weights, typed, run.computed, add_base
            )
        return Merged(out, flag, loading.read_bytes)

    def fetch(self, merged: Merged, target: np.ndarray) -> None:
        """Begin to copy the merged bytes to `target`, a part of one of the pinned rows."""
        self.backend.download(self.stream, merged.out, target.view(np.uint8))

    def launch(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See `Backend.launch`."""
        return self.backend.launch(self.stream, function, *arguments)

    def typed(self, tile: Any, dtype: DType) -> Any:
        """See `Backend.typed`."""
        return self.backend.typed(tile, dtype)

    def wait(self, run: Run, start: int, stop: int) -> None:
        """Until all that was begun with this tile is done.

        Raises:
            CheckpointError: for a packed source that is damaged.
        """
        self.backend.wait(self.stream)
        self._held.clear()
        doubts, self.doubts = self.doubts, []
        for flag, operand in doubts:
            if bool(flag):
                self._refuse(run, start, stop, operand)

    def scratch(self) -> Any:
        """A row on the GPU for packed bytes."""
        if self._scratch is None:
            self._scratch = self.backend.empty(len(self.buffers[0]))
        return self._scratch

    def room(self, size: int) -> Any:
        """Bytes on the GPU for this tile: other streams may have them after `wait`."""
        self._held.append(self.backend.empty(size))
        return self._held[-1]

    def _refuse(self, run: Run, start: int, stop: int, operand: Operand) -> NoReturn:
        """Let the CPU say what is wrong with a packed operand."""
        assert run.base is not None
        base = run.base.read(start, stop, self.host[0], None)
        operand.read(start, stop, self.host[1], base)
        raise CheckpointError(
            f"{self.backend.name} could not unpack a vector that is sound in main memory",
            where=run.tensors[0].name,
            todo="merge with device cpu, and report this",
        )


class Devices:
    """The GPUs of a merge.

    Args:
        backends: one for each GPU.
        resident_bytes: what may stay on each GPU from one reading to the next.
    """

    def __init__(self, backends: Sequence[Backend], resident_bytes: int = 0) -> None:
        self.backends = list(backends)
        self.resident = [_Resident() for _ in self.backends]
        self.keep(resident_bytes)

    @property
    def name(self) -> str:
        """Of all GPUs, as in "cuda:0, cuda:1"."""
        return ", ".join(backend.name for backend in self.backends)

    @property
    def workers(self) -> int:
        """Threads that keep all GPUs busy."""
        return WORKERS * len(self.backends)

    @property
    def resident_bytes(self) -> int:
        """What may stay on each GPU."""
        return self.resident[0].limit_bytes

    def keep(self, resident_bytes: int) -> None:
        """Let so much stay on each GPU."""
        for resident in self.resident:
            resident.limit_bytes = resident_bytes

    def free_bytes(self) -> int:
        """What every GPU has left."""
        return min(backend.free_bytes() for backend in self.backends)

    def lanes(self, workers: int, rows: int, row_bytes: int) -> list[list[Lane]]:
        """For each worker its lanes, one to each GPU.

        Args:
            rows, row_bytes: the most operands of a tile and its output, and bytes of the widest.

        Raises:
            MemoryLimitError: when main memory or a GPU has no room for the buffers.
        """
        found = []
        for _ in range(workers):
            host = [self.backends[0].pinned(row_bytes) for _ in range(rows)]
            pairs = zip(self.backends, self.resident, strict=True)
            found.append([Lane(backend, host, row_bytes, kept) for backend, kept in pairs])
        return found

    def owner(self, run: Run, start: int, stop: int) -> int:
        """The number of the GPU that merges a tile: by its place in the output, the same always."""
        begin = run.out.offset + start * run.out.dtype.itemsize
        step = max(1, (stop - start) * run.out.dtype.itemsize)
        return (run.out.file + begin // step) % len(self.backends)

    def close(self) -> None:
        """Close files; what is resident is freed with this object."""
        for backend in self.backends:
            backend.close()
