"""A merge as an iterator of whole tensors, for code that loads weights piece by piece."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from optimer_engine import ops
from optimer_engine.engine import run
from optimer_engine.plans import Plan
from optimer_engine.sink import Sink
from optimer_engine.types import TensorInfo

AHEAD_BYTES = 64 << 20
"""Tensors that may be begun ahead of the one that is wanted next; a larger one goes alone."""


class _Abandoned(Exception):
    """The consumer wants no more."""


class _Tensors(Sink):
    """Collects tiles into tensors and gives these out in the plan's order."""

    def __init__(self, plan: Plan) -> None:
        self.waiting = deque(row.out for row in plan.rows if row.out.file in plan.own_shards)
        self.position = {info.name: i for i, info in enumerate(self.waiting)}
        self.given = 0
        self.begun: dict[str, np.ndarray] = {}
        self.missing: dict[str, int] = {}
        self.changed = threading.Condition()
        self.error: BaseException | None = None

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Copy a tile into its tensor; waits while too much lies ready."""
        with self.changed:
            if info.name not in self.begun:
                # The tensor wanted next never waits, or nobody would go on.
                self.changed.wait_for(
                    lambda: (
                        self.error
                        or info.name in self.begun
                        or self.position[info.name] == self.given
                        or sum(t.nbytes for t in self.begun.values()) + info.nbytes <= AHEAD_BYTES
                    )
                )
                if self.error:
                    raise self.error
                if info.name not in self.begun:
                    self.begun[info.name] = np.empty(info.elems, info.dtype.storage)
                    self.missing[info.name] = info.elems
            whole = self.begun[info.name]
        whole[start : start + tile.size] = tile
        with self.changed:
            self.missing[info.name] -= tile.size
            if self.missing[info.name] == 0:
                self.changed.notify_all()

    def next(self) -> tuple[TensorInfo, np.ndarray] | None:
        """The next tensor as soon as it is whole; None after the last."""
        if not self.waiting:
            return None
        info = self.waiting[0]
        with self.changed:
            if not info.elems:
                self.begun[info.name], self.missing[info.name] = np.empty(0, info.dtype.storage), 0
            self.changed.wait_for(lambda: self.error or self.missing.get(info.name) == 0)
            if self.error:
                raise self.error
            self.waiting.popleft()
            self.given += 1
            self.changed.notify_all()
            return info, self.begun.pop(info.name)

    def stop(self, error: BaseException) -> None:
        """Let both sides end."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


def iter_tensors(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Merge, and give out every tensor in the output's order as (name, torch tensor).

    Each tensor has its own memory, and beside the one in the consumer's hands at most 64 MiB, or
    the one next, are being made. What `model.load_state_dict(dict([pair]), strict=False)` or
    vLLM's `load_weights` take.

    Raises:
        OptimerError: as `engine.run`.
    """
    sink = _Tensors(plan)

    def produce() -> None:
        try:
            run(plan, sink)
        except BaseException as error:
            sink.stop(error)

    producer = threading.Thread(target=produce, name="iter_tensors", daemon=True)
    producer.start()
    try:
        while (made := sink.next()) is not None:
            info, values = made
            yield info.name, ops.as_torch(values, info.dtype).reshape(info.shape)
    finally:
        sink.stop(_Abandoned())
        producer.join()
