"""pool.json: what it may say, and reading it from anyone.

A manifest may come from the Hub, so names in it are held to a pattern that no path can match: no
separator, no leading dot, no empty name. What is decoded here can be joined to a folder safely.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from optimer_engine.errors import CheckpointError

MANIFEST = "pool.json"
CARD = "README.md"
VERSION = 1
MAX_MANIFEST_BYTES = 32_000_000

Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=64)]
FileName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\.(safetensors|json)\Z", max_length=200)
]
Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=0)]


class FileFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file's size and sha256 (hex), as `sha256sum` prints it and the Hub stores it."""

    bytes: Size
    sha256: Hex


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One vector of a pool.

    Attributes:
        name: its folder in the pool, and its name there.
        kind: `vector`, or `adapter_model` for PEFT's LoRA.
        storage: how a vector's numbers are stored: `plain`, or a mode of `optimer pack`.
        dataset: what it was trained on, in the user's words; `dataset_ids`: its names on the Hub.
        license: of the text.
        tokens, seed, learning_rate, block_size: of the training; None where unknown.
        training: `full`, `frozen_embeddings` or `lora`; None where unknown.
        run: hash that identifies the training run; None for a vector that came from elsewhere.
        files: by name.
        versions: of the libraries of the run.
    """

    name: Name
    kind: Literal["vector", "adapter_model"]
    storage: str = "plain"
    dataset: str | None = None
    dataset_ids: list[str] = []
    license: str | None = None
    tokens: int | None = None
    seed: int | None = None
    learning_rate: float | None = None
    block_size: int | None = None
    training: str | None = None
    run: str | None = None
    files: dict[FileName, FileFacts]
    versions: dict[str, str] = {}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(facts.bytes for facts in self.files.values())


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool holds.

    Attributes:
        base: what the base is called: its id on the Hub, or the name of a local folder.
        base_revision: of a base on the Hub.
        base_fingerprint: of the base's tensors; every vector in the pool is one of this base.
        vectors: in the order in which they were added.
    """

    version: Literal[1] = 1
    base: str
    base_revision: str | None = None
    base_fingerprint: Hex
    vectors: list[Entry] = []

    def find(self, name: str) -> Entry | None:
        """The entry of that name."""
        return next((entry for entry in self.vectors if entry.name == name), None)

    def with_entry(self, entry: Entry) -> Manifest:
        """With `entry` in the place of one of the same name, or at the end."""
        kept = [entry if old.name == entry.name else old for old in self.vectors]
        return msgspec.structs.replace(self, vectors=kept if entry in kept else [*kept, entry])

    def without(self, name: str) -> Manifest:
        """Without the entry of that name."""
        kept = [entry for entry in self.vectors if entry.name != name]
        return msgspec.structs.replace(self, vectors=kept)

    def encoded(self) -> bytes:
        """The file's content."""
        return msgspec.json.format(msgspec.json.encode(self)) + b"\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CheckpointError: it cannot be read, is of another version, or names a file that is no plain
            file name.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError("is too large for a manifest", where=str(path))
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(
            "is no pool: it has no pool.json",
            where=str(path.parent),
            todo="add a first vector with `optimer pool add`",
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    names = [entry.name.casefold() for entry in manifest.vectors]
    if len(set(names)) < len(names):
        raise CheckpointError("names a vector twice", where=str(path))
    for entry in manifest.vectors:
        if not entry.files or entry.name.casefold() in RESERVED:
            raise CheckpointError(f"{entry.name!r} cannot be a vector", where=str(path))
    return manifest


RESERVED = {MANIFEST.casefold(), CARD.casefold()}
"""Names that no vector may have."""
