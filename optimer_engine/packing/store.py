"""The files of a vector while they are written: sizes are known only when all is packed.

The header stands at the front of a safetensors file and says where everything lies. Room for the
longest header that can come out is left free, parts are appended behind it, and the header is
written last, filled up with spaces.

An interrupted run is continued. Stretches of what is written are *settled*, as a merge's are:
synced, hashed and entered into the journal. What is packed depends on base, source and settings
alone, so the next run cuts the same tiles, finds those that the journal vouches for where it would
have put them, and packs the others.
"""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import msgspec
import numpy as np

from optimer_engine import durable
from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import CheckpointError
from optimer_engine.journal import Claim, Journal, hash_range
from optimer_engine.report import Digest
from optimer_engine.types import DType

SETTLE_BYTES = 64 << 20
MAX_UNSETTLED_BYTES = 512 << 20

Interval = tuple[int, int]


class Layout:
    """Where the parts of one safetensors file lie, in the order in which they are first named.

    Args:
        name: of the file.
        metadata: as long as the header's will be, or longer.
        longest: (name, dimensions) of every part that may come, to leave room for.
        most_bytes: more data than will come.
    """

    def __init__(
        self,
        name: str,
        metadata: dict[str, str],
        longest: list[tuple[str, int]],
        most_bytes: int,
    ) -> None:
        self.name = name
        self._parts: dict[str, tuple[DType, tuple[int, ...] | None, int, int]] = {}
        number = max(most_bytes, 10**9)
        worst = {
            name: _entry(DType.BF16, [number] * rank, number, number) for name, rank in longest
        }
        self._start = 8 + -(-len(msgspec.json.encode({"__metadata__": metadata, **worst})) // 8) * 8
        self._end = self._start

    def add(self, name: str, dtype: DType, shape: tuple[int, ...]) -> int:
        """A part of known shape behind all others; returns its offset in the file."""
        begin = self._end
        self._end += int(np.prod(shape, dtype=object)) * dtype.itemsize
        self._parts[name] = (dtype, shape, begin, self._end)
        return begin

    def append(self, name: str, size: int) -> int:
        """`size` more bytes of part `name`, which must be the last one; returns their offset."""
        begin = self._end
        first = self._parts[name][2] if name in self._parts else begin
        self._end += size
        self._parts[name] = (DType.U8, None, first, self._end)
        return begin

    @property
    def end(self) -> int:
        """Where the next part will begin."""
        return self._end

    @property
    def weight_map(self) -> dict[str, str]:
        """Part to file name, for the index of several files."""
        return dict.fromkeys(self._parts, self.name)

    @property
    def data_bytes(self) -> int:
        """Bytes of parts so far."""
        return self._end - self._start

    def header(self, metadata: dict[str, str]) -> bytes:
        """The bytes before the parts, once all of them are placed."""
        entries = {
            name: _entry(
                dtype,
                [end - begin] if shape is None else list(shape),
                begin - self._start,
                end - self._start,
            )
            for name, (dtype, shape, begin, end) in self._parts.items()
        }
        text = msgspec.json.encode({"__metadata__": metadata, **entries})
        room = self._start - 8
        assert len(text) <= room, "a part was named that no room was left for"
        return struct.pack("<Q", room) + text + b" " * (room - len(text))


def _entry(dtype: DType, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype.code, "shape": shape, "data_offsets": [begin, end]}


class PartsFile:
    """A file that grows.

    Args:
        folder: of the file; created there, or continued.
        number: of the file among the vector's.
        layout: of its parts.
        journal: of claims by an earlier run, and for new ones.
    """

    def __init__(self, folder: Path, number: int, layout: Layout, journal: Journal) -> None:
        self.layout, self._number, self._journal = layout, number, journal
        self._fd = durable.create(folder / layout.name)
        self._fresh: list[Interval] = []
        self._unsettled = 0
        self._adding, self._settling = threading.Lock(), threading.Lock()
        self._broken: OSError | None = None
        claims = [c for c in journal.claims if c.file == number and c.begin < c.end]
        self.digests: list[Digest] = []
        for claim in sorted(claims, key=lambda claim: claim.begin):
            # A claim that damage made void may have been made again.
            new = not self.digests or self.digests[-1][1] <= claim.begin
            if new and hash_range(self._fd, claim.begin, claim.end) == claim.xxh3_128:
                self.digests.append((claim.begin, claim.end, claim.xxh3_128))
        self._kept = _joined([(begin, end) for begin, end, _ in self.digests])

    def keeps(self, begin: int, end: int) -> bool:
        """Whether an earlier run left these bytes whole."""
        return begin == end or any(low <= begin and end <= high for low, high in self._kept)

    def read(self, begin: int, size: int) -> bytes:
        """Bytes that an earlier run left; fewer at the file's end."""
        return os.pread(self._fd, size, begin)

    def write(self, begin: int, data: np.ndarray) -> None:
        """Bytes at their place, unless they are kept; called by many threads."""
        if self.keeps(begin, begin + data.nbytes):
            return
        durable.write_at(self._fd, data.view(np.uint8).data, begin)
        with self._adding:
            self._fresh.append((begin, begin + data.nbytes))
            self._unsettled += data.nbytes

    def settle(self, at_least: int) -> None:
        """Sync, hash and journal what is written, if it is that much."""
        if self._unsettled < at_least:
            return
        with self._settling:
            with self._adding:
                fresh, self._fresh, self._unsettled = self._fresh, [], 0
            if self._broken is not None:  # the next sync would succeed, and the bytes be lost
                raise self._broken
            if not fresh:
                return
            try:
                durable.sync_data(self._fd)
                for begin, end in _joined(fresh):
                    self._claim(begin, end)
            except OSError as error:
                self._broken = error
                raise

    def _claim(self, begin: int, end: int) -> None:
        digest = hash_range(self._fd, begin, end)
        self._journal.append(Claim(self._number, begin, end, digest))
        self.digests.append((begin, end, digest))
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def finish(self, metadata: dict[str, str]) -> list[Digest]:
        """Settle the rest, write the header and sync; digests that cover the file."""
        self.settle(1)
        header = self.layout.header(metadata)
        durable.write_at(self._fd, header, 0)
        durable.resize(self._fd, self.layout.end)
        durable.sync(self._fd)
        return [(0, len(header), hash_range(self._fd, 0, len(header))), *sorted(self.digests)]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Published:
    """Stands in for a PartsFile: a file that should hold already what would be written.

    Args:
        checkpoint: the opened vector; `number`, of its file.
    """

    def __init__(self, checkpoint: Checkpoint, number: int, layout: Layout) -> None:
        self.layout, self._checkpoint, self._number = layout, checkpoint, number

    def keeps(self, begin: int, end: int) -> bool:
        """Nothing: all is compared."""
        return False

    def read(self, begin: int, size: int) -> bytes:
        """Never asked for."""
        raise NotImplementedError

    def write(self, begin: int, data: np.ndarray) -> None:
        """Compare.

        Raises:
            CheckpointError: the file differs.
        """
        found = np.empty(data.nbytes, np.uint8)
        if data.nbytes:
            self._checkpoint.read_into(self._number, begin, found.data)
        if not np.array_equal(found, data.view(np.uint8)):
            self._differs(f"bytes {begin} to {begin + data.nbytes} differ")

    def settle(self, at_least: int) -> None:
        """Nothing is written."""

    def finish(self, metadata: dict[str, str]) -> list[Digest]:
        """Compare the header and the size."""
        self.write(0, np.frombuffer(self.layout.header(metadata), np.uint8))
        if self._checkpoint.files[self._number].path.stat().st_size != self.layout.end:
            self._differs("the size differs")
        return []

    def close(self) -> None:
        """It is the checkpoint's."""

    def _differs(self, what: str) -> None:
        raise CheckpointError(
            f"{what} from what base and source give now",
            where=str(self._checkpoint.files[self._number].path),
            todo="the inputs or the vector changed since; pack again",
        )


def _joined(intervals: list[Interval]) -> list[Interval]:
    """The same bytes in as few intervals as can be, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and found[-1][1] == begin:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return found
