"""Which files of the Hub's cache were hashed before, and found right.

Any program may have put a file into the cache, and none compares it with the hash that the Hub
publishes. This one does, once: what was found right is noted with the file's identity (device,
inode, size, times of last change), and is not read for this again until that differs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

MAX_BYTES = 1_000_000
"""A longer list is begun anew: files would be hashed once more, nothing else."""


def known(path: Path, digest: str) -> bool:
    """Whether the file at `path`, as it is now, was found to have this hash."""
    try:
        return _line(path, digest) in _list().read_text("ascii").splitlines()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home
        return False


def note(path: Path, digest: str) -> None:
    """The file at `path` has this hash; where that cannot be kept, it is found again."""
    with contextlib.suppress(OSError, RuntimeError):
        kept = _list()
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        full = kept.exists() and kept.stat().st_size > MAX_BYTES
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if full else os.O_APPEND)
        fd = os.open(kept, flags, 0o600)
        try:
            os.write(fd, f"{_line(path, digest)}\n".encode("ascii"))
        finally:
            os.close(fd)


def _list() -> Path:
    if chosen := os.environ.get("OPTIMER_CACHE_DIR"):
        return Path(chosen).absolute() / "hashed"
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return caches / "optimer-engine" / "hashed"


def _line(path: Path, digest: str) -> str:
    found = path.stat()
    times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{digest} {found.st_dev} {found.st_ino} {found.st_size} {times}"
