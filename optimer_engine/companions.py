"""Configuration and tokenizer: the small files beside the weights, which an output gets too.

They are copied as bytes: nothing in them is rendered, executed or rewritten. The one exception is
what looks like a token, which an output must not carry on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from optimer_engine.checkpoint import COMPANIONS
from optimer_engine.errors import CheckpointError
from optimer_engine.redaction import redacted, redacted_data

MAX_BYTES = 256 << 20
MAX_FILTERED_BYTES = 1_000_000
"""Of a file that tokens are looked for in: settings are smaller, vocabularies larger."""


def companions(folder: Path, *more: str) -> list[Path]:
    """The files to copy, by the patterns of COMPANIONS and `more`.

    Raises:
        CheckpointError: one is too large to be such a file, or may not be read.
    """
    found = {path for pattern in (*COMPANIONS, *more) for path in folder.glob(pattern)}
    files = [path for path in sorted(found) if path.is_file()]
    for path in files:
        size = path.stat().st_size
        if size > MAX_BYTES or not os.access(path, os.R_OK):
            what = f"has {size} bytes" if size > MAX_BYTES else "may not be read"
            raise CheckpointError(
                f"{what}; it would be copied, as configuration and tokenizer are",
                where=str(path),
                todo="move it out of the model's folder, or make it readable",
            )
    return files


def read(path: Path) -> bytes:
    """A file's content.

    Raises:
        CheckpointError: the disk fails.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            todo="restore the file and run the same command again",
        ) from error


def without_secrets(content: bytes) -> bytes:
    """The same bytes, unless there is something to hide: in JSON, in the texts that it means."""
    if len(content) > MAX_FILTERED_BYTES:
        return content
    text = content.decode(errors="surrogateescape")
    try:
        data = json.loads(text)
        clean = redacted_data(data)
        # A key that stands twice hides a value from whoever reads, but not from the file.
        if json.dumps(clean) == json.dumps(data) and redacted(text) == text:
            return content
        return (json.dumps(clean, indent=2) + "\n").encode()
    except (ValueError, RecursionError):  # a template, or a file that its reader will judge
        return redacted(text).encode(errors="surrogateescape")
