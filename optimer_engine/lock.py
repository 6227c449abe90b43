"""One process at a time: a lock on a file, which the system takes back when its holder dies.

A file that says "locked" would outlive a killed process; `flock` does not. It is held on a file of
its own and not on the folder, since network file systems lock only what can be opened for writing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimer_engine.errors import OutputError

LOCK = ".lock"
"""Name of the lock's file in a folder; it stays there, empty."""


@contextmanager
def locked(folder: Path, *, by: str = "", wait: bool = False, name: str = LOCK) -> Iterator[None]:
    """Hold `folder`, made if absent, against every other process.

    Args:
        folder: what is held.
        name: of the lock's file; another name holds another part of the folder.
        by: what the other process would be doing, for the error.
        wait: wait for the other process instead of refusing.

    Raises:
        OutputError: another process holds it, or the folder cannot be written.
    """
    try:
        descriptor = _acquire(folder, name, wait)
    except BlockingIOError:
        raise OutputError(
            f"another process is {by or 'working'} here",
            where=str(folder),
            todo="wait for it or stop it, or choose another folder",
        ) from None
    except OSError as error:
        raise OutputError(f"cannot be locked: {error.strerror}", where=str(folder)) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(folder: Path, name: str, wait: bool) -> int:
    path = folder / name
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder before may have removed the folder, and with it the file that is locked.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
