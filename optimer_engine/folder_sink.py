"""The output folder: complete or absent, and an interrupted run continues where it stopped.

Files are preallocated in OUT.partial beside OUT and written at their final offsets. While tiles
come in, finished stretches are settled behind them: synced to the disk, hashed, entered into the
journal, dropped from the page cache. So dirty pages never pile up, and a killed run leaves claims
that the next one checks and keeps. When all is settled, one rename publishes the folder.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from optimer_engine.checkpoint import COMPANIONS, MODEL
from optimer_engine.errors import OutputError, RecipeError
from optimer_engine.journal import Journal, hash_range
from optimer_engine.planner import Plan, Run
from optimer_engine.sink import Sink
from optimer_engine.types import DType, format_bytes

if TYPE_CHECKING:
    from optimer_engine.report import Digest, Report

NUMERICS_VERSION = 1
"""Raised when the same recipe and sources would give other bytes."""

SETTLE_BYTES = 64 << 20
MAX_UNSETTLED_BYTES = 512 << 20
JOURNAL = "merge.journal"


@dataclass
class _OpenShard:
    """One output file: bytes before `written` are in it, bytes before `settled` on the disk."""

    name: str
    fd: int
    size: int
    written: int
    settled: int
    ahead: list[tuple[int, int]] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)

    def add(self, begin: int, end: int) -> None:
        """Bytes begin..end are written, perhaps before others that come earlier in the file."""
        heapq.heappush(self.ahead, (begin, end))
        while self.ahead and self.ahead[0][0] <= self.written:
            self.written = max(self.written, heapq.heappop(self.ahead)[1])


class FolderSink(Sink):
    """A checkpoint folder as `save_pretrained` would write it.

    Args:
        out: must not exist, or be an empty folder; not inside, around or equal to an input.
        discard: drop what an interrupted run left, instead of continuing it.
    """

    def __init__(self, out: str | Path, *, discard: bool = False) -> None:
        self.out, self.discard = Path(out), discard
        self._partial = self.out.parent / f"{self.out.name}.partial"
        self._lock: int | None = None
        self._journal: Journal | None = None
        self._shards: list[_OpenShard] = []
        self._changed = threading.Condition()
        self._broken = False

    def open(self, plan: Plan) -> None:
        """Take OUT.partial, keep what is whole in it, allocate the rest.

        Raises:
            RecipeError: `out` cannot be used, or holds the interrupted run of another recipe.
            OutputError: not enough space, or the disk refuses.
        """
        self._plan = plan
        self._check_place(plan)
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._open_journal(plan)
            for number, shard in enumerate(plan.shards):
                fd = os.open(
                    self._partial / shard.name,
                    os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                    0o666,
                )
                start = len(shard.header)
                opened = _OpenShard(shard.name, fd, shard.size, start, start)
                self._shards.append(opened)
                self._keep_whole_ranges(number, opened)
            self._check_space()
            for opened, shard in zip(self._shards, plan.shards, strict=True):
                _allocate(opened.fd, shard.size)
                _write_all(opened.fd, memoryview(shard.header), 0)
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

    def _take_lock(self) -> None:
        lock = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise RecipeError(
                "another run is writing it now", where=str(self.out), todo="wait for it"
            ) from None
        self._lock = lock

    def _open_journal(self, plan: Plan) -> None:
        path = self._partial / JOURNAL
        if self.discard or not path.exists():
            for leftover in self._partial.iterdir():
                leftover.unlink()
        self._journal = Journal(path, _identity(plan))
        if self._journal.other_run:
            self._close()  # so that abort leaves the other run's work alone
            raise RecipeError(
                f"{self._partial.name} holds an interrupted merge of other sources or weights",
                where=str(self.out),
                todo="run that merge again to finish it, or add --discard to drop it",
            )

    def _keep_whole_ranges(self, number: int, shard: _OpenShard) -> None:
        assert self._journal is not None
        for claim in self._journal.claims:
            if claim["file"] == number:
                begin, end = claim["begin"], claim["end"]
                if hash_range(shard.fd, begin, end) == claim["xxh3_128"]:
                    shard.kept.append((begin, end))
                    shard.add(begin, end)

    def _check_space(self) -> None:
        needed = sum(shard.size for shard in self._shards)
        there = sum(os.fstat(shard.fd).st_blocks * 512 for shard in self._shards)
        free = shutil.disk_usage(self._partial).free
        if free < needed - there:
            raise OutputError(
                f"needs {format_bytes(needed - there)}, {format_bytes(free)} are free",
                where=str(self.out),
                todo="free some space or choose another disk",
            )

    def has(self, run: Run, start: int, stop: int) -> bool:
        """Whether a kept range covers these elements."""
        size = run.out.dtype.itemsize
        begin, end = run.out.offset + start * size, run.out.offset + stop * size
        kept = self._shards[run.out.file].kept
        return any(low <= begin and end <= high for low, high in kept)

    def write_run(self, run: Run, start: int, tile: np.ndarray) -> None:
        """A run is contiguous in its file: one write."""
        shard = self._shards[run.out.file]
        begin = run.out.offset + start * run.out.dtype.itemsize
        try:
            _write_all(shard.fd, tile.view(np.uint8).data, begin)
        except OSError as error:
            raise self._failed(error) from error
        with self._changed:
            shard.add(begin, begin + tile.nbytes)
            while not self._broken and self._unsettled_bytes() > MAX_UNSETTLED_BYTES:
                self._changed.wait(1.0)

    def _unsettled_bytes(self) -> int:
        return sum(shard.written - shard.settled for shard in self._shards)

    def settle(self) -> None:
        """Sync, hash, journal and drop whatever full stretches are written."""
        self._settle(SETTLE_BYTES)

    def _settle(self, at_least: int) -> None:
        assert self._journal is not None
        try:
            for number, shard in enumerate(self._shards):
                begin, end = shard.settled, shard.written
                if begin == end or (end - begin < at_least and end < shard.size):
                    continue
                os.fdatasync(shard.fd)
                digest = hash_range(shard.fd, begin, end)
                claim = {"file": number, "begin": begin, "end": end, "xxh3_128": digest}
                self._journal.append(claim)
                shard.digests.append((begin, end, digest))
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(shard.fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
                with self._changed:
                    shard.settled = end
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._broken = True
                self._changed.notify_all()
            raise self._failed(error) if isinstance(error, OSError) else error from error

    def commit(self, report: Report) -> None:
        """Settle the rest, add index, companions and report.json, and rename into place."""
        self._settle(1)
        report.out = str(self.out)
        try:
            for shard in self._shards:
                os.fsync(shard.fd)
                start = shard.digests[0][0] if shard.digests else shard.size
                header = (0, start, hash_range(shard.fd, 0, start))
                report.files[shard.name] = [header, *shard.digests]
            if len(self._shards) > 1:
                name = f"{self._plan.kind}.safetensors.index.json"
                self._write_file(name, _index(self._plan), report)
            if self._plan.kind == MODEL:
                self._copy_companions(report)
            (self._partial / JOURNAL).unlink()
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

    def abort(self, error: BaseException) -> None:
        """Remove OUT.partial, unless the next run can continue from it."""
        resumable = isinstance(error, KeyboardInterrupt | SystemExit | OutputError)
        whole = any(shard.digests or shard.kept for shard in self._shards)
        if self._lock is not None and not (resumable and whole):
            shutil.rmtree(self._partial, ignore_errors=True)
        self._close()

    def _copy_companions(self, report: Report) -> None:
        base = self._plan.base
        found = {path for pattern in COMPANIONS for path in base.folder.glob(pattern)}
        for path in sorted(path for path in found if path.is_file()):
            content = path.read_bytes()
            if path.name == "config.json" and self._plan.recipe.out_dtype:
                content = _config_with_dtype(self._plan)
            self._write_file(path.name, content, report)

    def _write_file(self, name: str, content: bytes, report: Report) -> None:
        _write_file(self._partial / name, content)
        report.files[name] = [(0, len(content), xxhash.xxh3_128_hexdigest(content))]

    def _close(self) -> None:
        for shard in self._shards:
            os.close(shard.fd)
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            os.close(self._lock)
        self._shards, self._journal, self._lock = [], None, None

    def _failed(self, error: OSError) -> OutputError:
        todo = "free some space" if error.errno == errno.ENOSPC else "check the disk and the folder"
        return OutputError(
            f"cannot be written: {error.strerror}",
            where=str(self.out),
            todo=f"{todo}, then run the same command again",
        )


def _identity(plan: Plan) -> dict[str, Any]:
    """All that decides the output's bytes, as the first line of the journal."""
    read = zip(plan.recipe.sources, plan.sources, strict=True)
    return {
        "numerics_version": NUMERICS_VERSION,
        "add_base": plan.add_base,
        "base": plan.base.fingerprint,
        "sources": [[c.fingerprint, s.weight] for s, c in read if s.weight],
        "headers": [xxhash.xxh3_128_hexdigest(shard.header) for shard in plan.shards],
    }


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
    os.truncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _write_file(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o666)
    try:
        _write_all(fd, memoryview(content), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
