"""Where merged tiles go: a folder of safetensors, a live model, or a class of your own.

A sink of your own needs one method, `write`; a null sink for timing is

    class Null(Sink):
        def write(self, info, start, tile): pass
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimer_engine import ops
from optimer_engine.checkpoint import MODEL
from optimer_engine.errors import MismatchError, OutputError, RecipeError, quoted
from optimer_engine.planner import Plan, Run
from optimer_engine.types import DType, TensorInfo, format_bytes

if TYPE_CHECKING:
    from optimer_engine.report import Report

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*processor_config.json",
)
"""Files beside the weights that a merged model takes over from its base, byte for byte."""


class Sink:
    """Takes the tiles of a run, from several threads at once, in any order."""

    def open(self, plan: Plan) -> None:
        """Check and prepare; called before the first tile."""

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Take elements start, start+1, ... of tensor `info`, flat, in `info.dtype.storage`.

        The array is reused for the next tile: copy what must be kept.
        """
        raise NotImplementedError

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        """Take a tile of a run; by default cut into its tensors' parts."""
        for info, first, low, high in run.parts(start, start + tile.size):
            self.write(info, first, tile[low - start : high - start])

    def commit(self, report: Report) -> None:
        """All tiles are written: publish the result."""

    def abort(self) -> None:
        """The run failed: leave nothing behind."""


class FolderSink(Sink):
    """A checkpoint folder as `save_pretrained` would write it, that appears only when complete.

    Files are preallocated in OUT.partial beside OUT and written at their final offsets; when all
    is synced to disk, one rename publishes the folder.

    Args:
        out: must not exist, or be an empty folder; not inside, around or equal to an input.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self._partial = self.out.parent / f"{self.out.name}.partial"
        self._files: list[int] = []
        self._lock: int | None = None
        self._plan: Plan | None = None

    def open(self, plan: Plan) -> None:
        """Raises RecipeError for an unusable `out`, OutputError when disk space lacks."""
        self._plan = plan
        self._check_place(plan)
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            self._take_over()
            needed = sum(shard.size for shard in plan.shards)
            free = shutil.disk_usage(self._partial).free
            if free < needed:
                raise OutputError(
                    f"needs {format_bytes(needed)}, {format_bytes(free)} are free",
                    where=str(self.out),
                    todo="free some space or choose another disk",
                )
            for shard in plan.shards:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
                fd = os.open(self._partial / shard.name, flags, 0o666)
                self._files.append(fd)
                _allocate(fd, shard.size)
                _write_all(fd, memoryview(shard.header), 0)
        except OutputError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def _check_place(self, plan: Plan) -> None:
        out = self.out.resolve()
        for folder in {c.folder.resolve() for c in (plan.base, *plan.sources)}:
            if out == folder or out in folder.parents or folder in out.parents:
                raise RecipeError(
                    f"lies in or around the input {folder}",
                    where=str(self.out),
                    todo="write the output somewhere else",
                )
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise RecipeError(
                "exists and is not an empty folder",
                where=str(self.out),
                todo="choose another output or remove it first",
            )

    def _take_over(self) -> None:
        """Lock OUT.partial; clear what an interrupted run left in it."""
        self._lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise RecipeError(
                "another run is writing it now", where=str(self.out), todo="wait for it"
            ) from None
        for leftover in self._partial.iterdir():
            leftover.unlink()

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        """A run is contiguous in its file: one write."""
        offset = run.out.offset + start * run.out.dtype.itemsize
        try:
            _write_all(self._files[run.out.file], tile.view(np.uint8).data, offset)
        except OSError as error:
            raise self._failed(error) from error

    def commit(self, report: Report) -> None:
        """Sync, add index, companions and report.json, and rename into place."""
        assert self._plan is not None
        report.out = str(self.out)
        try:
            for fd in self._files:
                os.fsync(fd)
            if len(self._plan.shards) > 1:
                name = f"{self._plan.kind}.safetensors.index.json"
                _write_file(self._partial / name, _index(self._plan))
            if self._plan.kind == MODEL:
                self._copy_companions(self._plan)
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
            _write_file(self._partial / "report.json", text.encode())
            assert self._lock is not None
            os.fsync(self._lock)
            self._partial.rename(self.out)
            parent = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(parent)
            os.close(parent)
        except OSError as error:
            raise self._failed(error) from error
        self._close()

    def _copy_companions(self, plan: Plan) -> None:
        found = {path for pattern in COMPANIONS for path in plan.base.folder.glob(pattern)}
        for path in sorted(path for path in found if path.is_file()):
            content = path.read_bytes()
            if path.name == "config.json" and plan.recipe.out_dtype:
                content = _config_with_dtype(plan)
            _write_file(self._partial / path.name, content)

    def abort(self) -> None:
        """Remove OUT.partial, if it is ours."""
        if self._lock is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        for fd in (*self._files, self._lock):
            if fd is not None:
                os.close(fd)
        self._files, self._lock = [], None

    def _failed(self, error: OSError) -> OutputError:
        todo = "free some space" if error.errno == errno.ENOSPC else "check the disk and the folder"
        return OutputError(f"cannot be written: {error.strerror}", where=str(self.out), todo=todo)


class LiveModelSink(Sink):
    """The parameters of a loaded model, rewritten in place: no second copy, no checkpoint.

    Tied tensors are written once, buffers that no checkpoint stores stay as they are. Values are
    those of the merged checkpoint, rounded to its dtype; a model held in a wider dtype gets them
    exactly. After an error the model holds a mixture and must be merged into again.

    Args:
        model: a `torch.nn.Module` whose names are the checkpoint's, on any device.
    """

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
        missing = [n for n, t in stored.items() if t.numel() and t.data_ptr() not in written]
        if missing:
            raise MismatchError(
                f"the checkpoint lacks {quoted(missing[0])} and {len(missing) - 1} more tensors of"
                " the model",
                where="live model",
                todo="load the model from the recipe's base",
            )

    def write(self, info: TensorInfo, start: int, tile: np.ndarray) -> None:
        """Copy into the parameter, casting to its dtype and device."""
        flat = self._flat.get(info.name)
        if flat is not None:
            flat[start : start + tile.size].copy_(ops.as_torch(tile, info.dtype))


def _index(plan: Plan) -> bytes:
    weight_map = {info.name: shard.name for shard in plan.shards for info in shard.tensors}
    index = {
        "metadata": {"total_size": plan.out_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _config_with_dtype(plan: Plan) -> bytes:
    """config.json naming the dtype the merge wrote, where it differs from the base's."""
    config = dict(plan.base.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = DType.parse(str(plan.recipe.out_dtype)).torch_name
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(fd, size)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _write_file(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        _write_all(fd, memoryview(content), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
