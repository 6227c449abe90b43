"""The read side: a folder of safetensors files, opened lazily and validated before anything runs.

Opening reads headers only. Each file is opened once and the descriptor is kept, so a file replaced
meanwhile stays the old one; its size and times are remembered and checked again after the merge.
Elements come by one of two backends with the same bits. "pread", the default, copies them into the
caller's buffer: a truncated file is an error, memory stays flat, and on warm files it is as fast.
"mmap" hands out views of a lazy memory mapping, advised ahead and released behind the reader; a
file cut meanwhile kills the process (SIGBUS), as it does every program that maps files.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from optimer_engine.errors import CheckpointError, quoted
from optimer_engine.model_folder import (
    ADAPTER,
    MODEL,
    VECTOR,
    check_config,
    kind_of,
    read_config,
    read_weight_map,
)
from optimer_engine.safetensors_format import read_header
from optimer_engine.types import FP8, TensorInfo

__all__ = ["ADAPTER", "COMPANIONS", "MODEL", "VECTOR", "Backend", "Checkpoint"]

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*processor_config.json",
)
"""The data files beside the weights that a model needs: configuration and tokenizer, never code."""

Backend = Literal["pread", "mmap"]

_SCALES = (".weight_scale_inv", ".weight_scale", ".input_scale")

RELEASE_BYTES = 16 << 20
"""The mmap backend releases pages in pieces of this size: smaller ones split large pages."""

PAGE = mmap.PAGESIZE

FREE_BYTES = 8 << 20
"""Pages of the cache are given back in pieces of this size, one piece behind the reader."""

SAMPLE_BYTES = 2048
"""The fingerprint reads this much at either end of each tensor; a small one whole."""

SMALL_BYTES = 64 << 10
"""Small tensors are fingerprinted together, so much at a time."""


@dataclass(frozen=True)
class _File:
    path: Path
    fd: int
    identity: tuple[int, ...]


class Checkpoint:
    """A full checkpoint or a distribution vector in a folder; use as a context manager or close().

    Attributes:
        folder: where it lies.
        kind: "model", "vector" for a folder written by `optimer extract`, or "adapter_model".
        tensors: name to TensorInfo, in file order; without the scales of fp8 weights.
        scales: for an fp8 weight that is stored with a scale, the scale's tensor.
        metadata: the first file's header metadata.
        config: config.json as data ({} for a vector without one), adapter_config.json for an
            adapter; nothing in it is executed.
        read_bytes, read_s: what `read_into` has read so far, and the time its callers waited.
    """

    def __init__(
        self, folder: Path, kind: str, config: dict[str, Any], backend: Backend = "pread"
    ) -> None:
        self.folder, self.kind, self.config, self.backend = folder, kind, config, backend
        self.tensors: dict[str, TensorInfo] = {}
        self.scales: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self.files: list[_File] = []
        self._maps: dict[int, mmap.mmap] = {}
        self._released: dict[int, int] = {}
        self._freed: dict[int, int] = {}
        self._noted: list[str] = []
        self.read_bytes, self.read_s = 0, 0.0
        self._clock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path, *, backend: Backend = "pread") -> Checkpoint:
        """Read index and headers of `folder`; `backend` is how elements are read later.

        Raises:
            CheckpointError: when the folder, its index, a header or config.json is not as it must
                be, or two loaders would read it differently.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError("no such folder", where=str(folder), todo="check the path")
        kind = kind_of(folder)
        checkpoint = cls(folder, kind, read_config(folder, kind), backend)
        try:
            index = folder / f"{kind}.safetensors.index.json"
            if os.path.lexists(index):
                checkpoint._open_shards(index)
            else:
                checkpoint._add_file(folder / f"{kind}.safetensors")
            if kind == MODEL:
                checkpoint._noted += check_config(folder, checkpoint.config, checkpoint.tensors)
            checkpoint._set_scales_apart()
            odd = [name for name in checkpoint.tensors if quoted(name) != name]
            if odd:
                checkpoint._noted.append(
                    f"{folder}: {len(odd)} tensor names hold characters that are not plain, such as"
                    f" {quoted(odd[0])[:80]!r}"
                )
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def _set_scales_apart(self) -> None:
        """Scales are part of their fp8 weights, not tensors to merge.

        `weight_scale_inv` (Transformers' finegrained fp8, DeepSeek) and `weight_scale`
        (compressed-tensors, FBGEMM) both multiply; `input_scale` is of activations.
        """
        for name in [n for n in self.tensors if n.endswith(_SCALES)]:
            stem = name.rpartition("_scale")[0]
            weight = self.tensors.get(stem)
            if weight is None and name.endswith(".input_scale"):
                weight = self.tensors.get(name.removesuffix("input_scale") + "weight")
            if weight is None or weight.dtype not in FP8:
                continue
            info = self.tensors.pop(name)
            if not name.endswith(".input_scale"):
                self.scales[weight.name] = info

    def _open_shards(self, index: Path) -> None:
        weight_map, self._noted = read_weight_map(index)
        for shard in sorted(set(weight_map.values())):
            self._add_file(self.folder / shard)
        for name in sorted(weight_map.keys() | self.tensors.keys()):
            info = self.tensors.get(name)
            lies = None if info is None else self.files[info.file].path.name
            listed = weight_map.get(name)
            if lies != listed:
                there = [f"in {quoted(file)}" if file else "nowhere" for file in (lies, listed)]
                raise CheckpointError(
                    f"{quoted(name)} lies {there[0]}, listed {there[1]}",
                    where=str(index),
                    todo="download or save the checkpoint again",
                )

    def _add_file(self, path: Path) -> None:
        # O_NONBLOCK: a FIFO must be refused, not waited for.
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(
                f"cannot be opened: {error.strerror}",
                where=str(path),
                todo="check the file, its permissions and where it links to",
            ) from error
        self.files.append(_File(path, fd, _identity(fd)))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(
                "is not a regular file", where=str(path), todo="copy the original file there"
            )
        tensors, metadata = read_header(fd, path, len(self.files) - 1)
        twice = sorted(tensors.keys() & self.tensors.keys())
        if twice:
            other = self.files[self.tensors[twice[0]].file].path.name
            raise CheckpointError(
                f"{quoted(twice[0])} lies here and in {other}",
                where=str(path),
                todo="download or save the checkpoint again",
            )
        self.tensors.update(sorted(tensors.items(), key=lambda item: item[1].offset))
        self.metadata = self.metadata or metadata

    @property
    def base_fingerprint(self) -> str | None:
        """For a vector, the fingerprint of the base it was taken from."""
        return self.metadata.get("base_fingerprint") if self.kind == VECTOR else None

    @property
    def ties_embeddings(self) -> bool:
        """Whether config.json ties lm_head to the embeddings (Transformers' default is yes)."""
        text = self.config.get("text_config")
        inner = text if isinstance(text, dict) else {}
        return bool(self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over names, dtypes, shapes and both ends of every tensor.

        It does not depend on how the tensors are spread over files. A few KiB are read per tensor,
        so it identifies a checkpoint among others; it does not prove every byte.
        """
        digest = hashlib.sha256()
        held, place, begin = memoryview(b""), -1, 0
        every = {info.name: info for info in (*self.tensors.values(), *self.scales.values())}
        for name in sorted(every):
            info = every[name]
            digest.update(msgspec.json.encode([name, info.dtype.code, info.shape]))
            for offset, nbytes in _samples(info):
                if info.file != place or not begin <= offset <= begin + len(held) - nbytes:
                    place, begin, size = info.file, offset, nbytes
                    if info.nbytes <= 2 * SAMPLE_BYTES:  # small ones seldom come alone
                        left = os.fstat(self.files[place].fd).st_size - offset
                        size = max(nbytes, min(SMALL_BYTES, left))
                    held = memoryview(bytearray(size))
                    self._read_alone(place, begin, held)
                digest.update(held[offset - begin :][:nbytes])
        for file in self.files:
            _advise(file.fd, 0, 0, "NORMAL")
        return digest.hexdigest()

    def _read_alone(self, file: int, offset: int, buffer: memoryview) -> None:
        """As `read_into`; no page stays in the cache that was not there before.

        A page here and there would cut what the system later reads ahead of the merge into pieces:
        cold merges took half as long again.
        """
        fd, cold = self.files[file].fd, False
        try:
            if os.preadv(fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer):
                return
        except BlockingIOError:
            cold = True
            _advise(fd, 0, 0, "RANDOM")  # nothing is read ahead
        except (AttributeError, OSError):
            pass  # this system cannot tell
        self.read_into(file, offset, buffer)
        if cold:
            start, stop = offset // PAGE * PAGE, -(-(offset + len(buffer)) // PAGE) * PAGE
            _advise(fd, start, stop - start, "DONTNEED")

    @property
    def identity(self) -> str:
        """What tells it from other checkpoints: the Hub's own hashes, else the fingerprint."""
        return self.fingerprint

    @property
    def origin(self) -> dict[str, Any]:
        """Repository, commit and file hashes of a checkpoint from the Hub; {} for a folder."""
        return {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noticed while opening and not refused."""
        return tuple(self._noted)

    def samples(self, file: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of all that the fingerprint reads of one file."""
        for info in (*self.tensors.values(), *self.scales.values()):
            if info.file == file:
                yield from _samples(info)

    def reopen(self, file: int, path: Path) -> None:
        """Put the file at `path`, of the same header, behind the descriptor of file number `file`.

        Nothing may be reading the old one.

        Raises:
            CheckpointError: it cannot be opened or has another size.
        """
        old = self.files[file]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", where=str(path)) from error
        try:
            size, expected = os.fstat(fd).st_size, os.fstat(old.fd).st_size
            if size != expected:
                raise CheckpointError(f"{size} bytes, {expected} expected", where=str(path))
            os.dup2(fd, old.fd, inheritable=False)
        finally:
            os.close(fd)
        self._maps.pop(file, None)
        self._released.pop(file, None)
        self.files[file] = _File(path, old.fd, _identity(old.fd))

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from `offset` of file number `file`; releases the GIL.

        Raises:
            CheckpointError: when the file ends early or the disk fails.
        """
        begun, done = time.perf_counter(), 0
        try:
            while done < len(buffer):
                count = os.preadv(self.files[file].fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"ended at byte {offset + done} while being read, {offset + len(buffer)}"
                        " expected",
                        where=str(self.files[file].path),
                        todo="the file was cut meanwhile; restore it and run again",
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"reading failed: {error.strerror}", where=str(self.files[file].path)
            ) from error
        with self._clock:
            self.read_bytes += done
            self.read_s += time.perf_counter() - begun

    def read_elems(self, file: int, offset: int, size: int, buffer: np.ndarray) -> np.ndarray:
        """`size` bytes from `offset` of file number `file`, by the checkpoint's backend.

        Args:
            buffer: uint8, at least `size` long; holds the result, unless that is a view.

        Raises:
            CheckpointError: as `read_into` does.
        """
        if self.backend == "pread":
            self.read_into(file, offset, buffer[:size].data)
            return buffer[:size]
        mapped = self._map(file)
        behind = offset // RELEASE_BYTES * RELEASE_BYTES - RELEASE_BYTES
        if file not in self._released:
            for other in self._released:  # the engine goes from file to file
                self._maps[other].madvise(mmap.MADV_DONTNEED)
            self._released[file] = 0
        last = self._released[file]
        if behind > last:
            # Dropped pages are read again if a slow thread still needs them.
            self._released[file] = behind
            mapped.madvise(mmap.MADV_DONTNEED, last, behind - last)
            ahead = min(len(mapped) - behind, 3 * RELEASE_BYTES)
            mapped.madvise(mmap.MADV_WILLNEED, behind, ahead)
        return np.frombuffer(mapped, np.uint8, size, offset)

    def free_behind(self, file: int, offset: int) -> None:
        """Give what lies well before `offset` back from the page cache to the system."""
        behind = offset // FREE_BYTES * FREE_BYTES - FREE_BYTES
        last = self._freed.get(file, 0)
        if behind > last:
            self._freed[file] = behind
            _advise(self.files[file].fd, last, behind - last, "DONTNEED")

    def view(self, name: str) -> np.ndarray:
        """Tensor `name` as a read-only array on a lazy memory mapping, in its storage dtype.

        bf16 and fp16 come as uint16 bits. No byte is read until it is touched.
        """
        info = self.tensors[name]
        storage = info.dtype.storage
        count = info.nbytes // storage.itemsize
        return np.frombuffer(self._map(info.file), storage, count, info.offset).reshape(info.shape)

    def _map(self, file: int) -> mmap.mmap:
        if file not in self._maps:
            self._maps[file] = mmap.mmap(self.files[file].fd, 0, prot=mmap.PROT_READ)
            self._maps[file].madvise(mmap.MADV_SEQUENTIAL)
        return self._maps[file]

    def here(self, file: int) -> bool:
        """Whether file number `file` lies on this machine."""
        return True

    def bring(self, file: int) -> None:
        """Have file number `file` on this machine; it is."""

    def check_hashes(self) -> None:
        """Nobody published hashes of a folder's files; see `remote.HubCheckpoint`."""

    def check_unchanged(self) -> None:
        """Compare every open file with what it was when opened.

        Raises:
            CheckpointError: when a file was written to, cut or grown since.
        """
        for file in self.files:
            if _identity(file.fd) != file.identity:
                raise CheckpointError(
                    "was changed while it was being read",
                    where=str(file.path),
                    todo="let nothing write to the sources during a merge, and run again",
                )

    def close(self) -> None:
        """Close the files. Views stay valid until they are garbage."""
        for file in self.files:
            os.close(file.fd)
        self.files, self._maps = [], {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "files", None):
            self.close()


def _samples(info: TensorInfo) -> Iterator[tuple[int, int]]:
    if info.nbytes <= 2 * SAMPLE_BYTES:
        yield info.offset, info.nbytes
    else:
        yield info.offset, SAMPLE_BYTES
        yield info.offset + info.nbytes - SAMPLE_BYTES, SAMPLE_BYTES


def _advise(fd: int, offset: int, size: int, advice: str) -> None:
    """Tell the system how bytes will be read, where it listens; size 0 is to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, getattr(os, f"POSIX_FADV_{advice}"))


def _identity(fd: int) -> tuple[int, ...]:
    found = os.fstat(fd)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
