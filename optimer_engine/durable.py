"""The one layer between outputs and the disk: plain functions, each an effect or a few.

Whatever must survive a kill or a power cut is written through here and nowhere else, so that tests
can stop, fail, record or reorder every single effect by putting a stand-in in the place of this
module's `os`. The rules that callers follow: data is synced before anything vouches for it, a
folder is synced before anything relies on a name in it, and an effect that failed is not repeated,
since a disk that refused a sync has forgotten what it was to write.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_UNABLE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system answers that cannot do what it is asked, where another way is open."""


def create(path: Path) -> int:
    """Open a regular file for reading and writing, made if absent; links are not followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte, however many calls it takes."""
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count


def resize(fd: int, size: int) -> None:
    """Cut or extend a file."""
    os.ftruncate(fd, size)


def reserve(fd: int, size: int) -> None:
    """Give a file its size and the disk space for it, where the file system can promise that."""
    resize(fd, size)
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise


def copy(source: int, at: int, size: int, target: int, offset: int) -> int:
    """Copy inside the kernel, sharing blocks where it can; fewer bytes than asked if it cannot."""
    done = 0
    while done < size and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, size - done, at + done, offset + done)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            break
        if count == 0:
            break
        done += count
    return done


def sync_data(fd: int) -> None:
    """Wait until the disk has a file's bytes."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync(what: Path | int) -> None:
    """Wait until the disk has a file, or a folder's list of names; by path or open file."""
    fd = what if isinstance(what, int) else os.open(what, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNABLE:  # some network file systems do not sync folders
            raise
    finally:
        if fd != what:
            os.close(fd)


def make_folder(path: Path) -> None:
    """A folder, with those above it, each name on the disk before the next is made in it."""
    if not path.parent.exists():
        make_folder(path.parent)
    if path.is_dir():
        return
    try:
        os.mkdir(path)  # noqa: PTH102
    except FileExistsError:
        if not path.is_dir():  # else another run, of another part say, was faster
            raise
    sync(path.parent)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder another name, and wait until the disk knows."""
    os.replace(old, new)  # noqa: PTH105
    sync(new.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        return


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(path)  # noqa: PTH106


def write_file(path: Path, content: bytes) -> None:
    """A small file, on the disk when this returns; a stop in the middle leaves part of it."""
    fd = create(path)
    try:
        resize(fd, 0)
        write_at(fd, content, 0)
        sync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` new content: all of it or none, and on the disk when this returns."""
    fresh = path.with_name(path.name + ".new")
    write_file(fresh, content)
    rename(fresh, path)
