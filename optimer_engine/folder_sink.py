"""The output folder: complete or absent, and an interrupted run continues where it stopped.

Files grow in OUT.partial beside OUT (see `shard_file` and `work_folder`). When all is settled, one
rename publishes the folder. A plan that is one of n parts writes its own shards there; the part
that finds all the others finished publishes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash

from optimer_engine import durable
from optimer_engine.checkpoint import MODEL
from optimer_engine.companions import companions, read, without_secrets
from optimer_engine.errors import CheckpointError, OptimerError, OutputError, RecipeError
from optimer_engine.plans import Plan
from optimer_engine.recipe import fingerprint
from optimer_engine.report import Report
from optimer_engine.runs import Run
from optimer_engine.shard_file import SETTLE_BYTES, ShardFile
from optimer_engine.sink import Sink
from optimer_engine.types import format_bytes
from optimer_engine.work_folder import (
    OWN_TO_A_PART,
    WorkFolder,
    check_place,
    finished,
    partial_of,
)

NUMERICS_VERSION = 1
"""Raised when the same recipe and sources would give other bytes."""

MAX_UNSETTLED_BYTES = 512 << 20


class FolderSink(Sink):
    """A checkpoint folder as `save_pretrained` would write it.

    Args:
        out: must not exist, or be an empty folder, or be this very output, complete; not inside,
            around or equal to an input.
        discard: drop what an interrupted run left, instead of continuing it.
    """

    copies = True

    def __init__(self, out: str | Path, *, discard: bool = False) -> None:
        self.out, self.discard = Path(out), discard
        self._work: WorkFolder | None = None
        self._finished: Report | None = None
        self._shards: dict[int, ShardFile] = {}
        self._settling = threading.Lock()
        self._broken: OSError | None = None

    def open(self, plan: Plan) -> None:
        """Take OUT.partial, keep what is whole in it, allocate the rest.

        Raises:
            RecipeError: `out` cannot be used, or holds the interrupted run of another recipe.
            BusyError: another run writes it.
            OutputError: not enough space, or the disk refuses.
        """
        self._plan = plan
        head = _head(plan)
        self._identity = _identity(head)
        try:
            self._companions()  # refused now, and not when all is merged
            check_place(self.out, [c.folder for c in plan.checkpoints if c is not None])
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                self._finished = None if self.discard else finished(self.out, self._identity)
                if self._finished is None:
                    raise RecipeError(
                        "exists and is not an empty folder",
                        where=str(self.out),
                        todo="choose another output or remove it first",
                    )
                return
            names = [plan.shards[number].name for number in plan.own_shards]
            self._work = WorkFolder(self.out, plan.part, names, head, self._identity, self.discard)
            self._finished = self._work.finished
            if self._finished is not None:
                return
            for number in plan.own_shards:
                shard = plan.shards[number]
                self._shards[number] = ShardFile(self._work.path, number, shard, self._work.journal)
            self._check_space()
            for opened in self._shards.values():
                opened.allocate()
        except OutputError:
            raise
        except OSError as error:
            self._fail(error)

    def scratch(self) -> Path:
        """Beside the output: a killed run's is found, and emptied, by the one that continues it."""
        number, count = self._plan.part
        stem = "" if count == 1 else f".part-{number}-of-{count}"
        return self.out.parent / f"{self.out.name}{stem}.downloads"

    def _check_space(self) -> None:
        needed, free = self._missing_and_free()
        if free < needed:
            raise OutputError(
                f"needs {format_bytes(needed)}, {format_bytes(free)} are free",
                where=str(self.out),
                todo="free some space or choose another disk",
            )

    def _missing_and_free(self) -> tuple[int, int]:
        needed = sum(shard.missing_bytes for shard in self._shards.values())
        return needed, shutil.disk_usage(partial_of(self.out)).free

    def has(self, run: Run, start: int, stop: int) -> bool:
        """Whether a kept range covers these elements."""
        if self._finished is not None:
            return True
        return self._shards[run.out.file].keeps(*_bytes(run, start, stop))

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        """A run is contiguous in its file: one write."""
        begin, _ = _bytes(run, start, start)
        try:
            self._shards[run.out.file].write(begin, tile.view(np.uint8).data)
        except OSError as error:
            self._fail(error)
        self._hold_back()

    def copy_run(self, run: Run, start: int, stop: int, fd: int, offset: int) -> None:
        """Copied from file to file; raises CheckpointError when the source ends early."""
        try:
            self._shards[run.out.file].copy(*_bytes(run, start, stop), fd, offset)
        except EOFError as error:
            opened = [file for c in self._plan.checkpoints if c for file in c.files]
            raise CheckpointError(
                f"ended at byte {error} while being copied",
                where=next((str(file.path) for file in opened if file.fd == fd), "source"),
                todo="the file was cut meanwhile; restore it and run again",
            ) from None
        except OSError as error:
            self._fail(error)
        self._hold_back()

    def _hold_back(self) -> None:
        """Let no more unsynced bytes pile up than the page cache should hold."""
        while self._unsettled_bytes() > MAX_UNSETTLED_BYTES:
            with self._settling:
                if self._unsettled_bytes() > MAX_UNSETTLED_BYTES:
                    self._settle_now(1)

    def _unsettled_bytes(self) -> int:
        return sum(shard.written - shard.settled for shard in self._shards.values())

    def settle(self) -> None:
        """Sync, hash, journal and drop whatever full stretches are written."""
        self._settle(SETTLE_BYTES)

    def _settle(self, at_least: int) -> None:
        with self._settling:
            self._settle_now(at_least)

    def _settle_now(self, at_least: int) -> None:
        if self._broken is not None:  # the next sync would succeed, and the bytes would be lost
            self._fail(self._broken)
        try:
            for shard in self._shards.values():
                shard.settle(at_least)
        except OSError as error:
            self._broken = error
            self._fail(error)

    def commit(self, report: Report) -> None:
        """Settle the rest and publish, or leave that to the part that finishes last."""
        self._settle(1)
        try:
            self._commit(report)
        except OutputError:
            raise
        except OSError as error:
            self._fail(error)
        self._close()

    def _commit(self, report: Report) -> None:
        work = self._work
        if self._finished is not None:
            _take_over(report, self._finished)
            report.warnings.append("the output was complete already, and is as it was published")
            if work is not None and work.alone():
                work.publish(report)
            return
        assert work is not None
        report.identity = self._identity
        for shard in self._shards.values():
            report.files[shard.name] = shard.finish()
        if self._plan.part[1] > 1:
            report.part = "{}/{}".format(*self._plan.part)
            whole = work.is_last(report)
            if whole is None:
                return
            _take_over(report, whole)
        report.out = str(self.out)
        for name, content in self._small_files(report).items():
            durable.write_file(work.path / name, content)
            report.files[name] = [(0, len(content), xxhash.xxh3_128_hexdigest(content))]
        work.publish(report)

    def _small_files(self, report: Report) -> dict[str, bytes]:
        """Index, configuration and tokenizer, by name; warnings go into the report."""
        plan = self._plan
        files: dict[str, bytes] = {}
        if len(plan.shards) > 1:
            files[f"{plan.kind}.safetensors.index.json"] = _index(plan)
        files |= {path.name: read(path) for path in self._companions()}
        if plan.kind == MODEL:
            files.update(plan.files)
        for name, content in sorted(files.items()):
            clean = without_secrets(content)
            if clean != content:
                files[name] = clean
                report.warnings.append(f"{name} held what looks like a token, and *** replaced it")
        return files

    def _companions(self) -> list[Path]:
        """The base's data files that are copied."""
        plan = self._plan
        if plan.kind != MODEL:
            return []
        left_out = (*plan.omitted, *plan.files)
        return [path for path in companions(plan.base.folder) if path.name not in left_out]

    def abort(self, error: BaseException) -> None:
        """Remove this run's files, unless the next run can continue from them.

        Bad input leaves nothing; a signal, a failing disk or an error of this program leaves what
        is whole.
        """
        work = self._work
        bad_input = isinstance(error, OptimerError) and not (
            isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        )
        try:
            if work is not None and (bad_input or not self._holds_work(work)):
                with contextlib.suppress(OSError):  # `error` is what the user must see
                    work.abandon()
        finally:
            self._close()

    def _holds_work(self, work: WorkFolder) -> bool:
        if self._finished is not None or work.journal.claims:
            return True
        return any(shard.digests for shard in self._shards.values())

    def _close(self) -> None:
        with self._settling:  # a thread that was left behind must find nothing to settle
            for shard in self._shards.values():
                shard.close()
            if self._work is not None:
                self._work.close()
            self._shards, self._work = {}, None

    def _fail(self, error: OSError) -> NoReturn:
        what = f"cannot be written: {error.strerror}"
        todo = "check the disk and the folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            todo = "free some space"
            with contextlib.suppress(OSError):
                needed, free = self._missing_and_free()
                what += f"; {format_bytes(needed)} more are needed, {format_bytes(free)} are free"
        raise OutputError(
            what, where=str(self.out), todo=f"{todo}, then run the same command again"
        ) from error


def _bytes(run: Run, start: int, stop: int) -> tuple[int, int]:
    """Where elements start..stop lie in their file."""
    size = run.out.dtype.itemsize
    return run.out.offset + start * size, run.out.offset + stop * size


def _take_over(report: Report, other: Report) -> None:
    for field in report.__struct_fields__:
        setattr(report, field, getattr(other, field))


def _head(plan: Plan) -> dict[str, Any]:
    """All that decides the output's bytes, as the first line of the journal."""
    opened = [checkpoint for checkpoint in plan.checkpoints if checkpoint is not None]
    head = {
        "numerics_version": NUMERICS_VERSION,
        "part": plan.part,
        "recipe": fingerprint(plan.written_recipe),
        "options": plan.options,
        "inputs": [checkpoint.identity for checkpoint in opened],
        "files": [
            # Fingerprints sample; a file written to between two runs must not be mixed with itself.
            (file.path.name, *file.identity[2:])
            for checkpoint in opened
            if not checkpoint.origin  # what comes from the Hub is known by its hashes
            for file in checkpoint.files
        ],
        "treatments": [
            json.dumps([t.method, t.settings.shared, t.settings.per_source, t.checkpoints])
            for t in plan.treatments
        ],
        "headers": [xxhash.xxh3_128_hexdigest(shard.header) for shard in plan.shards],
    }
    plain: dict[str, Any] = json.loads(json.dumps(head))
    return plain


def _identity(head: dict[str, Any]) -> str:
    shared = {key: value for key, value in head.items() if key not in OWN_TO_A_PART}
    return xxhash.xxh3_128_hexdigest(json.dumps(shared, sort_keys=True).encode())


def _index(plan: Plan) -> bytes:
    weight_map = {info.name: shard.name for shard in plan.shards for info in shard.tensors}
    index = {
        "metadata": {"total_size": sum(row.out.nbytes for row in plan.rows)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
