"""What an interrupted run may trust: which bytes of the output are on the disk, and their hashes.

One line per finished range, appended after the range itself was synced, and synced in turn; each
line carries its own checksum. After a crash the valid prefix of the journal is a list of claims,
and a claim counts only if the bytes still have the hash it names: a line may survive a power cut
that the data before it did not.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

HASH_BYTES = 1 << 20


class Journal:
    """An append-only file of finished ranges.

    Args:
        path: created if absent, with `head` as its first line.
        head: what the run is; a journal with another head belongs to another run.

    Attributes:
        fd: of the open file.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        lines = list(_read_lines(path))
        self.claims: list[dict[str, Any]] = [line for _, line in lines[1:]]
        self.other_run = bool(lines) and lines[0][1] != head
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(path, flags, 0o666)
        os.ftruncate(self.fd, lines[-1][0] if lines else 0)
        os.lseek(self.fd, 0, os.SEEK_END)
        if not lines:
            self.append(head)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line and wait until the disk has it."""
        text = json.dumps(line, sort_keys=True).encode()
        os.write(self.fd, b"%08x %s\n" % (zlib.crc32(text), text))
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end of line in the file, line) up to the first that is torn or damaged."""
    end = 0
    for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        checksum, _, text = raw.rstrip(b"\n").partition(b" ")
        if not raw.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            return
        end += len(raw)
        yield end, json.loads(text)


def hash_range(fd: int, begin: int, end: int) -> str:
    """xxh3-128 (hex) of bytes begin..end of an open file; stops early where the file ends."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(HASH_BYTES)
    view = memoryview(buffer)
    while begin < end:
        count = os.preadv(fd, [view[: min(HASH_BYTES, end - begin)]], begin)
        if count == 0:
            break
        digest.update(view[:count])
        begin += count
    return digest.hexdigest()
