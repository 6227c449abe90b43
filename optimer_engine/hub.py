"""From what a user calls a model, a folder or `org/name` on the Hugging Face Hub, to its files.

A repository is looked up once: the answer names the commit, every file, its size and its hash, and
whatever is fetched afterwards is fetched from that commit, so a branch that moves meanwhile changes
nothing. Tokens, cache and offline mode are huggingface_hub's.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from optimer_engine.durable import replace_file
from optimer_engine.errors import CheckpointError
from optimer_engine.network import LOOK_UP_WAITS_S, DownloadError, patiently
from optimer_engine.snapshot import RemoteFile, Snapshot, is_plain

DOWNLOADS = 4
"""Files downloaded at the same time."""

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def find(model: str, revision: str | None = None) -> Path | Snapshot:
    """What `model` names: an existing local folder, or a repository at the commit it has now.

    Args:
        model: a path, `org/name`, or `org/name@revision`.
        revision: branch, tag or commit; wins over the one after `@`.

    Raises:
        CheckpointError: it is neither, saying what each look-up found.
        DownloadError: the Hub cannot be asked and the cache has nothing of it.
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
    revision = revision or at or None

    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        snapshot = _from_cache(repo, revision)
        if snapshot is None:
            raise CheckpointError(
                "no such folder, the Hub's cache has no such repository or revision, and"
                " HF_HUB_OFFLINE is set",
                where=model,
                todo="check the name, or run once without HF_HUB_OFFLINE",
            )
        return snapshot
    try:
        info = patiently(
            lambda: HfApi().model_info(repo, revision=revision, files_metadata=True),
            model,
            LOOK_UP_WAITS_S,
        )
    except DownloadError as error:
        snapshot = _from_cache(repo, revision)
        if snapshot is None:
            raise
        snapshot.notes = (f"{error.what}; using {snapshot} from the cache",)
        return snapshot
    notes = () if info.id == repo else (f"{repo} is now called {info.id}",)
    _remember(info.id, revision, str(info.sha))
    return Snapshot(info.id, str(info.sha), _listing(info.siblings), notes=notes)


def locate(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of `model` with all files of a checkpoint in it, downloaded if need be.

    `weights=False` leaves those out: configuration and tokenizer only.
    Args and errors are those of `find` and `Snapshot.fetch`.
    """
    found = find(model, revision)
    return found if isinstance(found, Path) else gather(found, weights=weights)


def gather(found: Snapshot, *, weights: bool = True) -> Path:
    """The cache's folder of a snapshot, with all files of a checkpoint in it; raises as `locate`.

    Files that only look as if they belonged to it (a second copy of the weights) are not fetched.
    """
    names = [*found.companions(), *(found.weights() if weights else ())]
    lacking = [name for name in names if name not in found.files]
    if lacking or not names:
        raise CheckpointError(
            f"{lacking[0] if lacking else 'model.safetensors'} is missing",
            where=str(found),
            todo=MISSING_OFFLINE if found.offline else "name another revision or repository",
        )
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    absent = [name for name in names if found.cached(name) is None]
    total_bytes = sum(found.files[name].size_bytes for name in absent)
    with (
        tqdm(desc=str(found), total=total_bytes, unit="B", unit_scale=True, delay=2.0) as bar,
        ThreadPoolExecutor(DOWNLOADS) as pool,
    ):
        list(pool.map(lambda n: found.checked(n) or found.fetch(n, arrived=bar.update), names))
    folder = found.cached(names[0])
    assert folder is not None
    return folder.parent


MISSING_OFFLINE = "the cache holds only a part of it; run once without HF_HUB_OFFLINE"


def _listing(siblings: Any) -> dict[str, RemoteFile]:
    return {
        file.rfilename: RemoteFile(
            file.size or 0, (file.lfs.sha256 if file.lfs else file.blob_id) or ""
        )
        for file in siblings or ()
    }


def _remember(repo: str, revision: str | None, commit: str) -> None:
    """Note in the cache what a branch or tag points at, so that it is found offline.

    huggingface_hub does so when it is asked for a branch; here it is asked for commits only.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    revision = revision or constants.DEFAULT_REVISION
    if revision == commit or not all(map(is_plain, revision.split("/"))):
        return
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    path = folder / "refs" / revision
    with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
        if not path.exists() or path.read_text() != commit:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, commit.encode())


def _from_cache(repo: str, revision: str | None) -> Snapshot | None:
    """The repository as far as the cache has it; blobs are named by their hashes."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        found = getattr(error, "snapshot_path", None)  # there, though a part of it is not
        if found is None:
            return None
        folder = Path(found)
    except HFValidationError:
        return None
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            blob = path.resolve().name
            digest = blob if _DIGEST.fullmatch(blob) else ""
            files[path.name] = RemoteFile(path.stat().st_size, digest)
    return Snapshot(repo, folder.name, files, offline=True)
