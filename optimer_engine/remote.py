"""A checkpoint on the Hub, opened without its weights.

Of every file that is not here only the header is read, by a range request, into a *blank*: a sparse
local file of the right size with the header in it and nothing behind. Offsets are right and strict
reading works, so a plan is complete before the first weight moves. When a file's time comes it is
downloaded whole and put behind the same descriptor; when it is done with, the blank comes back.

The alternative, reading tiles by range requests, needs no disk, but a request per tile and source,
and bytes that come in pieces cannot be held against the hash that the Hub publishes of the whole.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.checkpoint import ADAPTER, Checkpoint
from optimer_engine.errors import CheckpointError
from optimer_engine.hub import DOWNLOADS, MISSING_OFFLINE, find, gather
from optimer_engine.network import DownloadError
from optimer_engine.safetensors_format import MAX_HEADER_BYTES
from optimer_engine.snapshot import Snapshot

HEADER_BYTES = 128 * 1024
"""Read first of each file: the header of most, and one request for both its parts."""
GAP_BYTES = 64 * 1024
"""Pieces nearer to each other than this are read by one request."""
REQUESTS = 16
"""Range requests at the same time."""


def open_checkpoint(
    model: str, revision: str | None = None, *, whole: bool = True, **how: Any
) -> Checkpoint:
    """Open what `model` names, a folder or a repository on the Hub.

    Args:
        model, revision: see `hub.find`.
        whole: download all of it first; else headers, and the rest when it is asked for.
        how: as for `Checkpoint.open`.

    Raises:
        CheckpointError, DownloadError: see `hub.find` and `Checkpoint.open`.
    """
    found = find(model, revision)
    if isinstance(found, Path):
        return Checkpoint.open(found, **how)
    return HubCheckpoint.whole(found, **how) if whole else HubCheckpoint.at(found, **how)


class HubCheckpoint(Checkpoint):
    """A repository at one commit, some of whose files may be blank.

    Attributes:
        snapshot: the repository and the commit.
        blanks: number of each file that was not here when it was opened, to its size in bytes.
    """

    snapshot: Snapshot
    blanks: dict[int, int]
    _absent: set[int]
    _sampled: set[int]
    _right: frozenset[int] = frozenset()
    _sampling = False
    _remove: weakref.finalize[..., HubCheckpoint]

    @classmethod
    def whole(cls, snapshot: Snapshot, **how: Any) -> HubCheckpoint:
        """Open a repository in the cache's folder, downloading what is not there."""
        folder = gather(snapshot)
        checkpoint = cls.open(folder, **how)
        assert isinstance(checkpoint, HubCheckpoint)
        checkpoint.snapshot, checkpoint.blanks = snapshot, {}
        checkpoint._absent, checkpoint._sampled = set(), set()
        return checkpoint

    @classmethod
    def at(cls, snapshot: Snapshot, **how: Any) -> HubCheckpoint:
        """Open a repository: headers, configuration and tokenizer are fetched, weights are not."""
        staging = Path(tempfile.mkdtemp(prefix="optimer-"))
        folder = staging / snapshot.repo
        try:
            folder.mkdir(parents=True)
            blank_names = _stage(snapshot, folder)
            checkpoint = cls.open(folder, **how)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, CheckpointError):
                error.where = error.where.replace(str(folder), str(snapshot))
                if snapshot.offline and "missing" in error.what:
                    error.todo = MISSING_OFFLINE
            raise
        assert isinstance(checkpoint, HubCheckpoint)
        checkpoint.snapshot = snapshot
        # Also for a checkpoint that nobody closes, or a process that ends first.
        checkpoint._remove = weakref.finalize(checkpoint, shutil.rmtree, staging, True)
        checkpoint.blanks = {
            number: snapshot.files[file.path.name].size_bytes
            for number, file in enumerate(checkpoint.files)
            if file.path.name in blank_names
        }
        checkpoint._absent, checkpoint._sampled = set(checkpoint.blanks), set()
        return checkpoint

    def here(self, file: int) -> bool:
        """Whether file number `file` was downloaded, or is in the cache."""
        return file not in self._absent

    def bring(self, file: int) -> None:
        """Download file number `file`, unless it is here."""
        if file in self._absent:
            self.place(file, self.fetch(file, None, lambda count: None))

    def check_hashes(self) -> None:
        """Compare the files that the cache had with the Hub's hashes, each once for ever.

        Raises:
            CheckpointError: one is damaged, and cannot be had again.
            DownloadError: one was damaged; the same command will find the right one.
        """
        numbers = set(range(len(self.files))) - self._absent - self._right
        names = [self.name_of(number) for number in sorted(numbers)]
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            found = list(pool.map(self.snapshot.checked, names))
        for name, path in zip(names, found, strict=True):
            if path is None:
                self.snapshot.fetch(name)
                raise DownloadError(
                    "the copy in the cache was damaged; it was downloaded again",
                    where=f"{self.snapshot}/{name}",
                    todo="run the same command again",
                )
        self._right |= numbers

    def name_of(self, file: int) -> str:
        """The name of a file in its repository."""
        return self.files[file].path.name

    def fetch(self, file: int, folder: Path | None, arrived: Callable[[int], None]) -> Path:
        """Download a blank into the cache, or below `folder`; see `Snapshot.fetch`."""
        into = folder / self.snapshot.repo / self.snapshot.commit if folder else None
        return self.snapshot.fetch(self.name_of(file), into, arrived)

    def place(self, file: int, path: Path) -> None:
        """Put a downloaded file where its blank was, which keeps what the fingerprint samples."""
        if file not in self._sampled:
            with path.open("rb", buffering=0) as whole:
                pieces = [(at, os.pread(whole.fileno(), n, at)) for at, n in self.samples(file)]
            self._fill(file, pieces)
            self._sampled.add(file)
        self.reopen(file, path)
        self._absent.discard(file)

    def drop(self, file: int) -> None:
        """Remove a downloaded file; the blank is back in its place."""
        path = self.files[file].path
        self._absent.add(file)
        self.reopen(file, self.folder / path.name)
        path.unlink(missing_ok=True)

    @cached_property
    def fingerprint(self) -> str:
        """As of any checkpoint; what it samples of blanks is read by range requests.

        Two short requests per large tensor, many at a time. Files that were here once
        need none: their samples stay in the blanks.
        """
        self._sample()
        self._sampling = True
        try:
            return Checkpoint.fingerprint.func(self)  # type: ignore[attr-defined, no-any-return]
        finally:
            self._sampling = False

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """As of any checkpoint; what is not here is read by a range request."""
        if file in self._absent and not self._sampling:
            buffer[:] = self.snapshot.read(self.name_of(file), offset, offset + len(buffer))
        else:
            super().read_into(file, offset, buffer)

    def _map(self, file: int) -> mmap.mmap:
        self.bring(file)
        return super()._map(file)

    @cached_property
    def identity(self) -> str:
        """sha256 (hex) over the hashes that the Hub publishes of the files with tensors."""
        names = sorted(file.path.name for file in self.files)
        listed = [[name, self.snapshot.files[name].digest] for name in names]
        if not all(digest for _, digest in listed):
            return self.fingerprint
        return hashlib.sha256(msgspec.json.encode([self.kind, listed])).hexdigest()

    @property
    def origin(self) -> dict[str, Any]:
        """Where it comes from, as data: repository, commit, and the hash of each file read."""
        names = [file.path.name for file in self.files]
        files = {name: self.snapshot.files[name].digest for name in names}
        return {"repo": self.snapshot.repo, "commit": self.snapshot.commit, "files": files}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the repository."""
        return (*self.snapshot.notes, *super().notes)

    def close(self) -> None:
        """Close the files and remove the blanks."""
        super().close()
        if hasattr(self, "_remove"):
            self._remove()

    def _sample(self) -> None:
        """Read the samples of the files that never were here."""
        ranges: list[list[int]] = []
        for file in set(self.blanks) - self._sampled:
            for begin, nbytes in sorted(self.samples(file)):
                last = ranges[-1] if ranges else [-1, 0, 0]
                if last[0] == file and begin - last[2] <= GAP_BYTES:
                    last[2] = max(last[2], begin + nbytes)
                elif nbytes:
                    ranges.append([file, begin, begin + nbytes])

        def read(piece: list[int]) -> bytes:
            return self.snapshot.read(self.name_of(piece[0]), piece[1], piece[2])

        with ThreadPoolExecutor(REQUESTS) as pool:
            found = list(zip(ranges, pool.map(read, ranges), strict=True))
        for file in set(self.blanks) - self._sampled:
            self._fill(file, [(piece[1], data) for piece, data in found if piece[0] == file])
            self.reopen(file, self.files[file].path)
            self._sampled.add(file)

    def _fill(self, file: int, pieces: list[tuple[int, bytes]]) -> None:
        """Put pieces of a file into its blank."""
        with (self.folder / self.name_of(file)).open("r+b", buffering=0) as blank:
            for offset, data in pieces:
                os.pwrite(blank.fileno(), data, offset)


def _stage(snapshot: Snapshot, folder: Path) -> set[str]:
    """Make `folder` look like the repository; returns the names of those files that are blank.

    What is in the cache is linked; so is an adapter, which is small and mapped. Pickles are there
    by name, empty, so that a repository of nothing else is refused in the words of a folder.
    """
    kept = snapshot.companions()
    weights = [name for name in snapshot.weights() if name in snapshot.files]
    blanks = []

    def link(name: str) -> None:
        # Weights are hashed when they are about to be read; what decides the plan is now.
        found = snapshot.cached(name) if name in weights else snapshot.checked(name)
        (folder / name).symlink_to((found or snapshot.fetch(name)).resolve())

    for name in weights:
        if snapshot.cached(name) is None and not name.startswith(ADAPTER):
            blanks.append(name)
        else:
            kept.append(name)
    if not weights:
        for name in snapshot.files:
            if name.endswith((".bin", ".pt")):
                (folder / name).touch()
    with ThreadPoolExecutor(REQUESTS) as pool:
        for done in [
            *(pool.submit(link, name) for name in kept),
            *(pool.submit(_make_blank, snapshot, name, folder / name) for name in blanks),
        ]:
            done.result()
    return set(blanks)


def _make_blank(snapshot: Snapshot, name: str, path: Path) -> None:
    size = snapshot.files[name].size_bytes
    start = snapshot.read(name, 0, min(HEADER_BYTES, size)) if size else b""
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
    if len(start) < 8 + length <= min(8 + MAX_HEADER_BYTES, size):
        start += snapshot.read(name, len(start), 8 + length)
    with path.open("wb") as blank:
        blank.write(start)
        blank.truncate(size)
