"""Where a dataset's text lies, and its documents one batch after another.

Files are streamed: the corpus is neither copied into a cache nor held in memory. A dataset on the
Hub is read the same way, so no more of it is fetched than is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from optimer_engine.errors import RecipeError
from optimer_engine.train.config import DatasetConfig
from optimer_engine.train.resume import fingerprint_of

_KINDS = {
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".py": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
}  # fmt: skip
_COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
_BUILDERS = {"text": "text", "jsonl": "json", "parquet": "parquet"}
_BATCH_DOCUMENTS = 256


class Corpus(msgspec.Struct, frozen=True):
    """Where a dataset's text lies.

    Attributes:
        config: what the user wrote.
        files: local files in reading order; empty for a dataset on the Hub.
        kind: `text`, `jsonl`, `parquet`, or `hub` for what `datasets` resolves (an id, a folder).
        fingerprint: hash of the files' contents and of how they are read; of a Hub dataset, of its
            id, subset, split and revision.
        bytes: size of the files.
    """

    config: DatasetConfig
    files: list[Path]
    kind: str
    fingerprint: str
    bytes: int

    @property
    def ids(self) -> list[str]:
        """The dataset's id on the Hub, if it comes from there."""
        named = [self.config.data] if isinstance(self.config.data, str) else self.config.data
        return named if self.kind == "hub" and not self.files else []


def find(dataset: DatasetConfig) -> Corpus:
    """Find a dataset's files and fingerprint their contents.

    Raises:
        RecipeError: no such file, a glob without a match, files of a kind that cannot be told.
    """
    where = f"dataset {dataset.name!r}"
    patterns = [dataset.data] if isinstance(dataset.data, str) else dataset.data
    if len(patterns) == 1 and (Path(patterns[0]).is_dir() or _looks_like_hub_id(patterns[0])):
        folder = Path(patterns[0])
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
        return _corpus(dataset, files, "hub")
    files = []
    for pattern in patterns:
        found = [Path(pattern)]  # brackets may be part of a name
        if not found[0].is_file():
            matches = glob(pattern, recursive=True)  # noqa: PTH207 - keeps absolute patterns whole
            found = sorted(path for path in map(Path, matches) if path.is_file())
        if not found:
            raise RecipeError(
                f"no file matches {pattern!r}"
                if has_magic(pattern)
                else f"no such file: {pattern}",
                where=where,
                todo="check the path; relative paths start at the working directory",
            )
        files += [path for path in found if path not in files]
    kinds = {dataset.kind or _kind(path) for path in files}
    if len(kinds) > 1 or None in kinds:
        suffixes = ", ".join(sorted({path.suffix or "none" for path in files}))
        raise RecipeError(
            f"cannot tell one kind from the suffixes {suffixes}",
            where=where,
            todo="set kind to text, jsonl or parquet, or make a dataset for each kind",
        )
    return _corpus(dataset, files, kinds.pop() or "")


def first_documents(corpus: Corpus) -> None:
    """Read the first documents, so that an unreadable corpus is found before work is done.

    Raises:
        RecipeError: as `read_documents`, and a corpus with no document at all.
    """
    if next(read_documents(corpus), None) is None:
        raise RecipeError(
            "has no documents",
            where=f"dataset {corpus.config.name!r}",
            todo="check that its files are not empty",
        )


def read_documents(corpus: Corpus) -> Iterator[list[str]]:
    """The texts of a corpus in order, in batches; an absent text is an empty one.

    Raises:
        RecipeError: the text field is missing (the fields found are named) or holds no text, or the
            files cannot be read as what they are said to be.
    """
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    config = corpus.config
    where = f"dataset {config.name!r}"
    # The first file decides the columns, and an empty one has none.
    files = [_literal(path) for path in corpus.files if path.stat().st_size]
    if corpus.files and not files:
        return
    options: dict[str, Any] = {"sample_by": config.sample_by} if corpus.kind == "text" else {}
    try:
        if corpus.kind == "hub":
            stream = load_dataset(
                str(config.data if isinstance(config.data, str) else config.data[0]),
                name=config.subset,
                split=config.split,
                revision=config.revision,
                streaming=True,
            )
        else:
            stream = load_dataset(
                _BUILDERS[corpus.kind],
                data_files=files,
                split="train",
                streaming=True,
                **options,
            )
        field = "text" if corpus.kind == "text" else config.text_field
        for batch in stream.iter(batch_size=_BATCH_DOCUMENTS):
            if field not in batch:
                raise RecipeError(
                    f"has no field {field!r}; its fields are {', '.join(sorted(batch))}",
                    where=where,
                    todo="set text_field to the one that holds the text",
                )
            texts = [text or "" for text in batch[field]]
            if strange := [text for text in texts if not isinstance(text, str)]:
                raise RecipeError(
                    f"field {field!r} holds {type(strange[0]).__name__}, expected text",
                    where=where,
                    todo="set text_field to the one that holds the text",
                )
            yield texts
    except (OSError, ValueError, StopIteration, DatasetsError, pyarrow.ArrowException) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"cannot be read as {corpus.kind}: {str(error) or 'it has no rows'}",
            where=where,
            todo="check the files and the dataset's kind"
            if corpus.files
            else "check the id, split and subset, and the connection; a local file needs a suffix",
        ) from error


def _corpus(config: DatasetConfig, files: list[Path], kind: str) -> Corpus:
    contents = [_hash_file(path) for path in files]
    read_as = [config.text_field, config.sample_by, config.split, config.subset, config.revision]
    if not files:
        contents = [str(config.data)]
    size = sum(path.stat().st_size for path in files)
    return Corpus(config, files, kind, fingerprint_of(kind, read_as, contents), size)


def _hash_file(path: Path) -> str:
    try:
        found = path.stat()
        return _hash(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from error


@lru_cache(maxsize=65536)
def _hash(path: Path, *_identity: int) -> str:
    """Each file is read once, though a pool asks several times."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _kind(path: Path) -> str | None:
    plain = path.with_suffix("") if path.suffix in _COMPRESSED else path
    return _KINDS.get(plain.suffix.lower())


def _looks_like_hub_id(text: str) -> bool:
    known = _kind(Path(text)) is not None or Path(text).suffix in _COMPRESSED
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", text)) and not known and not Path(text).exists()


def _literal(path: Path) -> str:
    """`path` as a pattern that `datasets` matches with this file alone."""
    return re.sub(r"([*?\[])", r"[\1]", str(path.absolute()))
