"""Adding to a pool, removing from it, and checking it.

The order of steps is what keeps a pool whole. Adding: files to a folder beside, to the disk, into
place, then the manifest. Removing: the manifest, then the files. A crash between leaves at most a
folder that the manifest does not name, which is reported and never trusted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.durable import replace_file, sync
from optimer_engine.errors import (
    CheckpointError,
    MismatchError,
    OptimerError,
    OutputError,
    RecipeError,
)
from optimer_engine.lock import locked
from optimer_engine.pool.manifest import (
    MANIFEST,
    RESERVED,
    Entry,
    FileFacts,
    Manifest,
    read_manifest,
)
from optimer_engine.pool.source import Found, Note

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEPT = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""A vector's own files; a report of how it was written names folders of this machine."""
_INCOMING, _OUTGOING = ".incoming-", ".removed-"


def read(pool: str | Path) -> Manifest:
    """The manifest of a pool.

    Raises:
        CheckpointError: there is none, or it is not as it must be.
    """
    return read_manifest(Path(pool) / MANIFEST)


def add(
    pool: str | Path,
    source: str | Path,
    name: str | None = None,
    *,
    base: str | None = None,
    note: Note | None = None,
    link: bool = False,
    replace: bool = False,
) -> Entry:
    """Put a vector into a pool, which is made if there is none.

    Args:
        pool: the folder.
        source: a run folder of `optimer train`, a vector's folder, or a LoRA adapter's.
        name: in the pool; by default the dataset's, or the folder's.
        base: folder or Hub id of the base. Needed for the first vector that is no run folder, and
            for an adapter, whose files do not say what it is an adapter of.
        note: facts to keep; they win over what the source says.
        link: give the files a second name instead of copying them.
        replace: put it in the place of another vector of that name.

    Returns:
        The entry. A vector that is there already, with the same files, is left as it is.

    Raises:
        RecipeError: a name that cannot be one, no base given, a vector of that name.
        CheckpointError: `source` is not a vector.
        MismatchError: a vector of another base.
        OutputError: something else lies in its place, or the disk refuses.
    """
    pool = Path(pool)
    found = Found.look(Path(source), base, note or Note())
    name = found.name if name is None else name
    if not _NAME.fullmatch(name) or name.casefold() in RESERVED:
        raise RecipeError(
            f"{name!r} cannot be a vector's name",
            where="name",
            todo="use letters, digits, dot, dash and underscore, at most 64",
        )
    with locked(pool, wait=True):
        clean(pool)
        manifest = _manifest_for(pool, found)
        _refuse_case(manifest, name)
        incoming = pool / f"{_INCOMING}{name}"
        try:
            files = _take_files(found.folder, incoming, link)
            entry = msgspec.structs.replace(found.entry, name=name, files=files)
            return place(pool, manifest, entry, incoming, replace)
        except OSError as error:
            if isinstance(error, OptimerError):
                raise
            raise OutputError(f"cannot be written: {error.strerror}", where=str(pool)) from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)


def place(pool: Path, manifest: Manifest, entry: Entry, incoming: Path, replace: bool) -> Entry:
    """Move a complete folder into its place and name it in the manifest; the pool is locked.

    Raises:
        RecipeError: another vector of that name, and `replace` is not set.
        OutputError: a folder in its place that is neither in the manifest nor the same.
    """
    target, old = pool / entry.name, manifest.find(entry.name)
    if old is not None and old.files != entry.files and not replace:
        raise RecipeError(
            f"there is another {entry.name!r} in the pool",
            where=str(pool),
            todo="choose another name, or add --replace",
        )
    there = os.path.lexists(target)
    same = there and target.is_dir() and not target.is_symlink() and _facts(target) == entry.files
    if there and old is None and not same:  # a crash may leave this entry's files, nothing else
        raise OutputError(
            "is in the way, and the pool does not know it", where=str(target), todo="move it away"
        )
    out = pool / f"{_OUTGOING}{entry.name}"
    if there and not same:
        target.rename(out)
    if not same:
        incoming.rename(target)
        sync(pool)
    replace_file(pool / MANIFEST, manifest.with_entry(entry).encoded())
    _delete(out)
    return entry


def remove(pool: str | Path, name: str) -> None:
    """Take a vector out of a pool and delete its files.

    Raises:
        RecipeError: there is none of that name.
    """
    pool = Path(pool)
    read(pool)
    with locked(pool, wait=True):
        clean(pool)
        manifest = read(pool)
        entry = entry_of(manifest, pool, name)
        replace_file(pool / MANIFEST, manifest.without(entry.name).encoded())
        _delete(pool / entry.name)


def verify(pool: str | Path, names: Iterable[str] = ()) -> list[str]:
    """Compare a pool with its manifest, byte by byte.

    Args:
        names: vectors to check; all of them, and strays, by default.

    Returns:
        What is wrong, a line each; empty for a pool that is whole.
    """
    pool = Path(pool)
    manifest = read(pool)
    chosen = [entry_of(manifest, pool, name) for name in names] or manifest.vectors
    problems = []
    for entry in chosen:
        problems += [f"{entry.name}: {problem}" for problem in _problems(pool, manifest, entry)]
    if not names:
        known = {entry.name for entry in manifest.vectors} | {MANIFEST, "README.md"}
        strays = sorted(p.name for p in pool.iterdir() if p.name not in known)
        problems += [f"{name}: not in the manifest" for name in strays if not name.startswith(".")]
    return problems


def note_license(pool: Path, names: Iterable[str], license: str) -> Manifest:
    """Keep the license of the data of those vectors (all by default) that have none noted."""
    with locked(pool, wait=True):
        manifest = read(pool)
        wanted = set(names) or {entry.name for entry in manifest.vectors}
        for entry in manifest.vectors:
            if entry.name in wanted and entry.license is None:
                noted = msgspec.structs.replace(entry, license=license)
                manifest = manifest.with_entry(noted)
        replace_file(pool / MANIFEST, manifest.encoded())
    return manifest


def entry_of(manifest: Manifest, pool: str | Path, name: str) -> Entry:
    """The entry of that name.

    Raises:
        RecipeError: there is none; those that are there are named.
    """
    entry = manifest.find(name)
    if entry is None:
        there = ", ".join(e.name for e in manifest.vectors) or "nothing"
        raise RecipeError(f"no vector {name!r}; there is {there}", where=str(pool))
    return entry


def clean(pool: Path) -> None:
    """Undo what an interrupted step left behind; the pool is locked."""
    for leftover in pool.glob(f"{_INCOMING}*"):
        _delete(leftover)
    for leftover in pool.glob(f"{_OUTGOING}*"):
        name = leftover.name.removeprefix(_OUTGOING)
        known = (pool / MANIFEST).exists() and read(pool).find(name) is not None
        if known and not (pool / name).exists():
            leftover.rename(pool / name)  # its successor never arrived
        else:
            _delete(leftover)


def hash_file(path: Path) -> FileFacts:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileFacts(file.tell(), digest.hexdigest())


def _manifest_for(pool: Path, found: Found) -> Manifest:
    if not (pool / MANIFEST).exists():
        if found.base is None:
            raise RecipeError(
                "the first vector of a pool needs its base", where=str(pool), todo="add --base"
            )
        return Manifest(
            base=found.base,
            base_revision=found.base_revision,
            base_fingerprint=found.base_fingerprint,
        )
    manifest = read(pool)
    if manifest.base_fingerprint != found.base_fingerprint:
        raise MismatchError(
            f"it is a vector of a base of fingerprint {found.base_fingerprint[:16]}, the pool is"
            f" of {manifest.base}, {manifest.base_fingerprint[:16]}",
            where=str(found.folder),
            todo="vectors of different bases cannot be merged; make a pool for each base",
        )
    return manifest


def _refuse_case(manifest: Manifest, name: str) -> None:
    """Two names that one file system takes for the same."""
    for entry in manifest.vectors:
        if entry.name != name and entry.name.casefold() == name.casefold():
            raise RecipeError(f"there is {entry.name!r} in the pool", where=name)


def _take_files(folder: Path, incoming: Path, link: bool) -> dict[str, FileFacts]:
    """Copy or link a vector's files, to the disk; their facts."""
    incoming.mkdir()
    for path in _own_files(folder):
        target = incoming / path.name
        if link:
            try:
                target.hardlink_to(path.resolve())
                continue
            except OSError:
                pass
        shutil.copyfile(path, target)
        sync(target)
    sync(incoming)
    with Checkpoint.open(incoming):  # nothing it needs was left behind
        return _facts(incoming)


def _own_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in _KEPT for path in folder.glob(pattern) if path.is_file())


def _facts(folder: Path) -> dict[str, FileFacts]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _delete(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _problems(pool: Path, manifest: Manifest, entry: Entry) -> list[str]:
    folder = pool / entry.name
    if folder.is_symlink() or not folder.is_dir():
        return ["its folder is missing"]
    problems = []
    for name, facts in entry.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes, {facts.bytes} expected")
        elif hash_file(path) != facts:
            problems.append(f"{name} has other content than it had when it was added")
    strays = sorted({path.name for path in folder.iterdir()} - entry.files.keys())
    problems += [f"{name} is not in the manifest" for name in strays]
    if not problems:
        try:
            with Checkpoint.open(folder) as opened:
                if opened.kind != entry.kind:
                    problems.append(f"is a {opened.kind}, {entry.kind} expected")
                if opened.base_fingerprint not in (None, manifest.base_fingerprint):
                    problems.append("is a vector of another base")
        except CheckpointError as error:
            problems.append(error.what)
    return problems
