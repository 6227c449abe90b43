"""A pool: a folder of distribution vectors of one base, with a manifest that says what each is.

    POOL/pool.json          the manifest: base, and for each vector its origin, files and hashes
    POOL/NAME/              a vector or an adapter, a source as any other: --add ja=POOL/ja=0.4

The manifest is the truth: what it names is whole and hashed, what it does not name is no part of
the pool. It is replaced in one step under a lock, after the files are on the disk, so any number of
training jobs may add to a pool, and a crash at any point loses nothing that was in it.
"""

from __future__ import annotations

from optimer_engine.pool.folder import Note, add, read, remove, verify
from optimer_engine.pool.manifest import Entry, FileFacts, Manifest
from optimer_engine.pool.remote import pull, push

__all__ = [
    "Entry", "FileFacts", "Manifest", "Note", "add", "pull", "push", "read", "remove", "verify",
]  # fmt: skip
