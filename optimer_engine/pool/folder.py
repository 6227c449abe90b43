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
from typing import Any

import msgspec

from optimer_engine.checkpoint import ADAPTER, MODEL, VECTOR, Checkpoint
from optimer_engine.durable import replace_file, sync
from optimer_engine.errors import (
    CheckpointError,
    MismatchError,
    OptimerError,
    OutputError,
    RecipeError,
)
from optimer_engine.hub import locate
from optimer_engine.lock import locked
from optimer_engine.pool.manifest import (
    MANIFEST,
    RESERVED,
    Entry,
    FileFacts,
    Manifest,
    read_manifest,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEPT = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""A vector's own files; a report of how it was written names folders of this machine."""
_INCOMING, _OUTGOING = ".incoming-", ".removed-"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a user says of a vector that its files do not, or not rightly."""

    dataset: str | None = None
    license: str | None = None
    tokens: int | None = None
    seed: int | None = None


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
    found = _Found.look(Path(source), base, note or Note())
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
    if os.path.lexists(target):
        known = old.files if old is not None else entry.files
        same = target.is_dir() and not target.is_symlink() and _facts(target) == known
        if old is None and not same:  # a crash may leave an entry's files, and nothing else
            raise OutputError(
                "is in the way, and the pool does not know it",
                where=str(target),
                todo="move it away",
            )
        if not same or known != entry.files:
            _discard(pool, target)
    if not target.exists():
        incoming.rename(target)
        sync(pool)
    replace_file(pool / MANIFEST, manifest.with_entry(entry).encoded())
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
        if os.path.lexists(pool / entry.name):
            _discard(pool, pool / entry.name)


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
    """Delete what an interrupted step left behind; the pool is locked."""
    for leftover in (*pool.glob(f"{_INCOMING}*"), *pool.glob(f"{_OUTGOING}*")):
        shutil.rmtree(leftover, ignore_errors=True)


def hash_file(path: Path) -> FileFacts:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileFacts(file.tell(), digest.hexdigest())


class _Found(msgspec.Struct, frozen=True):
    """A source that was looked at: its folder, an entry without files, and its base."""

    name: str
    folder: Path
    entry: Entry
    base: str | None
    base_revision: str | None
    base_fingerprint: str

    @classmethod
    def look(cls, source: Path, base: str | None, note: Note) -> _Found:
        report: dict[str, Any] = {}
        folder, name, revision = source, source.name, None
        if (source / "train_report.json").is_file():
            report = _read_report(source / "train_report.json")
            folder = source / Path(report["vector"]).name
            base = base or report["config"]["base"]
            revision = report["config"]["base_revision"]
            if len(report["datasets"]) == 1:
                name = report["datasets"][0]["name"]
        with Checkpoint.open(folder) as opened:
            if opened.kind == MODEL:
                raise CheckpointError(
                    "is a full checkpoint, expected a distribution vector",
                    where=str(folder),
                    todo="make one with `optimer extract` or `optimer pack`",
                )
            facts = _facts_of(opened, report) | {
                key: value for key, value in msgspec.to_builtins(note).items() if value is not None
            }
            kind, fingerprint = opened.kind, opened.base_fingerprint or report.get(
                "base_fingerprint"
            )
        if base is not None and not report:
            with Checkpoint.open(locate(base)) as opened:
                if fingerprint not in (None, opened.fingerprint):
                    raise MismatchError(
                        f"it was taken from a base of fingerprint {fingerprint[:16]}, {base} has"
                        f" {opened.fingerprint[:16]}",
                        where=str(source),
                        todo="name the base that the vector was taken from",
                    )
                fingerprint = opened.fingerprint
        if fingerprint is None:
            raise RecipeError(
                "its files do not say what base it belongs to",
                where=str(source),
                todo="name it with --base",
            )
        entry = Entry(name="x", kind="vector" if kind == VECTOR else ADAPTER, files={}, **facts)
        return cls(name, folder, entry, _public(base), revision, fingerprint)


def _facts_of(opened: Checkpoint, report: dict[str, Any]) -> dict[str, Any]:
    """What a training report says of a vector, or else the vector's own header."""
    metadata = opened.metadata if opened.kind == VECTOR else {}
    facts: dict[str, Any] = {"storage": metadata.get("vector_mode", "plain")}
    if report:
        config, datasets = report["config"], report["datasets"]
        licenses = {dataset["license"] for dataset in datasets}
        return facts | {
            "dataset": ", ".join(dataset["name"] for dataset in datasets),
            "dataset_ids": [name for dataset in datasets for name in dataset["ids"]],
            "license": licenses.pop() if len(licenses) == 1 else None,
            "tokens": report["tokens"],
            "seed": config["seed"],
            "learning_rate": config["learning_rate"],
            "block_size": config["block_size"],
            "training": config["mode"],
            "run": report["run"],
            "versions": report["versions"],
        }
    numbers: dict[str, type] = {
        "tokens": int, "seed": int, "block_size": int, "learning_rate": float,
    }  # fmt: skip
    for key, type_ in numbers.items():
        try:
            facts[key] = type_(metadata[key])
        except (KeyError, ValueError):
            continue
    for key in ("dataset", "training"):
        if key in metadata:
            facts[key] = metadata[key]
    return facts


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        if report["vector"] is None:
            raise RecipeError(
                "the run has no vector", where=str(path.parent), todo="train with --vector"
            )
        return report
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"is no training report: {error}", where=str(path)) from error


def _public(base: str | None) -> str | None:
    """What a base may be called in a file for others: a Hub id, or a local folder's last name."""
    if base is None:
        return None
    local = Path(base).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", base)
    return Path(base).expanduser().resolve().name if local else base


def _manifest_for(pool: Path, found: _Found) -> Manifest:
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


def _discard(pool: Path, folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    out = pool / f"{_OUTGOING}{folder.name}"
    shutil.rmtree(out, ignore_errors=True)
    folder.rename(out)
    shutil.rmtree(out)


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
