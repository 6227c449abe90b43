"""What the machine allows: the unavoidable part of a merge and nothing else.

Each function does what any merge must, by the means that measured best here, so that the share of
it that a merge reaches says how much is left to gain: reading the files, writing the output, and
streaming N + 1 arrays in and one out through memory, with an addition for arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE_BYTES = 512 * 1024
GIVEN_BACK_BYTES, SYNCED_BYTES = 8 << 20, 64 << 20


def in_threads(threads: int, work: Callable[[Iterable[int]], object], pieces: int) -> None:
    """Deal the pieces 0, 1, ... to `threads` calls of `work`, each with an iterator of its own."""
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, range(i, pieces, threads)) for i in range(threads)]:
            done.result()


def read(files: Iterable[Path], threads: int) -> None:
    """Read files by pread into one reused buffer per thread."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            pieces = -(-os.fstat(fd).st_size // PIECE_BYTES)

            def work(numbers: Iterable[int], fd: int = fd) -> None:
                buffer = bytearray(PIECE_BYTES)
                for number in numbers:
                    os.preadv(fd, [buffer], number * PIECE_BYTES)

            in_threads(threads, work, pieces)
        finally:
            os.close(fd)


def write(path: Path, size_bytes: int, threads: int) -> None:
    """Write a preallocated file by pwrite from a reused buffer, and sync it to disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(fd, 0, size_bytes)

        def work(numbers: Iterable[int]) -> None:
            buffer = memoryview(bytes(PIECE_BYTES))
            for number in numbers:
                offset = number * PIECE_BYTES
                os.pwrite(fd, buffer[: min(PIECE_BYTES, size_bytes - offset)], offset)

        in_threads(threads, work, -(-size_bytes // PIECE_BYTES))
        os.fsync(fd)
    finally:
        os.close(fd)


def read_and_write(files: Sequence[Path], out: Path, threads: int) -> None:
    """What a merge asks of a disk, and no merge: read files side by side, write one like the first.

    Pages are given back behind the reader and, once synced, behind the writer.
    """
    size = files[0].stat().st_size
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    fds = [os.open(path, os.O_RDONLY) for path in files]
    numbers = iter(range(-(-size // PIECE_BYTES)))  # shared: the threads stay side by side too
    given_back = dict.fromkeys(fds, 0)

    def give_back(fd: int, stop: int) -> None:
        start, given_back[fd] = given_back[fd], stop
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)

    def work(_: Iterable[int]) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for number in numbers:
            offset = number * PIECE_BYTES
            for fd in fds:
                os.preadv(fd, [buffer], offset)
                if offset - given_back[fd] >= 2 * GIVEN_BACK_BYTES:
                    give_back(fd, offset - GIVEN_BACK_BYTES)
            os.pwrite(target, buffer[: size - offset], offset)
            if offset and offset % SYNCED_BYTES == 0:
                os.fdatasync(target)
                os.posix_fadvise(target, 0, offset, os.POSIX_FADV_DONTNEED)

    try:
        os.posix_fallocate(target, 0, size)
        in_threads(threads, work, threads)
        os.fsync(target)
    finally:
        for fd in (*fds, target):
            os.close(fd)


def memory_stream(inputs: int, array_bytes: int, threads: int) -> Callable[[int], None]:
    """A function(moved_bytes) that streams arrays, `inputs` in and one out, through memory.

    Arrays are `array_bytes` long, cut into pieces as a merge cuts its tiles, and gone through again
    until `moved_bytes` have been read and written.
    """
    words = array_bytes // 8
    rows = inputs + 1
    # Rows are skewed, or equal offsets would compete for the same cache sets. They are filled with
    # ones: untouched zeros would all be read from one page that the system shares.
    arrays = [np.ones(words + 64 * 9 * rows, np.uint64)[64 * 9 * i :][:words] for i in range(rows)]
    step = PIECE_BYTES // 8
    add = _adder(inputs)
    add(*(array[:8] for array in arrays))

    def run(moved_bytes: int) -> None:
        def work(numbers: Iterable[int]) -> None:
            for number in numbers:
                start = number * step % words
                add(*(array[start : start + step] for array in arrays))

        in_threads(threads, work, -(-moved_bytes // (PIECE_BYTES * rows)))

    return run


def _adder(inputs: int) -> Callable[..., None]:
    """out = in_1 + ... + in_n over 64-bit words; n is in the code, so that the loop vectorises."""
    import numba

    names = [f"a{i}" for i in range(inputs)]
    body = " + ".join(f"{name}[j]" for name in names)
    loop = f"    for j in range(out.size): out[j] = {body}"
    source = f"def add({', '.join(names)}, out):\n{loop}\n"
    scope: dict[str, Callable[..., None]] = {}
    exec(source, scope)
    return numba.njit(nogil=True, error_model="numpy")(scope["add"])
