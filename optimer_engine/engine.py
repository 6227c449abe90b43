"""Run a plan: the only home of threads.

Every worker thread does the whole of a tile: read its pieces into buffers of its own that are
reused for ever, run the fused kernel, hand the result to the sink. Reading, arithmetic and writing
release the GIL, so the threads overlap them with no queues between stages, and memory is threads x
operands x tile whatever the size of model, shard or tensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from optimer_engine import ops
from optimer_engine.checkpoint import VECTOR
from optimer_engine.errors import MismatchError, NonFiniteError, quoted
from optimer_engine.events import Advanced, Callback, Event, Finished, Started
from optimer_engine.folder_sink import FolderSink
from optimer_engine.planner import MEM_LIMIT, Piece, Plan, Run, plan, plan_difference
from optimer_engine.recipe import Recipe
from optimer_engine.report import Report, peak_mem_bytes, versions
from optimer_engine.sink import Sink

SETTLE_EVERY_S = 0.01

Tile = tuple[Run, int, int]


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    discard: bool = False,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Merge as `recipe` says into the new folder `out`.

    A merge that was interrupted, by a signal, a full disk or a power cut, is continued by the same
    call and ends with the same bytes.

    Args:
        recipe: a Recipe, a mapping, or the path of a YAML file.
        out: must not exist, or be empty; appears only when it is complete.
        discard: start afresh instead of continuing.

    Raises:
        OptimerError: bad input leaves nothing behind, a failing disk a state to continue from; see
            `plan` for what is checked before the start.
    """
    made = plan(recipe, mem_limit=mem_limit, threads=threads)
    return _run_closing(made, FolderSink(out, discard=discard), callbacks)


def extract(
    base: str | Path,
    trained: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
    discard: bool = False,
    mem_limit: int | str = MEM_LIMIT,
    threads: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Report:
    """Write the distribution vector tau = theta_trained - theta_base (OptiMer) into folder `out`.

    The vector's header names the base by fingerprint; `metadata` joins it. In float32, base + tau
    rounds back to a bf16 or fp16 trained checkpoint to the bit, but for elements that training
    moved by more than 2^15 times their new size; a float32 one within one rounding. `discard` and
    what may be raised are as in `merge`.
    """
    made = plan_difference(
        base, trained, dtype=dtype, metadata=metadata, mem_limit=mem_limit, threads=threads
    )
    return _run_closing(made, FolderSink(out, discard=discard), callbacks)


def _run_closing(made: Plan, sink: Sink, callbacks: Sequence[Callback]) -> Report:
    try:
        return run(made, sink, callbacks=callbacks)
    finally:
        made.close()


def run(
    made: Plan, sink: Sink, *, callbacks: Sequence[Callback] = (), impl: ops.Impl = "auto"
) -> Report:
    """Run a plan into a sink and report.

    Raises:
        NonFiniteError: NaN or infinity in a source or in the result, named.
        CheckpointError: a source that changed or failed while being read.
        OutputError: from the sink. On any error the sink is aborted.
    """
    started = time.perf_counter()
    execution = _Execution(made, sink, callbacks, ops.linear_kernel(impl))
    try:
        sink.open(made)
        execution.emit(Started(made.out_bytes))
        execution.run()
        for checkpoint in (made.base, *made.sources):
            checkpoint.check_unchanged()
        report = _report(made, execution.bytes_read, time.perf_counter() - started)
        sink.commit(report)
    except BaseException as error:
        sink.abort(error)
        raise
    execution.emit(Finished(report))
    return report


class _Execution:
    """The state that the worker threads of one run share."""

    def __init__(
        self, made: Plan, sink: Sink, callbacks: Sequence[Callback], kernel: ops.Kernel
    ) -> None:
        self.plan, self.sink, self.callbacks, self.kernel = made, sink, callbacks, kernel
        self.is_delta = [source.kind == VECTOR for source in made.sources]
        self.bytes_read = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.tiles = self._cut()

    def _cut(self) -> Iterator[Tile]:
        for stretch in self.plan.runs():
            step = stretch.tile_elems(self.plan.tile_bytes)
            for start in range(0, stretch.elems, step):
                yield stretch, start, min(start + step, stretch.elems)

    def emit(self, event: Event) -> None:
        for callback in self.callbacks:
            callback(event)

    def run(self) -> None:
        with ThreadPoolExecutor(self.plan.threads + 1, thread_name_prefix="merge") as pool:
            settler = pool.submit(self._settle)
            workers = [pool.submit(self._work) for _ in range(self.plan.threads)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                self.stop.set()
            settler.result()

    def _settle(self) -> None:
        """Let the sink settle what is written, beside the workers."""
        try:
            while not self.stop.wait(SETTLE_EVERY_S):
                self.sink.settle()
        finally:
            self.stop.set()

    def _work(self) -> None:
        # Rows are skewed by one cache line, or equal offsets would compete for the same cache sets.
        rows = len(self.plan.sources) + 2
        ring = np.empty((rows, self.plan.tile_bytes + 4096 + 64), np.uint8)
        while not self.stop.is_set():
            with self.lock:
                tile = next(self.tiles, None)
            if tile is None:
                return
            try:
                stretch, start, stop = tile
                if self.sink.has(stretch, start, stop):
                    read_bytes, out_bytes = 0, (stop - start) * stretch.out.dtype.itemsize
                else:
                    read_bytes, out_bytes = self._merge(tile, ring)
            except BaseException:
                self.stop.set()
                raise
            with self.lock:
                self.bytes_read += read_bytes
                self.emit(Advanced(out_bytes))

    def _merge(self, tile: Tile, ring: np.ndarray) -> tuple[int, int]:
        stretch, start, stop = tile
        base = self._read(self.plan.base, stretch.base, start, stop, ring[0])
        sources = [
            self._read(self.plan.sources[number], piece, start, stop, ring[row])
            for row, (number, piece) in enumerate(stretch.sources, start=1)
        ]
        if stretch.copied:
            for (number, _), source in zip(stretch.sources, sources, strict=True):
                if not np.array_equal(base, source):
                    self._refuse_unequal(tile, number)
            out = base
        else:
            out = ring[-1][: (stop - start) * stretch.out.dtype.itemsize].view(
                stretch.out.dtype.storage
            )
            numbers = [number for number, _ in stretch.sources]
            if self.kernel(
                base,
                stretch.base.dtype,
                sources,
                [piece.dtype for _, piece in stretch.sources],
                [self.is_delta[number] for number in numbers],
                [self.plan.weights[number] for number in numbers],
                out,
                stretch.out.dtype,
                self.plan.add_base,
            ):
                self._refuse_nonfinite(tile, base, sources)
        self.sink.write_run(stretch, start, out)
        return base.nbytes + sum(source.nbytes for source in sources), out.nbytes

    def _read(
        self, checkpoint: Any, piece: Piece, start: int, stop: int, row: np.ndarray
    ) -> np.ndarray:
        size = piece.dtype.itemsize
        buffer = row[: (stop - start) * size]
        checkpoint.read_into(piece.file, piece.offset + start * size, buffer.data)
        return buffer.view(piece.dtype.storage)

    def _name(self, number: int) -> str:
        return f"source {self.plan.recipe.sources[number].name!r}"

    def _refuse_unequal(self, tile: Tile, number: int) -> NoReturn:
        names = ", ".join(quoted(info.name) for info, *_ in tile[0].parts(*tile[1:]))
        raise MismatchError(
            f"{names} is {tile[0].base.dtype.code} and differs from the base's; only floating-point"
            " tensors can be merged",
            where=self._name(number),
            todo="use sources whose other tensors equal the base's",
        )

    def _refuse_nonfinite(
        self, tile: Tile, base: np.ndarray, sources: list[np.ndarray]
    ) -> NoReturn:
        stretch, start, stop = tile
        inputs = [("base", stretch.base, base)] + [
            (self._name(number), piece, source)
            for (number, piece), source in zip(stretch.sources, sources, strict=True)
        ]
        for name, piece, values in inputs:
            for info, first, low, high in stretch.parts(start, stop):
                bad = ops.nonfinite(values[low - start : high - start], piece.dtype)
                if bad.any():
                    raise NonFiniteError(
                        f"{quoted(info.name)} holds NaN or infinity: first at element"
                        f" {first + int(bad.argmax())}, {np.count_nonzero(bad)} in this tile;"
                        " finite numbers expected",
                        where=name,
                        todo="repair or leave out this source",
                    )
        names = ", ".join(quoted(info.name) for info, *_ in stretch.parts(start, stop))
        raise NonFiniteError(
            f"{names}: the merged values are too large for {stretch.out.dtype.torch_name}",
            where="output",
            todo="use smaller weights or out_dtype: float32",
        )


def _report(made: Plan, bytes_read: int, wall_s: float) -> Report:
    recipe = made.recipe
    names = [source.name for source in recipe.sources]
    read = {
        n: c.fingerprint for n, c, w in zip(names, made.sources, made.weights, strict=True) if w
    }
    return Report(
        operation="base + sum_i w_i * tau_i" if made.add_base else "trained - base",
        recipe=recipe.to_dict(),
        recipe_fingerprint=recipe.fingerprint(),
        fingerprints={"base": made.base.fingerprint, **read},
        tensors=sum(len(shard.tensors) for shard in made.shards),
        bytes_read=bytes_read,
        bytes_written=made.out_bytes,
        wall_s=wall_s,
        threads=made.threads,
        tile_bytes=made.tile_bytes,
        projected_mem_bytes=made.projected_mem_bytes,
        peak_mem_bytes=peak_mem_bytes(),
        warnings=list(made.warnings),
        versions=versions("numpy", "numba"),
    )
