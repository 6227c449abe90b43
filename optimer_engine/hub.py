"""From what a user calls a model, a folder or `org/name` on the Hugging Face Hub, to a folder.

Downloading, caching, tokens and offline mode are huggingface_hub's. Only data is ever fetched:
weights as safetensors, configuration and tokenizer files; never code, never pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

from optimer_engine.checkpoint import COMPANIONS
from optimer_engine.errors import CheckpointError

ALLOWED = ("*.safetensors", "*.safetensors.index.json", *COMPANIONS)
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: an existing local folder, or a snapshot of a Hub repository.

    Args:
        model: a path, `org/name`, or `org/name@revision`.
        revision: branch, tag or commit; wins over the one after `@`.

    Raises:
        CheckpointError: when it is neither, saying what each look-up found.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            "is a file, expected a folder with a checkpoint",
            where=model,
            todo="name the folder that holds the file",
        )
    repo, _, at = model.partition("@")
    if _REPO.fullmatch(repo) is None:
        raise CheckpointError("no such folder", where=model, todo="check the path")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo, revision=revision or at or None, allow_patterns=list(ALLOWED))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no such folder, and the Hub does not give it either: {reason}",
            where=model,
            todo="check the path, or the repository's name, revision and your login",
        ) from error
