"""Downloads that run just ahead of a merge, within a limit of disk.

A merge is a sequence of *steps*; each reads some files, and which is known before it starts. Files
are fetched in the order of their first use, several at a time, by threads that stop at the limit
and go on when a file has been read for the last time and is removed. With no limit nothing is
removed: files go to the Hub's ordinary cache and the next run finds them there.

The limit cannot lock up: a file is fetched only after all that are used before it, so when space is
short, all that the earliest unfinished step needs is here already, or comes next.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.errors import OutputError, RecipeError
from optimer_engine.hub import DOWNLOADS
from optimer_engine.remote import HubCheckpoint
from optimer_engine.types import format_bytes

Read = tuple[Checkpoint, int]
"""A file of a checkpoint, by its number."""
Blank = tuple[HubCheckpoint, int]

MEM_BYTES = 40 << 20
"""What one download holds in memory, measured: pieces of 10 MiB, three times over."""
MARK = ".optimer-downloads"
"""Lies in the folder of downloads under a limit: only a folder with it in is ever removed."""
XET = {
    "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "16mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "128mb",
}
"""Settings, unless the user has others, for the client of the Hub's Xet storage, which would keep
gigabytes in memory, and perhaps on the disk, beside the files asked for."""
STOP_WAIT_S = 5.0
"""How long a cancelled download may take to notice; it is left behind then."""


def needs(steps: Sequence[Iterable[Read]]) -> tuple[int, int]:
    """What a merge downloads: (bytes in all, least disk in bytes if files are dropped after use).

    Args:
        steps: the files that each step reads, in the order of the steps.
    """
    plan = _Order(steps)
    held = most = 0
    for number, files in enumerate(plan.steps):
        held += sum(_size(file) for file in files if plan.first[file] == number)
        most = max(most, held)
        held -= sum(_size(file) for file in files if plan.last[file] == number)
    return sum(map(_size, plan.first)), most


def memory_bytes(checkpoints: Iterable[Checkpoint | None]) -> int:
    """Upper bound of what downloads add to the memory of a merge of these checkpoints."""
    blank = any(isinstance(c, HubCheckpoint) and c.blanks for c in checkpoints)
    return DOWNLOADS * MEM_BYTES if blank else 0


def check_limit(steps: Sequence[Iterable[Read]], limit_bytes: int) -> None:
    """Refuse a limit under which a merge cannot run.

    Raises:
        RecipeError: naming the smallest limit that would do, and the files needed at once.
    """
    _, most = needs(steps)
    if most <= limit_bytes:
        return
    plan = _Order(steps)
    for number in range(len(plan.steps)):
        live = [f for f in plan.first if plan.first[f] <= number <= plan.last[f]]
        if sum(map(_size, live)) == most:
            break
    names = [f"{checkpoint.snapshot}/{checkpoint.name_of(file)}" for checkpoint, file in live]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise RecipeError(
        f"{format_bytes(limit_bytes)} is too small: {len(names)} files of together"
        f" {most} bytes ({format_bytes(most)}) are needed at the same time: {shown}",
        where="disk limit",
        todo=f"give at least {most}, or no limit",
    )


class Downloads:
    """Keeps the files of the next steps on the disk; a context manager.

    Args:
        steps: the files that each step reads, in the order of the steps; local ones are ignored.
        limit_bytes: most that downloaded files may take at any time; None for the cache and no
            limit.
        folder: where they go under a limit; removed at the end, and first if a killed run left it.
        arrived: called with (file, bytes) as they come, from several threads at once.
    """

    def __init__(
        self,
        steps: Sequence[Iterable[Read]],
        *,
        limit_bytes: int | None,
        folder: Path,
        arrived: Callable[[str, int], None] = lambda name, count: None,
    ) -> None:
        self._order = _Order(steps)
        self._limited, self._folder, self._arrived = limit_bytes is not None, folder, arrived
        self._limit_bytes = limit_bytes
        self._queue = deque(self._order.first)
        self._left = {file: len(uses) for file, uses in self._order.uses.items()}
        self._here: set[Blank] = set()
        self._ready: set[int] = set()
        self._held_bytes = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Downloads:
        """Check the disk and start.

        Raises:
            OutputError: the disk has less space than is needed, or the folder is somebody's.
        """
        if not self._queue:
            return self
        total, most = needs(self._order.steps)
        for name, value in XET.items():
            os.environ.setdefault(name, value)
        if self._limited:
            self._take_folder()
            place, needed = self._folder, most
        else:
            from huggingface_hub import constants

            place, needed = Path(constants.HF_HUB_CACHE), total
        free = shutil.disk_usage(_existing(place)).free
        if free < needed:
            self._remove_folder()
            raise OutputError(
                f"{format_bytes(needed)} are to be downloaded, {format_bytes(free)} are free",
                where=str(place),
                todo="free some space"
                + ("" if self._limited else f", or give --disk-limit (at least {most})"),
            )
        if self._limit_bytes is not None:
            self._limit_bytes = min(self._limit_bytes, free)
        for number in range(min(DOWNLOADS, len(self._queue))):
            thread = threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and remove what was downloaded under a limit."""
        self.stop()
        for thread in self._threads:
            thread.join(STOP_WAIT_S)
        if self._limited:
            for checkpoint, file in list(self._here):
                checkpoint.drop(file)
            self._here.clear()
        self._remove_folder()

    def stop(self) -> None:
        """End all downloads soon; whoever waits in `need` is let go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def need(self, step: int) -> bool:
        """Wait until all files of a step are here; False when `stop` was called meanwhile.

        Raises:
            DownloadError, CheckpointError: a download failed.
        """
        wanted = self._order.steps[step]
        if step in self._ready or not wanted:
            return True
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or self._stopped or self._here.issuperset(wanted)
            )
            if self._error is not None:
                raise self._error
            if self._stopped:
                return False
            self._ready.add(step)
            return True

    def done(self, step: int) -> None:
        """A step is over: files that no other step needs are removed if there is a limit."""
        for file in self._order.steps[step]:
            with self._changed:
                self._left[file] -= 1
                over = self._left[file] == 0 and self._limited
            if over:
                file[0].drop(file[1])
                with self._changed:
                    self._here.discard(file)
                    self._held_bytes -= _size(file)
                    self._changed.notify_all()

    def _work(self) -> None:
        while (blank := self._next()) is not None:
            checkpoint, file = blank
            name = f"{checkpoint.snapshot}/{checkpoint.name_of(file)}"
            try:
                path = checkpoint.fetch(
                    file,
                    self._folder if self._limited else None,
                    lambda count, name=name: self._tell(name, count),  # type: ignore[misc]
                )
                with self._changed:
                    if self._stopped:  # the checkpoint may be closed by now
                        return
                    checkpoint.place(file, path)
                    self._here.add(blank)
                    self._changed.notify_all()
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return

    def _next(self) -> Blank | None:
        """The next file to fetch, when there is room for it; None when there is none."""
        with self._changed:
            while not (self._stopped or self._error) and self._queue:
                size = _size(self._queue[0])
                if self._limit_bytes is None or self._held_bytes + size <= self._limit_bytes:
                    self._held_bytes += size
                    return self._queue.popleft()
                self._changed.wait()
            return None

    def _tell(self, name: str, count: int) -> None:
        if self._stopped or self._error:
            raise _Stopped
        self._arrived(name, count)

    def _take_folder(self) -> None:
        if self._folder.exists() and not (self._folder / MARK).exists():
            raise OutputError(
                "exists, and downloads would go there",
                where=str(self._folder),
                todo="rename it, or choose another output",
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        (self._folder / MARK).touch()

    def _remove_folder(self) -> None:
        if (self._folder / MARK).exists():
            shutil.rmtree(self._folder, ignore_errors=True)


class _Stopped(Exception):
    """Ends a download that nobody waits for any more."""


class _Order:
    """Blank files of each step, and the first and last step that uses each, by first use."""

    def __init__(self, steps: Sequence[Iterable[Read]]) -> None:
        self.steps: list[frozenset[Blank]] = []
        self.uses: dict[Blank, list[int]] = {}
        for number, reads in enumerate(steps):
            blank = dict.fromkeys(
                (checkpoint, file)
                for checkpoint, file in reads
                if isinstance(checkpoint, HubCheckpoint) and file in checkpoint.blanks
            )
            for file in blank:
                self.uses.setdefault(file, []).append(number)
            self.steps.append(frozenset(blank))
        self.first = {file: numbers[0] for file, numbers in self.uses.items()}
        self.last = {file: numbers[-1] for file, numbers in self.uses.items()}


def _size(file: Blank) -> int:
    return file[0].blanks[file[1]]


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
