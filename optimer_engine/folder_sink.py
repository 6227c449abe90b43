"""The output folder: complete or absent, and an interrupted run continues where it stopped.

Files grow in OUT.partial beside OUT (see `shard_file`). When all is settled, one rename publishes
the folder. A plan that is one of n parts writes its own shards there; the part that finds all the
others finished publishes. Locks: every run holds its own journal, and the folder in common; who
publishes holds the folder alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import xxhash

from optimer_engine.checkpoint import COMPANIONS, MODEL
from optimer_engine.errors import OutputError, RecipeError
from optimer_engine.journal import Journal
from optimer_engine.planner import Plan
from optimer_engine.report import Report, combined
from optimer_engine.runs import Run
from optimer_engine.shard_file import SETTLE_BYTES, ShardFile, write_file
from optimer_engine.sink import Sink
from optimer_engine.types import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMERICS_VERSION = 1
"""Raised when the same recipe and sources would give other bytes."""

MAX_UNSETTLED_BYTES = 512 << 20
PART_WAIT_S = 10.0


class FolderSink(Sink):
    """A checkpoint folder as `save_pretrained` would write it.

    Args:
        out: must not exist, or be an empty folder; not inside, around or equal to an input.
        discard: drop what an interrupted run left, instead of continuing it.
    """

    copies = True

    def __init__(self, out: str | Path, *, discard: bool = False) -> None:
        self.out, self.discard = Path(out), discard
        self._partial = self.out.parent / f"{self.out.name}.partial"
        self._folder: int | None = None
        self._journal: Journal | None = None
        self._shards: dict[int, ShardFile] = {}
        self._changed = threading.Condition()
        self._broken = False

    def open(self, plan: Plan) -> None:
        """Take OUT.partial, keep what is whole in it, allocate the rest.

        Raises:
            RecipeError: `out` cannot be used, or holds the interrupted run of another recipe.
            OutputError: not enough space, or the disk refuses.
        """
        self._plan = plan
        self._check_place()
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
            self._open_journal()
            assert self._journal is not None
            for number in plan.own_shards:
                shard = plan.shards[number]
                self._shards[number] = ShardFile(self._partial, number, shard, self._journal)
            self._check_space()
            for opened in self._shards.values():
                opened.allocate()
        except OutputError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    @property
    def _stem(self) -> str:
        number, count = self._plan.part
        return "merge" if count == 1 else f"part-{number}-of-{count}"

    def _check_place(self) -> None:
        out = self.out.resolve()
        for folder in {c.folder.resolve() for c in self._plan.read_checkpoints.values()}:
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

    def _lock_folder(self) -> None:
        self._folder = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._plan.part[1] == 1:
            self._lock(self._folder, fcntl.LOCK_EX)
        else:  # a part that looks whether it is the last one holds the folder for a moment
            self._lock(self._folder, fcntl.LOCK_SH, PART_WAIT_S)
        if not self._partial.exists() or not os.path.samestat(
            os.fstat(self._folder), self._partial.stat()
        ):
            self._close()
            raise RecipeError("was published just now by another run", where=str(self.out))

    def _lock(self, fd: int, how: int, wait_s: float = 0.0) -> None:
        latest = time.monotonic() + wait_s
        while True:
            try:
                return fcntl.flock(fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= latest:
                    break
                time.sleep(0.05)
        self._close()
        raise RecipeError("another run is writing it now", where=str(self.out), todo="wait for it")

    def _open_journal(self) -> None:
        path = self._partial / f"{self._stem}.journal"
        for other in self._partial.glob("*.journal"):
            if other != path and other.stem.partition("-of-")[2] != self._stem.partition("-of-")[2]:
                self._refuse_other(f"was begun in other parts ({other.stem})")
        if self.discard or not path.exists():
            for leftover in self._own_files():
                leftover.unlink()
        self._journal = Journal(path, _identity(self._plan))
        self._lock(self._journal.fd, fcntl.LOCK_EX)
        if self._journal.other_run:
            self._refuse_other("holds an interrupted merge of other sources or weights")

    def _refuse_other(self, what: str) -> None:
        self._close()  # so that abort leaves the other run's work alone
        raise RecipeError(
            f"{self._partial.name} {what}",
            where=str(self.out),
            todo="run that merge again to finish it, or add --discard to drop it",
        )

    def _own_files(self) -> Iterator[Path]:
        """What this part may remove: a run of all parts, everything."""
        if self._plan.part[1] == 1:
            yield from self._partial.iterdir()
            return
        names = [self._plan.shards[number].name for number in self._plan.own_shards]
        for name in (*names, f"{self._stem}.journal", f"{self._stem}.json"):
            if (self._partial / name).exists():
                yield self._partial / name

    def _check_space(self) -> None:
        needed = sum(shard.missing_bytes for shard in self._shards.values())
        free = shutil.disk_usage(self._partial).free
        if free < needed:
            raise OutputError(
                f"needs {format_bytes(needed)}, {format_bytes(free)} are free",
                where=str(self.out),
                todo="free some space or choose another disk",
            )

    def has(self, run: Run, start: int, stop: int) -> bool:
        """Whether a kept range covers these elements."""
        size = run.out.dtype.itemsize
        begin, end = run.out.offset + start * size, run.out.offset + stop * size
        return self._shards[run.out.file].keeps(begin, end)

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        """A run is contiguous in its file: one write."""
        shard = self._shards[run.out.file]
        try:
            shard.write(run.out.offset + start * run.out.dtype.itemsize, tile.view(np.uint8).data)
        except OSError as error:
            raise self._failed(error) from error
        self._wait_for_settling()

    def copy_run(self, run: Run, start: int, stop: int, fd: int, offset: int) -> None:
        """Copied from file to file."""
        size = run.out.dtype.itemsize
        begin, end = run.out.offset + start * size, run.out.offset + stop * size
        try:
            self._shards[run.out.file].copy(begin, end, fd, offset)
        except OSError as error:
            raise self._failed(error) from error
        self._wait_for_settling()

    def _wait_for_settling(self) -> None:
        with self._changed:
            while not self._broken and self._unsettled_bytes() > MAX_UNSETTLED_BYTES:
                self._changed.wait(1.0)

    def _unsettled_bytes(self) -> int:
        return sum(shard.written - shard.settled for shard in self._shards.values())

    def settle(self) -> None:
        """Sync, hash, journal and drop whatever full stretches are written."""
        self._settle(SETTLE_BYTES)

    def _settle(self, at_least: int) -> None:
        try:
            for shard in self._shards.values():
                if shard.settle(at_least):
                    with self._changed:
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._broken = True
                self._changed.notify_all()
            raise self._failed(error) if isinstance(error, OSError) else error from error

    def commit(self, report: Report) -> None:
        """Settle the rest and publish, or leave that to the part that finishes last."""
        self._settle(1)
        try:
            for shard in self._shards.values():
                report.files[shard.name] = shard.finish()
            if self._plan.part[1] > 1:
                report.part = "{}/{}".format(*self._plan.part)
                write_file(self._partial / f"{self._stem}.json", msgspec.json.encode(report))
                if not self._is_last(report):
                    self._close()
                    return
            self._publish(report)
        except OSError as error:
            raise self._failed(error) from error
        self._close()

    def _is_last(self, report: Report) -> bool:
        """Whether all parts are finished and this one is to publish; then `report` is of all."""
        assert self._folder is not None
        os.fsync(self._folder)
        fcntl.flock(self._folder, fcntl.LOCK_UN)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # a part still works, or publishes
        count = self._plan.part[1]
        files = [self._partial / f"part-{number}-of-{count}.json" for number in range(1, count + 1)]
        if not all(file.exists() for file in files):
            return False
        whole = combined([msgspec.json.decode(file.read_bytes(), type=Report) for file in files])
        for field in report.__struct_fields__:
            setattr(report, field, getattr(whole, field))
        return True

    def _publish(self, report: Report) -> None:
        """Add index, companions and report.json, and rename into place."""
        assert self._folder is not None
        report.out = str(self.out)
        if len(self._plan.shards) > 1:
            name = f"{self._plan.kind}.safetensors.index.json"
            self._write_file(name, _index(self._plan), report)
        if self._plan.kind == MODEL:
            self._copy_companions(report)
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_file(self._partial / "report.json", text.encode())
        for done in [*self._partial.glob("*.journal"), *self._partial.glob("part-*-of-*.json")]:
            done.unlink()
        os.fsync(self._folder)
        self._partial.rename(self.out)
        parent = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(parent)
        os.close(parent)

    def abort(self, error: BaseException) -> None:
        """Remove this run's files, unless the next run can continue from them."""
        resumable = isinstance(error, KeyboardInterrupt | SystemExit | OutputError)
        whole = any(shard.digests or shard.kept for shard in self._shards.values())
        if self._folder is not None and not (resumable and whole):
            for file in list(self._own_files()):
                file.unlink(missing_ok=True)
            if not any(self._partial.iterdir()):
                self._partial.rmdir()
        self._close()

    def _copy_companions(self, report: Report) -> None:
        plan = self._plan
        found = {path for pattern in COMPANIONS for path in plan.base.folder.glob(pattern)}
        files = {
            path.name: path.read_bytes()
            for path in found
            if path.is_file() and path.name not in plan.omitted and path.name not in plan.files
        }
        for name, content in sorted({**files, **plan.files}.items()):
            self._write_file(name, content, report)

    def _write_file(self, name: str, content: bytes, report: Report) -> None:
        write_file(self._partial / name, content)
        report.files[name] = [(0, len(content), xxhash.xxh3_128_hexdigest(content))]

    def _close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        if self._journal is not None:
            self._journal.close()
        if self._folder is not None:
            os.close(self._folder)
        self._shards, self._journal, self._folder = {}, None, None

    def _failed(self, error: OSError) -> OutputError:
        todo = "free some space" if error.errno == errno.ENOSPC else "check the disk and the folder"
        return OutputError(
            f"cannot be written: {error.strerror}",
            where=str(self.out),
            todo=f"{todo}, then run the same command again",
        )


def _identity(plan: Plan) -> dict[str, Any]:
    """All that decides the output's bytes, as the first line of the journal."""
    return {
        "numerics_version": NUMERICS_VERSION,
        "part": list(plan.part),
        "rounding_seed": plan.rounding_seed,
        "inputs": [checkpoint.fingerprint for checkpoint in plan.read_checkpoints.values()],
        "treatments": [
            json.dumps([t.method, t.settings.shared, t.settings.per_source, t.checkpoints])
            for t in plan.treatments
        ],
        "headers": [xxhash.xxh3_128_hexdigest(shard.header) for shard in plan.shards],
    }


def _index(plan: Plan) -> bytes:
    weight_map = {info.name: shard.name for shard in plan.shards for info in shard.tensors}
    index = {
        "metadata": {"total_size": sum(row.out.nbytes for row in plan.rows)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
