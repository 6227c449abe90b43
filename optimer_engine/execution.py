"""A plan under way: jobs, the threads that work on them, and one tile from reading to writing.

Every worker thread does the whole of a tile: read its operands into buffers of its own that are
reused for ever, run the fused kernel, hand the result to the sink. Reading, arithmetic and writing
release the GIL, so the threads overlap them with no queues between stages, and memory is threads x
operands x tile whatever the size of model, shard or tensor.

A run is a *job*. Methods that need statistics of a whole tensor make passes over its tiles before
they merge; while the last tiles of a pass are under way, the other threads start the next job.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from optimer_engine import methods, nonfinite, ops
from optimer_engine.downloads import Downloads
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.events import Advanced, Callback, Downloaded, Event
from optimer_engine.kept import Kept, sampled
from optimer_engine.methods.protocol import Pass, Statistics
from optimer_engine.operands import Placed, Stored
from optimer_engine.plans import Plan
from optimer_engine.runs import DIFFERENCE, Run
from optimer_engine.sink import Sink
from optimer_engine.types import DType

if TYPE_CHECKING:
    from optimer_engine.device import Lane

SETTLE_EVERY_S = 0.01

SLOW_BYTES_PER_S = 1e9
"""Of one thread's reading: the page cache gives several times as much, a disk less."""
SAMPLED_BYTES = 64 << 20
KEPT_SHARE = 0.1
"""Of the machine's memory: larger inputs that are slow leave the page cache behind the reader, as
those do that it cannot hold. They would push out what others need, and on virtual machines pages
that are given back and taken again cost far less than fresh ones."""

COPY_BYTES = 16 << 20
"""Unchanged tensors are copied from file to file in pieces of this size."""


class _Job:
    """One run on its way through its passes and the merge; guarded by the execution's lock.

    Attributes:
        number: of the run among those that are to be made.
        step: elements per tile.
        wanted: the pass under way; None when it is the merge. `state`: what the passes found.
    """

    def __init__(self, number: int, run: Run, tile_bytes: int, copies: bool, on_gpu: bool) -> None:
        self.number, self.run, self.method = number, run, run.method
        self.wanted: Pass | None = None
        self.state: Any = None
        self.steps: Statistics | None = None
        self.copied = copies and run.copied and not run.sources and isinstance(run.base, Stored)
        self.step = run.tile_elems(COPY_BYTES if self.copied else tile_bytes, on_gpu)
        if self.method is not None:
            self.steps = self.method.statistics(run.recipe)
            self._advance(None)
        else:
            self._begin()

    def _advance(self, result: Any) -> None:
        assert self.steps is not None
        try:
            self.wanted = self.steps.send(result)
        except StopIteration as end:
            self.wanted, self.state = None, end.value
        self._begin()

    def _begin(self) -> None:
        self.cursor, self.unfinished = 0, self.run.elems
        self.accumulators: dict[int, Any] = {}

    def take(self) -> tuple[int, int] | None:
        """The next tile of the current pass, as start and stop; None when all are given out."""
        if self.cursor >= self.run.elems:
            return None
        start = self.cursor
        self.cursor = min(start + self.step, self.run.elems)
        return start, self.cursor

    def accumulator(self) -> Any:
        """This thread's, of the pass under way."""
        assert self.wanted is not None
        mine = threading.get_ident()
        if mine not in self.accumulators:
            self.accumulators[mine] = self.wanted.start()
        return self.accumulators[mine]

    def finish(self, start: int, stop: int) -> bool:
        """A tile is done; True when it was the last one of the merge."""
        self.unfinished -= stop - start
        if self.unfinished or self.wanted is None:
            return self.unfinished == 0
        self._advance(self.wanted.finish(list(self.accumulators.values())))
        return False


class Execution:
    """The state that the worker threads of one run share.

    Args:
        lanes: for each worker its ways to the plan's GPUs; none without.
    """

    def __init__(
        self,
        made: Plan,
        sink: Sink,
        callbacks: Sequence[Callback],
        kernel: ops.Kernel,
        lanes: Sequence[list[Lane]] = (),
    ) -> None:
        self.plan, self.sink, self.callbacks, self.kernel = made, sink, callbacks, kernel
        self.lanes = list(lanes)
        self.bytes_read = 0
        self.opened = [checkpoint for checkpoint in made.checkpoints if checkpoint is not None]
        self.read_before = self._reading()
        self.slow = self.drained = False
        self.frees = self._share_of_memory() > 1
        self.kept = Kept()
        self.amended = 0
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.runs: Iterator[tuple[int, Run]] = iter(())
        self.downloads: Downloads
        self.jobs: list[_Job] = []

    def begin(self) -> Downloads:
        """Leave out runs of nothing and what an earlier run made; the downloads for the others."""
        runs = []
        for run in self.plan.runs():
            if not run.elems or self.sink.has(run, 0, run.elems):
                self.emit(Advanced(run.elems * run.out.dtype.itemsize))
            else:
                runs.append(run)
        self.runs = iter(enumerate(runs))
        self.downloads = Downloads(
            [run.reads for run in runs],
            limit_bytes=self.plan.disk_limit,
            folder=self.sink.scratch(),
            arrived=self._arrived,
        )
        return self.downloads

    def _arrived(self, name: str, count: int) -> None:
        with self.changed:
            self.emit(Downloaded(name, count))

    def emit(self, event: Event) -> None:
        """Tell everybody who listens."""
        for callback in self.callbacks:
            callback(event)

    def run(self) -> None:
        """Do all of the plan; raises what a thread raised."""
        count, spare = self.plan.threads, self.plan.spare_threads
        with ThreadPoolExecutor(count + spare + 1, thread_name_prefix="merge") as pool:
            try:  # a signal may come between a thread's start and the pool's knowing of it
                settler = pool.submit(self._settle)
                workers = [pool.submit(self._work) for _ in range(count)]
                workers += [pool.submit(self._help) for _ in range(spare)]
                for worker in workers:
                    worker.result()
            finally:
                self._halt()
            settler.result()

    def _halt(self) -> None:
        self.stop.set()
        self.downloads.stop()
        with self.changed:
            self.changed.notify_all()

    def _help(self) -> None:
        """Work too, once the inputs have turned out to be slow: more reads at once then pay."""
        with self.changed:
            while not (self.slow or self.drained or self.stop.is_set()):
                self.changed.wait()
        self._work()

    def _settle(self) -> None:
        """Let the sink settle what is written, beside the workers."""
        try:
            while not self.stop.wait(SETTLE_EVERY_S):
                self.sink.settle()
        finally:
            self._halt()

    def _take(self) -> tuple[_Job, int, int] | None:
        """The next tile: of the oldest job that has one ready, else of the next run."""
        with self.changed:
            while not self.stop.is_set():
                for job in self.jobs:
                    if tile := job.take():
                        return job, *tile
                if following := next(self.runs, None):
                    on_gpu = self.plan.devices is not None
                    made = _Job(*following, self.plan.tile_bytes, self.sink.copies, on_gpu)
                    self.jobs.append(made)
                elif any(job.wanted for job in self.jobs):
                    self.changed.wait()  # for the end of a pass, which makes its job ready again
                else:
                    self.drained = True
                    self.changed.notify_all()
                    return None
        return None

    def _work(self) -> None:
        lanes = self.lanes.pop() if self.lanes else []
        # Rows are skewed by one cache line, or equal offsets would compete for the same cache sets.
        ring = lanes[0].host if lanes else list(np.empty(self.plan.ring_shape, np.uint8))
        try:
            while taken := self._take():
                job, start, stop = taken
                if not self.downloads.need(job.number):
                    return
                read_bytes, out_bytes = self._do(job, start, stop, ring, lanes)
                with self.changed:
                    self.bytes_read += read_bytes
                    over = job.finish(start, stop)
                    if over:
                        self.jobs.remove(job)
                    self.changed.notify_all()
                    if out_bytes:
                        self.emit(Advanced(out_bytes))
                if over:
                    self.downloads.done(job.number)
        except BaseException:
            self._halt()
            raise

    def _reading(self) -> tuple[int, float]:
        """Bytes of the inputs that were read so far, and how long threads waited for them."""
        counts = [(each.read_bytes, each.read_s) for each in self.opened]
        return sum(count for count, _ in counts), sum(waited for _, waited in counts)

    def _note_speed(self) -> None:
        if self.slow:
            return
        (read_bytes, read_s), (bytes_before, s_before) = self._reading(), self.read_before
        if read_bytes - bytes_before <= SAMPLED_BYTES:
            return
        if read_bytes - bytes_before < SLOW_BYTES_PER_S * (read_s - s_before):
            with self.changed:
                self.slow = True
                large = self._share_of_memory() > KEPT_SHARE
                self.frees |= large and not self.sink.repeats
                self.changed.notify_all()

    def _share_of_memory(self) -> float:
        inputs = sum(info.nbytes for each in self.opened for info in each.tensors.values())
        return inputs / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def _free_behind(self, run: Run, start: int) -> None:
        """In the last pass: nobody reads these elements again."""
        if not self.frees:
            return
        for operand in run.operands:
            if isinstance(operand, Placed):
                for checkpoint, file, here in operand.places(start):
                    checkpoint.free_behind(file, here)

    def _do(
        self, job: _Job, start: int, stop: int, ring: list[np.ndarray], lanes: list[Lane]
    ) -> tuple[int, int]:
        """One tile of a pass or of the merge: (bytes read, bytes of output done)."""
        run = job.run
        out_bytes = 0 if job.wanted else (stop - start) * run.out.dtype.itemsize
        if out_bytes and self.sink.has(run, start, stop):
            return 0, out_bytes
        if job.copied:
            base = run.base
            assert isinstance(base, Stored)
            fd = base.checkpoint.files[base.file].fd
            self.sink.copy_run(run, start, stop, fd, base.offset + start * base.dtype.itemsize)
            return out_bytes, out_bytes
        if self.plan.devices is not None and run.on_gpu:
            lane = lanes[self.plan.devices.owner(run, start, stop)]
            return self._do_on_gpu(job, start, stop, ring, lane), out_bytes
        tiles = _read(run, start, stop, ring)
        read_bytes = int(run.read_bytes_per_elem * (stop - start))
        self._note_speed()
        if out_bytes:
            self._free_behind(run, start)
        if run.copied:
            for (number, _), tile in zip(run.sources, tiles[1:], strict=True):
                if not np.array_equal(tiles[0], tile):
                    self._refuse_unequal(run, start, stop, number)
            self.sink.write_run(run, start, tiles[0])
            return read_bytes, out_bytes
        out = _row(ring[-1], stop - start, run.out.dtype)
        computed = out if run.computed is run.out.dtype else _row(ring[-2], stop - start, DType.F32)
        if job.method is None:
            bad = self._linear(run, tiles, computed)
        else:
            operands = [
                methods.Operand(tile, operand.dtype, operand.is_delta)
                for tile, operand in zip(tiles, run.operands, strict=True)
            ]
            base_operand = operands.pop(0) if run.base is not None else None
            cut = methods.Tile(run.recipe, start, stop, base_operand, tuple(operands))
            if job.wanted:
                with self.changed:
                    accumulator = job.accumulator()
                job.wanted.map(cut, accumulator)
                return read_bytes, 0
            bad = job.method.merge(cut, job.state, computed)
        if computed is not out:
            bad |= self._round_by_chance(run, start, stop, computed, out)
        if bad:
            self._amend(run, start, stop, tiles, out)
        elif job.method is None and run.treatment.method != DIFFERENCE:
            self.kept.add(run, start, tiles, out)
        self.sink.write_run(run, start, out)
        return read_bytes, out_bytes

    def _do_on_gpu(
        self, job: _Job, start: int, stop: int, ring: list[np.ndarray], lane: Lane
    ) -> int:
        """One tile through a GPU: the bytes read."""
        run = job.run
        if job.wanted:
            with self.changed:
                accumulator = job.accumulator()
            return lane.map(run, start, stop, job.wanted, accumulator)
        merged = lane.merge(run, start, stop, job.method, job.state)
        self._free_behind(run, start)
        out = _row(ring[-1], stop - start, run.out.dtype)
        computed = out if run.computed is run.out.dtype else _row(ring[-2], stop - start, DType.F32)
        stays = self.sink.on_gpu and computed is out
        if not stays:
            lane.fetch(merged, computed)
        lane.wait(run, start, stop)
        bad = bool(merged.nonfinite)
        if computed is not out:
            bad |= self._round_by_chance(run, start, stop, computed, out)
        if bad:
            self._amend(run, start, stop, _read(run, start, stop, ring), None if stays else out)
        if stays:
            lane.launch(self.sink.write_run, run, start, lane.typed(merged.out, run.computed))
            lane.wait(run, start, stop)
            return merged.read_bytes
        self.sink.write_run(run, start, out)
        linear = job.method is None and run.treatment.method != DIFFERENCE
        if linear and merged.read_bytes and not bad:
            for begin, end in sampled(start, stop):  # on the GPU the inputs were out of sight
                block = out[begin - start : end - start]
                self.kept.add(run, begin, _read(run, begin, end, ring[:-1]), block)
        return merged.read_bytes

    def _round_by_chance(
        self, run: Run, start: int, stop: int, computed: np.ndarray, out: np.ndarray
    ) -> bool:
        from optimer_engine.methods.sparse import stream as random_stream

        bad = False
        for info, first, low, high in run.parts(start, stop):
            part = slice(low - start, high - start)
            # No source has this name, so that no mask is drawn from the same numbers.
            key = random_stream(self.plan.rounding_seed or 0, "\0rounding", info.name)
            bad |= ops.round_stochastically(computed[part], out[part], first, key)
        return bad

    def _linear(self, run: Run, tiles: list[np.ndarray], out: np.ndarray) -> bool:
        assert run.base is not None
        weights = run.treatment.weights
        return self.kernel(
            tiles[0],
            run.base.dtype,
            tiles[1:],
            [operand.dtype for _, operand in run.sources],
            [operand.is_delta for _, operand in run.sources],
            [weights[number] for number, _ in run.sources],
            out,
            run.computed,
            run.treatment.method != DIFFERENCE,
        )

    def _name(self, run: Run, number: int) -> str:
        return f"source {self.plan.names[run.treatment.checkpoints[number + 1]]!r}"

    def _refuse_unequal(self, run: Run, start: int, stop: int, number: int) -> NoReturn:
        names = ", ".join(quoted(info.name) for info, *_ in run.parts(start, stop))
        raise MismatchError(
            f"{names} is {run.out.dtype.code} and differs from the base's; only floating-point"
            " tensors can be merged",
            where=self._name(run, number),
            todo="use sources whose other tensors equal the base's",
        )

    def _amend(self, run: Run, start: int, stop: int, tiles: list[np.ndarray], out: Any) -> None:
        """Keep or clamp what is no number, if that was asked for; else refuse it."""
        keep, clamp = (self.plan.options.get(key) for key in ("nonfinite", "overflow"))
        amended = 0
        if out is not None and (keep == "keep" or clamp == "clamp"):
            amended = nonfinite.amend(run, tiles, out, keep == "keep", clamp == "clamp")
        if not amended:
            nonfinite.refuse(run, start, stop, tiles, lambda number: self._name(run, number))
        with self.changed:
            self.amended += amended


def _row(buffer: np.ndarray, elems: int, dtype: DType) -> np.ndarray:
    return buffer[: elems * dtype.itemsize].view(dtype.storage)


def _read(run: Run, start: int, stop: int, ring: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The tile of every operand, the base first."""
    tiles: list[np.ndarray] = []
    for operand, buffer in zip(run.operands, ring, strict=False):
        base = tiles[0] if tiles and run.base is not None else None
        tiles.append(operand.read(start, stop, buffer, base))
    return tiles
