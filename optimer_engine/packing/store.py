"""The files of a vector while they are written: sizes are known only when all is packed.

The header stands at the front of a safetensors file and says where everything lies. Room for the
longest header that can come out is left free, parts are appended behind it, and the header is
written last, filled up with spaces. As with every output, the folder appears when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import struct
from pathlib import Path

import msgspec
import numpy as np

from optimer_engine.durable import sync
from optimer_engine.errors import OutputError, RecipeError
from optimer_engine.journal import hash_range
from optimer_engine.report import Digest, Report
from optimer_engine.types import DType

SYNC_BYTES = 64 << 20
"""Written data goes to the disk in pieces of this size, so that dirty pages do not pile up."""


class PartsFile:
    """One safetensors file, parts in the order in which they are first named.

    Args:
        metadata: as long as the header's will be, or longer.
        longest: (name, dimensions) of every part that may come, to leave room for.
        most_bytes: more data than will come.
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, str],
        longest: list[tuple[str, int]],
        most_bytes: int,
    ) -> None:
        self.path = path
        self._parts: dict[str, tuple[DType, tuple[int, ...] | None, int, int]] = {}
        number = max(most_bytes, 10**9)
        worst = {
            name: _entry(DType.BF16, [number] * rank, number, number) for name, rank in longest
        }
        self._start = 8 + -(-len(msgspec.json.encode({"__metadata__": metadata, **worst})) // 8) * 8
        self._end, self._unsynced = self._start, 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self.fd = os.open(path, flags, 0o666)

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

    def write(self, offset: int, data: np.ndarray) -> None:
        """Bytes at their place; called by many threads."""
        left, at = memoryview(data.view(np.uint8)), offset  # type: ignore[arg-type]
        while left:
            done = os.pwrite(self.fd, left, at)
            left, at = left[done:], at + done
        self._unsynced += data.nbytes
        if self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            os.fdatasync(self.fd)

    def finish(self, metadata: dict[str, str]) -> list[Digest]:
        """Write the header, sync, and hash the file.

        Returns:
            Digests that cover it.
        """
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
        header = struct.pack("<Q", room) + text + b" " * (room - len(text))
        self.write(0, np.frombuffer(header, np.uint8))
        os.fsync(self.fd)
        cuts = [*range(0, self._end, SYNC_BYTES), self._end]
        return [
            (begin, end, hash_range(self.fd, begin, end)) for begin, end in itertools.pairwise(cuts)
        ]

    @property
    def weight_map(self) -> dict[str, str]:
        """Part to file name, for the index of several files."""
        return dict.fromkeys(self._parts, self.path.name)

    @property
    def data_bytes(self) -> int:
        """Bytes of parts so far."""
        return self._end - self._start

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def _entry(dtype: DType, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype.code, "shape": shape, "data_offsets": [begin, end]}


class OutFolder:
    """OUT.partial beside OUT, renamed when complete and removed on any error.

    Raises:
        RecipeError: `out` is there already, or in or around an input, or being written.
        OutputError: the disk refuses.
    """

    def __init__(self, out: Path, inputs: list[Path]) -> None:
        self.out, self.partial = out, out.parent / f"{out.name}.partial"
        resolved = out.resolve()
        for folder in (path.resolve() for path in inputs):
            if resolved == folder or resolved in folder.parents or folder in resolved.parents:
                raise RecipeError(
                    f"lies in or around the input {folder}",
                    where=str(out),
                    todo="write the output somewhere else",
                )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RecipeError(
                "exists and is not an empty folder",
                where=str(out),
                todo="choose another output or remove it first",
            )
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise RecipeError(
                "another run is writing it now", where=str(out), todo="wait for it"
            ) from None
        except OSError as error:
            raise self.failed(error) from error
        for leftover in self.partial.iterdir():
            leftover.unlink()

    def publish(self, report: Report, weight_map: dict[str, str]) -> None:
        """Add the index, if there are several files, and report.json; rename into place."""
        report.out = str(self.out)
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
            name = "vector.safetensors.index.json"
            size = self._write(name, json.dumps(index, indent=2, ensure_ascii=False))
            path = self.partial / name
            with path.open("rb") as file:
                report.files[name] = [(0, size, hash_range(file.fileno(), 0, size))]
        self._write("report.json", json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        os.fsync(self._lock)
        self.partial.rename(self.out)
        sync(self.out.parent)
        os.close(self._lock)

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    def failed(self, error: OSError) -> OutputError:
        """What the disk said, as an error of ours."""
        todo = "free some space" if error.errno == errno.ENOSPC else "check the disk and the folder"
        return OutputError(
            f"cannot be written: {error.strerror}",
            where=str(self.out),
            todo=f"{todo}, then run the same command again",
        )

    def _write(self, name: str, text: str) -> int:
        content = (text + "\n").encode()
        with (self.partial / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return len(content)
