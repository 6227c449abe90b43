"""What is to be put into a pool: a run folder, a vector's folder or an adapter's, looked at.

A run's report knows most; a vector's header knows its base and what the writer noted; an adapter's
files know neither base nor training, so the user says it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from optimer_engine.checkpoint import MODEL, VECTOR, Checkpoint
from optimer_engine.errors import CheckpointError, MismatchError, RecipeError
from optimer_engine.hub import locate
from optimer_engine.pool.manifest import Entry

_REPORT = "train_report.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a user says of a vector that its files do not, or not rightly."""

    dataset: str | None = None
    license: str | None = None
    tokens: int | None = None
    seed: int | None = None


class _Dataset(msgspec.Struct):
    name: str
    license: str | None = None
    ids: list[str] = []


class _Config(msgspec.Struct):
    base: str
    seed: int
    learning_rate: float
    block_size: int
    base_revision: str | None = None
    mode: str = "full"


class _Report(msgspec.Struct):
    """The part of a run's report that a pool keeps."""

    config: _Config
    base_fingerprint: str
    datasets: list[_Dataset]
    tokens: int
    vector: str | None
    run: str | None = None
    versions: dict[str, str] = {}


class Found(msgspec.Struct, frozen=True):
    """A source that was looked at.

    Attributes:
        name: what it would be called: the dataset's name, or the folder's.
        folder: where its files lie.
        entry: all that a manifest says of it but its name and files.
        base, base_revision: of the base, as others may call it; None where nobody said.
        base_fingerprint: of the base.
    """

    name: str
    folder: Path
    entry: Entry
    base: str | None
    base_revision: str | None
    base_fingerprint: str

    @classmethod
    def look(cls, source: Path, base: str | None, note: Note) -> Found:
        """Look at `source`; raises as `folder.add` does."""
        folder, name, revision = source, source.resolve().name, None
        report: _Report | None = None
        if (source / _REPORT).is_file():
            report = _read_report(source / _REPORT)
            folder = source / Path(str(report.vector)).name
            base, revision = base or report.config.base, report.config.base_revision
            if len(report.datasets) == 1:
                name = report.datasets[0].name
        with Checkpoint.open(folder) as opened:
            if opened.kind == MODEL:
                raise CheckpointError(
                    "is a full checkpoint, expected a distribution vector",
                    where=str(folder),
                    todo="make one with `optimer extract` or `optimer pack`",
                )
            metadata = opened.metadata if opened.kind == VECTOR else {}
            kind: Literal["vector", "adapter_model"] = (
                "vector" if opened.kind == VECTOR else "adapter_model"
            )
            fingerprint = opened.base_fingerprint
        facts: dict[str, Any] = {"storage": metadata.get("vector_mode", "plain")}
        facts |= _of_header(metadata) if report is None else _of_report(report)
        said = msgspec.to_builtins(note).items()
        facts |= {key: value for key, value in said if value is not None}
        if report is not None:
            fingerprint = fingerprint or report.base_fingerprint
        if base is not None and (report is None or base != report.config.base):
            fingerprint = _checked_base(source, base, fingerprint)
        if fingerprint is None:
            raise RecipeError(
                "its files do not say what base it belongs to",
                where=str(source),
                todo="name it with --base",
            )
        entry = Entry(name="x", kind=kind, files={}, **facts)
        public, at = _public(base)
        return cls(name, folder, entry, public, revision or at, fingerprint)


def _checked_base(source: Path, base: str, fingerprint: str | None) -> str:
    with Checkpoint.open(locate(base)) as opened:
        if fingerprint not in (None, opened.fingerprint):
            raise MismatchError(
                f"it was taken from a base of fingerprint {str(fingerprint)[:16]}, {base} has"
                f" {opened.fingerprint[:16]}",
                where=str(source),
                todo="name the base that the vector was taken from",
            )
        return opened.fingerprint


def _of_report(report: _Report) -> dict[str, Any]:
    licenses = {dataset.license for dataset in report.datasets}
    return {
        "dataset": ", ".join(dataset.name for dataset in report.datasets),
        "dataset_ids": [name for dataset in report.datasets for name in dataset.ids],
        "license": licenses.pop() if len(licenses) == 1 else None,
        "tokens": report.tokens,
        "seed": report.config.seed,
        "learning_rate": report.config.learning_rate,
        "block_size": report.config.block_size,
        "training": report.config.mode,
        "run": report.run,
        "versions": report.versions,
    }


def _of_header(metadata: dict[str, str]) -> dict[str, Any]:
    """What `optimer extract --note` or a training run wrote into a vector's header."""
    facts: dict[str, Any] = {k: metadata[k] for k in ("dataset", "training") if k in metadata}
    for key, type_ in (
        ("tokens", int), ("seed", int), ("block_size", int), ("learning_rate", float),
    ):  # fmt: skip
        try:
            facts[key] = type_(metadata[key])
        except (KeyError, ValueError):
            continue
    return facts


def _read_report(path: Path) -> _Report:
    try:
        report = msgspec.json.decode(path.read_bytes(), type=_Report)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"is no training report: {error}", where=str(path)) from error
    if report.vector is None:
        raise RecipeError(
            "the run has no vector", where=str(path.parent), todo="train with --vector"
        )
    return report


def _public(base: str | None) -> tuple[str | None, str | None]:
    """What a base may be called in a file for others: a Hub id and a revision, or else the last
    name of a local folder."""
    if base is None:
        return None, None
    local = Path(base).expanduser()
    repo, _, at = base.partition("@")
    if local.exists() or not _HUB_ID.fullmatch(repo):
        return local.resolve().name, None
    return repo, at or None
