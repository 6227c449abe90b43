"""The threads that pack: tiles are encoded side by side and placed in their order.

A tile's packed size is known only when it is packed, and the next one begins where it ends. So
threads take numbered tiles, read and encode them side by side, wait for their turn to be told a
place, and write side by side again. Memory is threads x (tile of base, source and result) whatever
the size of tensor or model; `lowrank` alone holds two thin matrices of a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from optimer_engine.events import Advanced, Callback, Started
from optimer_engine.packing.encode import Encoder, File, Hands
from optimer_engine.packing.store import MAX_UNSETTLED_BYTES, SETTLE_BYTES, Layout
from optimer_engine.vectors.format import PARTS, TENSOR, part_name

if TYPE_CHECKING:
    from optimer_engine.report import Digest

Tile = tuple[Encoder, int, int]
"""Elements of one tensor, from and to."""

MAX_TENSORS_PER_FILE = 20_000
"""Keeps headers far below what readers accept."""

SETTLE_EVERY_S = 0.01


class Run:
    """The state that the threads share."""

    def __init__(
        self, encoders: list[Encoder], threads: int, callbacks: Sequence[Callback]
    ) -> None:
        # The wider the units of its parts, the sooner: so all parts are aligned in their file.
        self.encoders = sorted(encoders, key=lambda encoder: -encoder.unit)
        self.threads, self.callbacks = threads, callbacks
        self.bytes_read = self.bytes_written = 0
        self._changed = threading.Condition()
        self._stopped = False

    def write(
        self, opened: Callable[[int, Layout], File], header: dict[str, str], max_bytes: int
    ) -> tuple[dict[str, list[Digest]], dict[str, str]]:
        """All files; returns their digests, and the file of each part.

        Args:
            opened: gives the file of a number and layout.
        """
        for callback in self.callbacks:
            callback(Started(sum(_bytes(encoder) for encoder in self.encoders)))
        groups = list(self._groups(max_bytes))
        digests: dict[str, list[Digest]] = {}
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups):
            name = "vector.safetensors"
            if len(groups) > 1:
                name = f"vector-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            layout = _layout(name, header, group)
            file = opened(number, layout)
            try:
                self._pack_file(group, file)
                digests[name] = file.finish(_metadata(header, group))
                weight_map |= layout.weight_map
                self.bytes_written += layout.data_bytes
            finally:
                file.close()
        return digests, weight_map

    def _groups(self, max_bytes: int) -> Iterator[list[Encoder]]:
        """The tensors of each file: no more than `max_bytes` before packing."""
        group: list[Encoder] = []
        filled = 0
        for encoder in self.encoders:
            size = _bytes(encoder)
            if group and (filled + size > max_bytes or len(group) == MAX_TENSORS_PER_FILE):
                yield group
                group, filled = [], 0
            group.append(encoder)
            filled += size
        yield group

    def _pack_file(self, group: list[Encoder], file: File) -> None:
        over = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="settle") as beside:
            settler = beside.submit(self._settle, file, over)
            try:
                for unit in sorted({encoder.unit for encoder in group}, reverse=True):
                    self._pack_part([e for e in group if e.unit == unit], file)
            finally:
                over.set()
            settler.result()

    def _settle(self, file: File, over: threading.Event) -> None:
        """Settle what is written, beside the workers; a single thread does all by itself."""
        try:
            while self.threads > 1 and not over.wait(SETTLE_EVERY_S):
                file.settle(SETTLE_BYTES)
        except BaseException:
            self._stop()
            raise

    def _pack_part(self, part: list[Encoder], file: File) -> None:
        tiles = [(e, start, stop) for e in part for start, stop in e.tiles]
        self._tiles = enumerate(list(self._left(tiles, file)))
        self._turn = 0
        with ThreadPoolExecutor(self.threads, thread_name_prefix="pack") as pool:
            for worker in [pool.submit(self._work, file) for _ in range(self.threads)]:
                worker.result()
        for encoder in part:
            for offset, data in encoder.finish(file):
                file.write(offset, data)

    def _left(self, tiles: list[Tile], file: File) -> Iterator[Tile]:
        """The tiles without those that an earlier run left; where one is lost, so is the place of
        all behind it."""
        lost = False
        for encoder, start, stop in tiles:
            if not lost and encoder.stores and encoder.kept(file, start, stop):
                self._advance(encoder, stop - start, 0)
            else:
                lost = lost or encoder.stores
                yield encoder, start, stop

    def _work(self, file: File) -> None:
        hands = Hands()
        most = MAX_UNSETTLED_BYTES if self.threads > 1 else SETTLE_BYTES
        try:
            while True:
                with self._changed:
                    number, (encoder, start, stop) = next(self._tiles, (-1, (None, 0, 0)))
                if encoder is None or self._stopped:
                    return
                pieces = encoder.encode(start, stop, hands)
                with self._changed:
                    while self._turn != number and not self._stopped:
                        self._changed.wait()
                    if self._stopped:
                        return
                    placed = encoder.place(file, start, pieces)
                    self._turn += 1
                    self._changed.notify_all()
                for offset, data in placed:
                    file.write(offset, data)
                file.settle(most)
                self._advance(encoder, stop - start, _read_bytes(encoder))
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _advance(self, encoder: Encoder, elems: int, read_bytes: float) -> None:
        with self._changed:
            self.bytes_read += int(elems * read_bytes)
            for callback in self.callbacks:
                callback(Advanced(elems * encoder.pair.base.dtype.itemsize))


def _read_bytes(encoder: Encoder) -> float:
    """Bytes read for an element."""
    pair = encoder.pair
    read = 0.0 if pair.source is None else pair.source.read_bytes_per_elem
    return read + pair.base.dtype.itemsize


def _bytes(encoder: Encoder) -> int:
    """Size of the tensor before packing, for progress and for filling files."""
    pair = encoder.pair
    return pair.elems * (pair.base if pair.source is None else pair.source).dtype.itemsize


def _metadata(header: dict[str, str], group: list[Encoder]) -> dict[str, str]:
    said = {TENSOR + e.pair.name: e.description.text() for e in group if e.description}
    return {**header, **said}


def _layout(name: str, header: dict[str, str], group: list[Encoder]) -> Layout:
    longest = []
    for encoder in group:
        own, said = encoder.pair.name, encoder.description
        if said is None:
            longest.append((own, len(encoder.pair.shape)))
        else:
            longest += [(part_name(own, part), 2) for part in PARTS[said.mode]]
    most = sum(2 * _bytes(encoder) + 4096 for encoder in group)
    return Layout(name, _metadata(header, group), longest, most)
