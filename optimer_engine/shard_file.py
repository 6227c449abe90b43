"""One output file under way: preallocated, written at final offsets, settled behind the writers.

*Settling* a stretch means: synced to the disk, hashed, entered into the journal, dropped from the
page cache. So dirty pages never pile up, and a killed run leaves claims that the next one checks
and keeps.
"""

from __future__ import annotations

import heapq
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from optimer_engine import durable
from optimer_engine.journal import Claim, Journal, hash_range

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
        number: of the shard in the plan; `shard`, its name, header and size.
        journal: of claims by an earlier run, and for new ones.
    """

    def __init__(self, folder: Path, number: int, shard: Shard, journal: Journal) -> None:
        self.number, self.name, self.size = number, shard.name, shard.size
        self.header = shard.header
        self._journal = journal
        self._fd = durable.create(folder / shard.name)
        self.written = self.settled = len(shard.header)
        self.digests: list[Digest] = []
        self._kept: list[tuple[int, int]] = []
        self._ahead: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        for claim in journal.claims:
            if claim.file == number and self._holds(claim):
                begin = claim.begin
                if self._kept and self._kept[-1][1] == begin:
                    begin = self._kept.pop()[0]
                self._kept.append((begin, claim.end))
                self._wrote(claim.begin, claim.end)

    def _holds(self, claim: Claim) -> bool:
        inside = len(self.header) <= claim.begin < claim.end <= self.size
        return inside and hash_range(self._fd, claim.begin, claim.end) == claim.xxh3_128

    @property
    def missing_bytes(self) -> int:
        """Disk space that the file still needs."""
        return max(0, self.size - os.fstat(self._fd).st_blocks * 512)

    def allocate(self) -> None:
        """Take the disk space and write the header."""
        durable.reserve(self._fd, self.size)
        durable.write_at(self._fd, self.header, 0)

    def keeps(self, begin: int, end: int) -> bool:
        """Whether an earlier run left these bytes whole."""
        return any(low <= begin and end <= high for low, high in self._kept)

    def write(self, begin: int, data: memoryview) -> None:
        """Put bytes at their final place; from any thread, in any order."""
        durable.write_at(self._fd, data, begin)
        self._wrote(begin, begin + len(data))

    def copy(self, begin: int, end: int, source: int, at: int) -> None:
        """Fill bytes begin..end from byte `at` of an open file, inside the kernel if it can.

        Raises:
            EOFError: the source ends early.
        """
        here = begin + durable.copy(source, at, end - begin, self._fd, begin)
        while here < end:
            data = os.pread(source, min(end - here, COPY_BYTES), at + here - begin)
            if not data:
                raise EOFError(at + here - begin)
            durable.write_at(self._fd, data, here)
            here += len(data)
        self._wrote(begin, end)

    def _wrote(self, begin: int, end: int) -> None:
        with self._lock:
            heapq.heappush(self._ahead, (begin, end))
            while self._ahead and self._ahead[0][0] <= self.written:
                self.written = max(self.written, heapq.heappop(self._ahead)[1])

    def settle(self, at_least: int) -> None:
        """Settle what is written, if it is that much or the end; one thread at a time."""
        begin, end = self.settled, self.written
        if begin == end or (end - begin < at_least and end < self.size):
            return
        durable.sync_data(self._fd)
        digest = hash_range(self._fd, begin, end)
        self._journal.append(Claim(self.number, begin, end, digest))
        self.digests.append((begin, end, digest))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)
        self.settled = end

    def finish(self) -> list[Digest]:
        """Sync the whole file; hashes of ranges that cover it."""
        durable.sync(self._fd)
        start = len(self.header)
        first = (0, start, hash_range(self._fd, 0, start))
        return [first, *self.digests]

    def close(self) -> None:
        """Close the file; the number may soon be another's, so it is forgotten."""
        fd, self._fd = self._fd, -1
        os.close(fd)
