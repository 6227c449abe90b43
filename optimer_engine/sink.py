"""Where merged tiles go: the protocol, and a live model. Folders are in `folder_sink`.

A sink of your own needs one method, `write`; a null sink for timing is

    class Null(Sink):
        def write(self, info, start, tile): pass
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimer_engine import ops
from optimer_engine.errors import MismatchError, quoted
from optimer_engine.plans import Plan
from optimer_engine.runs import Run
from optimer_engine.types import TensorInfo

if TYPE_CHECKING:
    from optimer_engine.report import Report


class Sink:
    """Takes the tiles of a run, from several threads at once, in any order.

    Attributes:
        copies: whether `copy_run` is there to take unchanged tensors as bytes of a file.
        on_gpu: whether `write` also takes tiles that lie in a GPU's memory, as torch tensors.
        repeats: whether the same inputs will soon be read again, so that they are left in memory.
    """

    copies = False
    on_gpu = False
    repeats = False

    def open(self, plan: Plan) -> None:
        """Check and prepare; called before the first tile."""

    def has(self, run: Run, start: int, stop: int) -> bool:
        """Whether an earlier, interrupted run left these elements whole, so they can be skipped."""
        return False

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Take elements start, start+1, ... of tensor `info`, flat, in `info.dtype.storage`.

        The array is reused for the next tile: copy what must be kept.
        """
        raise NotImplementedError

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        """Take a tile of a run; by default cut into its tensors' parts."""
        for info, first, low, high in run.parts(start, start + len(tile)):
            self.write(info, first, tile[low - start : high - start])

    def copy_run(self, run: Run, start: int, stop: int, fd: int, offset: int) -> None:
        """Take elements start..stop of a run from byte `offset` of an open file."""
        raise NotImplementedError

    def scratch(self) -> Path:
        """A folder that need not exist, for downloads under a disk limit."""
        return Path(tempfile.gettempdir(), f"optimer-{os.getpid()}.downloads")

    def settle(self) -> None:
        """Called again and again on a thread of its own while tiles come in."""

    def commit(self, report: Report) -> None:
        """All tiles are written: publish the result."""

    def abort(self, error: BaseException) -> None:
        """The run failed: leave nothing behind, or only what a next run can continue."""


class LiveModelSink(Sink):
    """The parameters of a loaded model, rewritten in place: no second copy, no checkpoint.

    Tied tensors are written once, buffers that no checkpoint stores stay as they are. Values are
    those of the merged checkpoint, rounded to its dtype; a model held in a wider dtype gets them
    exactly. After an error the model holds a mixture and must be merged into again.

    Args:
        model: a `torch.nn.Module` whose names are the checkpoint's, on any device.
    """

    on_gpu = True
    repeats = True  # as trials of a search do

    def __init__(self, model: Any) -> None:
        self.model = model
        self._flat: dict[str, Any] = {}

    def open(self, plan: Plan) -> None:
        """Raises MismatchError when checkpoint and model do not name the same tensors."""
        targets = dict(self.model.named_parameters(remove_duplicate=False))
        stored = dict(self.model.state_dict(keep_vars=True))
        targets |= stored
        self._flat = {}
        written: dict[int, str] = {}
        for shard in plan.shards:
            for info in shard.tensors:
                target = targets.get(info.name)
                if target is None or tuple(target.shape) != info.shape:
                    found = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
                    raise MismatchError(
                        f"{quoted(info.name)}: the model has {found}, the checkpoint {info.shape}",
                        where="live model",
                        todo="load the model from the recipe's base",
                    )
                if written.setdefault(target.data_ptr(), info.name) == info.name or not info.elems:
                    self._flat[info.name] = target.detach().view(-1)
        if any(flat.is_cuda for flat in self._flat.values()):
            import torch

            torch.cuda.synchronize()  # an evaluation may still read what will be rewritten
        missing = [n for n, t in stored.items() if t.numel() and t.data_ptr() not in written]
        if missing:
            raise MismatchError(
                f"the checkpoint lacks {quoted(missing[0])} and {len(missing) - 1} more tensors of"
                " the model",
                where="live model",
                todo="load the model from the recipe's base",
            )

    def write(self, info: TensorInfo, start: int, tile: Any) -> None:
        """Copy into the parameter, casting to its dtype and device."""
        flat = self._flat.get(info.name)
        if flat is not None:
            values = ops.as_torch(tile, info.dtype) if isinstance(tile, np.ndarray) else tile
            flat[start : start + len(tile)].copy_(values)
