"""One output file under way: preallocated, written at final offsets, settled behind the writers.

*Settling* a stretch means: synced to the disk, hashed, entered into the journal, dropped from the
page cache. So dirty pages never pile up, and a killed run leaves claims that the next one checks
and keeps.
"""

from __future__ import annotations

import errno
import heapq
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from optimer_engine.journal import Journal, hash_range

if TYPE_CHECKING:
    from optimer_engine.layout import Shard
    from optimer_engine.report import Digest

SETTLE_BYTES = 64 << 20
"""Least stretch that is settled before the file is full."""
COPY_BYTES = 1 << 20


class ShardFile:
    """Bytes before `written` are in the file, bytes before `settled` on the disk.

    Args:
        folder: of the file; created there, or continued.
        shard: its name, header and size; `number`, its number in the plan.
        journal: of claims by an earlier run, and for new ones.
    """

    def __init__(self, folder: Path, number: int, shard: Shard, journal: Journal) -> None:
        self.number, self.name, self.size, self.header = (
            number,
            shard.name,
            shard.size,
            shard.header,
        )
        self._journal = journal
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(folder / shard.name, flags, 0o666)
        self.written = self.settled = len(shard.header)
        self.digests: list[Digest] = []
        self.kept: list[tuple[int, int]] = []
        self._ahead: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        for claim in journal.claims:
            if claim["file"] == number:
                begin, end = claim["begin"], claim["end"]
                if hash_range(self._fd, begin, end) == claim["xxh3_128"]:
                    self.kept.append((begin, end))
                    self._wrote(begin, end)

    @property
    def missing_bytes(self) -> int:
        """Disk space that the file still needs."""
        return max(0, self.size - os.fstat(self._fd).st_blocks * 512)

    def allocate(self) -> None:
        """Take the disk space and write the header."""
        os.truncate(self._fd, self.size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, self.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        write_all(self._fd, memoryview(self.header), 0)

    def keeps(self, begin: int, end: int) -> bool:
        """Whether an earlier run left these bytes whole."""
        return any(low <= begin and end <= high for low, high in self.kept)

    def write(self, begin: int, data: memoryview) -> None:
        """Put bytes at their final place; from any thread, in any order."""
        write_all(self._fd, data, begin)
        self._wrote(begin, begin + len(data))

    def copy(self, begin: int, end: int, source: int, at: int) -> None:
        """Fill bytes begin..end from byte `at` of an open file, inside the kernel if it can.

        A file system that can share extents copies nothing.
        """
        here, size = begin, end - begin
        while size and hasattr(os, "copy_file_range"):
            try:
                count = os.copy_file_range(source, self._fd, size, at, here)
            except OSError as error:
                if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    break
                raise
            if count == 0:
                break
            at, here, size = at + count, here + count, size - count
        while size:
            data = os.pread(source, min(size, COPY_BYTES), at)
            if not data:
                raise OSError(errno.EIO, "a source ended early while being copied")
            write_all(self._fd, memoryview(data), here)
            at, here, size = at + len(data), here + len(data), size - len(data)
        self._wrote(begin, end)

    def _wrote(self, begin: int, end: int) -> None:
        with self._lock:
            heapq.heappush(self._ahead, (begin, end))
            while self._ahead and self._ahead[0][0] <= self.written:
                self.written = max(self.written, heapq.heappop(self._ahead)[1])

    def settle(self, at_least: int) -> bool:
        """Settle what is written, if it is that much or the end; whether there was any."""
        begin, end = self.settled, self.written
        if begin == end or (end - begin < at_least and end < self.size):
            return False
        os.fdatasync(self._fd)
        digest = hash_range(self._fd, begin, end)
        self._journal.append({"file": self.number, "begin": begin, "end": end, "xxh3_128": digest})
        self.digests.append((begin, end, digest))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        self.settled = end
        return True

    def finish(self) -> list[Digest]:
        """Sync the whole file; hashes that cover all of it."""
        os.fsync(self._fd)
        start = len(self.header)
        return [(0, start, hash_range(self._fd, 0, start)), *self.digests]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write every byte, however many calls it takes."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def write_file(path: Path, content: bytes) -> None:
    """A small file, whole and on the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o666)
    try:
        write_all(fd, memoryview(content), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
