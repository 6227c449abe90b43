"""Merge into nothing: `python -m benchmarks.null_merge BACKEND BASE WEIGHT=FOLDER...`

Reads and computes everything and keeps nothing, so that models larger than the disk can be run.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from optimer_engine import Sink, plan
from optimer_engine.types import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from optimer_engine.checkpoint import Backend


class NullSink(Sink):
    """Takes the tiles and keeps nothing."""

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Drop the tile."""


def main() -> None:
    """Run the merge that the arguments name."""
    backend, base, *pairs = sys.argv[1:]
    sources = [
        {"name": str(number), "model": folder, "weight": float(weight)}
        for number, (weight, _, folder) in enumerate(pair.partition("=") for pair in pairs)
    ]
    plan({"base": base, "sources": sources}, backend=cast("Backend", backend)).run(NullSink())


if __name__ == "__main__":
    main()
