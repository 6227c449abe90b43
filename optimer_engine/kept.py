"""How much of each vector the output's grid kept.

A delta smaller than half the distance between neighbours on the bf16 grid is rounded away: with
|tau| / |theta| of 0.001 that is most of it. For each source i, with e the rounding error of the
output and d_i = w_i delta_i,

    kept_i = 1 + <e, d_i> / <d_i, d_i>

is the share of d_i that the output moved along it: 1 where nothing was lost, 0 where all was. It is
estimated on every SAMPLE_EVERYth block of BLOCK elements of each stretch of tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from optimer_engine.operands import as_float
from optimer_engine.runs import Run

BLOCK = 4096
SAMPLE_EVERY = 256


def sampled(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The blocks, as first element and end, that begin within elements start..stop."""
    stride = BLOCK * SAMPLE_EVERY
    for begin in range(-(-start // stride) * stride, stop, stride):
        yield begin, min(begin + BLOCK, stop)


class Kept:
    """Sums over the sampled blocks of a run of the engine; any thread adds."""

    def __init__(self) -> None:
        self._sums: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def add(self, run: Run, start: int, tiles: list[np.ndarray], out: np.ndarray) -> None:
        """Look at the sampled blocks of a tile that the fused linear kernel made.

        Args:
            tiles: of the base and the sources; `out`: the result, in the run's output dtype.
        """
        for begin, end in sampled(start, start + len(out)):
            block = slice(begin - start, end - start)
            self._add(run, [tile[block] for tile in tiles], out[block])

    def _add(self, run: Run, tiles: list[np.ndarray], out: np.ndarray) -> None:
        values = [
            as_float(tile, operand.dtype).astype(np.float64)
            for tile, operand in zip(tiles, run.operands, strict=True)
        ]
        base, weights = values[0], run.treatment.weights
        deltas = {
            run.treatment.checkpoints[number + 1]: weights[number]
            * (theta if operand.is_delta else theta - base)
            for (number, operand), theta in zip(run.sources, values[1:], strict=True)
        }
        error = as_float(out, run.out.dtype) - (base + sum(deltas.values()))
        with self._lock:
            for checkpoint, delta in deltas.items():
                sums = self._sums.setdefault(checkpoint, np.zeros(2))
                sums += [error @ delta, delta @ delta]

    def shares(self) -> dict[int, float]:
        """kept_i by number of the source's checkpoint; without those that moved nothing."""
        return {
            checkpoint: round(1 + float(along) / float(size), 4)
            for checkpoint, (along, size) in sorted(self._sums.items())
            if size > 0
        }
