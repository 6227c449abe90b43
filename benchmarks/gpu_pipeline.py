"""The engine's way to a GPU and back, beside what the bus carries.

Tiles go through `device.Lane` as in a merge, from operands that read nothing, so that neither disk
nor memory of the host counts: what is timed is upload, merge and download, overlapped by as many
workers as the engine uses. The ceiling is the time of plain copies of the same bytes in each
direction, the slower of the two, as both go at once.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from optimer_engine.device import TILE_BYTES, Devices
from optimer_engine.runs import Piece, Run, Treatment
from optimer_engine.tensor_recipe import Settings
from optimer_engine.types import DType

SOURCES, TILES = 4, 32


class Bus(msgspec.Struct):
    """Seconds for the same bytes by plain copies and through the pipeline."""

    in_bytes: int
    out_bytes: int
    copies_s: float
    pipeline_s: float

    def text(self) -> str:
        """One line."""
        return (
            f"Host to GPU to host, {SOURCES} bf16 sources, {self.in_bytes / 2**20:,.0f} MiB in:"
            f" {self.in_bytes / self.pipeline_s / 1e9:.1f} GB/s in,"
            f" {self.copies_s / self.pipeline_s:.0%} of the bus"
            f" ({self.in_bytes / self.copies_s / 1e9:.1f} GB/s)."
        )


class Nothing:
    """An operand that is whatever the buffer holds."""

    dtype, is_delta, shape, read_bytes_per_elem = DType.BF16, False, (1,), 2.0

    def read(
        self, start: int, stop: int, buffer: np.ndarray, base: np.ndarray | None
    ) -> np.ndarray:
        """See `operands.Operand`."""
        return buffer[: 2 * (stop - start)].view(np.uint16)

    def scratch_bytes(self, elems: int) -> int:
        """None."""
        return 0


def pipeline(rounds: int, devices: Devices | None = None, tile_bytes: int = TILE_BYTES) -> Bus:
    """Time both on the first GPU."""
    if devices is None:
        from optimer_engine.cuda import cuda

        devices = cuda("cuda:0")
    backend, elems = devices.backends[0], tile_bytes // 2
    settings = Settings.of({}, [{"weight": 0.1}] * SOURCES)
    treatment = Treatment("task_arithmetic", settings, tuple(range(SOURCES + 1)))
    sources = tuple((k, Nothing()) for k in range(SOURCES))
    out = Piece(0, 0, DType.BF16)
    total = elems * TILES
    run = Run((), (), total, treatment, Nothing(), sources, out, False, DType.BF16)

    lanes = [first for first, *_ in devices.lanes(devices.workers, SOURCES + 2, tile_bytes)]

    def work(number: int) -> None:
        lane = lanes[number]
        for tile in range(number, TILES, len(lanes)):
            part = run, tile * elems, (tile + 1) * elems
            lane.fetch(lane.merge(*part, None, None), lane.host[-1])
            lane.wait(*part)

    def through() -> None:
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(work, range(len(lanes))))

    lane = lanes[0]

    def up() -> None:
        for _ in range(TILES * (SOURCES + 1)):
            backend.upload(lane.stream, lane.host[0], lane.buffers[0])
        backend.wait(lane.stream)

    def down() -> None:
        for _ in range(TILES):
            backend.download(lane.stream, lane.buffers[0], lane.host[0])
        backend.wait(lane.stream)

    return Bus(
        tile_bytes * TILES * (SOURCES + 1), tile_bytes * TILES,
        max(_seconds(up, rounds), _seconds(down, rounds)), _seconds(through, rounds),
    )  # fmt: skip


def _seconds(function: Any, rounds: int) -> float:
    function()
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
