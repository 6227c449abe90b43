"""The processes of a run: one, or those that `torchrun`, `accelerate` or DeepSpeed started.

All of them train; the first one alone packs, writes and reports, and the others wait for what it
found. They wait in a group of their own on the CPU: a GPU's collective gives up after minutes, and
tokenising a large corpus takes hours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from optimer_engine import errors

if TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")

_PATIENCE = timedelta(days=7)


class Processes:
    """Use as a context manager.

    Args:
        arguments: of the Trainer; by making them a process has joined the others.

    Attributes:
        count: how many there are.
        first: whether this is the one that writes.
    """

    def __init__(self, arguments: TrainingArguments) -> None:
        self.count, self.first = arguments.world_size, arguments.process_index == 0
        self._group: Any = None
        if self.count > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def on_first(self, work: Callable[[], T]) -> T:
        """`work()` done by the first process: its result, or its error, in every process."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except BaseException as error:
                said = _said(error)
                with contextlib.suppress(Exception):
                    dist.broadcast_object_list([None, said], 0, group=self._group)
                raise
        dist.broadcast_object_list(outcome, 0, group=self._group)
        if outcome[1] is not None:
            name, what, where, todo = outcome[1]
            raise getattr(errors, name)(what, where=where, todo=todo)
        result: T = outcome[0]
        return result

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self._group)


def _said(error: BaseException) -> tuple[str, str, str, str]:
    """An error as text that any process can raise again: class, what, where, todo."""
    if isinstance(error, errors.OptimerError):
        return type(error).__name__, error.what, error.where, error.todo
    return "OptimerError", f"the first process failed: {error!r}", "training", ""
