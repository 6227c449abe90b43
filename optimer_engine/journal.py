"""What an interrupted run may trust: which bytes of the output are on the disk, and their hashes.

One line per finished range, appended after the range itself was synced, and synced in turn; each
line carries its own checksum. After a crash the valid prefix of the journal is a list of claims,
and a claim counts only if the bytes still have the hash it names: a line may survive a power cut
that the data before it did not.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from optimer_engine import durable

HASH_BYTES = 1 << 20
MAX_JOURNAL_BYTES = 256 << 20

Head = dict[str, Any]


class Claim(msgspec.Struct, frozen=True):
    """Bytes `begin` to `end` of output file number `file` are on the disk and have this hash."""

    file: int
    begin: int
    end: int
    xxh3_128: str


class Journal:
    """An append-only file of finished ranges, held by one process at a time.

    Args:
        path: created if absent; left as it is until `begin` or `resume`.

    Attributes:
        head: what the run is, its first line; None in a new or unreadable journal.
        claims: the finished ranges by its other lines.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._fd = durable.create(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(self._fd, min(os.fstat(self._fd).st_size, MAX_JOURNAL_BYTES), 0)
        except BaseException:
            os.close(self._fd)
            raise
        lines = list(_whole_lines(content))
        self._end = lines[-1][0] if lines else 0
        self.head: Head | None = lines[0][1] if lines else None
        self.claims = [claim for _, line in lines[1:] if (claim := _claim(line))]

    def begin(self, head: Head) -> None:
        """Forget everything and start with `head`, which tells this run from any other."""
        durable.resize(self._fd, 0)
        self._end, self.head, self.claims = 0, head, []
        self._append(head)
        self._append(_owner())

    def resume(self) -> None:
        """Go on behind the last whole line."""
        durable.resize(self._fd, self._end)
        self._append(_owner())

    def append(self, claim: Claim) -> None:
        """Add a claim, whose bytes are synced, and wait until the disk has it."""
        self._append(msgspec.to_builtins(claim))

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, sort_keys=True).encode()
        raw = b"%08x %s\n" % (zlib.crc32(text), text)
        durable.write_at(self._fd, raw, self._end)
        durable.sync_data(self._fd)
        self._end += len(raw)

    def close(self) -> None:
        """Close the file and let others have it."""
        fd, self._fd = self._fd, -1
        os.close(fd)


def read_head(path: Path) -> Head | None:
    """The first line of the journal at `path`, None if there is none that is whole."""
    return next((line for _, line in _whole_lines(_content(path))), None)


def read_owner(path: Path) -> str:
    """Who writes the journal at `path`, for a message: "process 123 on host", or nothing."""
    lines = [line for _, line in _whole_lines(_content(path)) if "host" in line]
    return f"process {lines[-1].get('pid')} on {lines[-1]['host']}" if lines else ""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _whole_lines(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end of line in the file, line) up to the first that is torn, damaged or of another kind."""
    end = 0
    while (newline := content.find(b"\n", end)) >= 0:
        checksum, _, text = content[end:newline].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            return
        try:
            line = msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return
        end = newline + 1
        yield end, line


def _claim(line: dict[str, Any]) -> Claim | None:
    try:
        return msgspec.convert(line, Claim)
    except msgspec.ValidationError:
        return None


def hash_range(fd: int, begin: int, end: int, sha256: Any = None) -> str:
    """xxh3-128 (hex) of bytes begin..end of an open file; stops early where the file ends.

    Args:
        sha256: a hashlib object that takes the same bytes.
    """
    digest = xxhash.xxh3_128()
    for piece in _pieces(fd, begin, end):
        digest.update(piece)
        if sha256 is not None:
            sha256.update(piece)
    return digest.hexdigest()


def _pieces(fd: int, begin: int, end: int) -> Iterator[memoryview]:
    view = memoryview(bytearray(min(HASH_BYTES, max(0, end - begin))))
    while begin < end:
        count = os.preadv(fd, [view[: end - begin]], begin)
        if count == 0:
            return
        yield view[:count]
        begin += count


def damage(path: Path, ranges: list[tuple[int, int, str]], sha256: Any = None) -> str:
    """What is wrong with a file that should have these hashes, which cover it; "" if nothing.

    Args:
        sha256: a hashlib object that takes the file's bytes.
    """
    try:
        # O_NONBLOCK: a FIFO that took the file's place must not be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    try:
        size, expected = os.fstat(fd).st_size, 0
        for begin, end, _ in ranges:
            if begin != expected or end < begin:
                return f"no hash was published of bytes {expected} to {begin}"
            expected = end
        if size != expected:
            return f"{size} bytes, {expected} were published"
        for begin, end, published in ranges:
            found = hash_range(fd, begin, end, sha256)
            if found != published:
                return f"bytes {begin} to {end} have hash {found}, {published} was published"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    finally:
        os.close(fd)
    return ""
