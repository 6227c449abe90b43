"""A repository of the Hub at one commit: what files it has, and how to get at them.

Downloading and caching are huggingface_hub's; checked here are the hashes, which it does not look
at. Only data is ever fetched: weights as safetensors, configuration and tokenizer; never code or
pickles.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from optimer_engine import hashed
from optimer_engine.checkpoint import ADAPTER, COMPANIONS, MODEL, VECTOR
from optimer_engine.errors import CheckpointError
from optimer_engine.network import RETRY_WAITS_S, patiently

_HASH_BYTES = 1 << 20


class RemoteFile(msgspec.Struct, frozen=True):
    """A file of a repository: its size and its sha256 (of large files) or git's sha1 of it."""

    size_bytes: int
    digest: str


class Snapshot:
    """A repository at one commit.

    Attributes:
        repo, commit: `org/name` as the Hub calls it now, and 40 hex digits.
        files: the files at its root that could be needed; others are never fetched.
        offline: it is only what the cache holds; nothing more can be fetched.
        notes: what the user should know, and need not act upon.
    """

    def __init__(
        self,
        repo: str,
        commit: str,
        files: dict[str, RemoteFile],
        *,
        offline: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.repo, self.commit, self.offline, self.notes = repo, commit, offline, notes
        self.files = {name: file for name, file in files.items() if is_plain(name)}

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    def weights(self) -> list[str]:
        """Names of the files with tensors, in order: those the index lists, or the single file.

        A listed file that the repository lacks is in the list, to be missed by whoever opens it.
        """
        for kind in (MODEL, VECTOR, ADAPTER):
            single, index = f"{kind}.safetensors", f"{kind}.safetensors.index.json"
            alone = [single] if single in self.files else []
            if index in self.files:
                return [*alone, *_listed(self.checked(index) or self.fetch(index))]
            if alone:
                return alone
        return []

    def companions(self) -> list[str]:
        """Names of the configuration, tokenizer and index files."""
        patterns = (*COMPANIONS, "adapter_config.json", "*.safetensors.index.json")
        return [n for n in self.files if any(fnmatch.fnmatch(n, p) for p in patterns)]

    def cached(self, name: str) -> Path | None:
        """Where the cache has `name`, whole, at this commit."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        if not isinstance(found, str):
            return None
        path = Path(found)
        return path if path.stat().st_size == self.files[name].size_bytes else None

    def checked(self, name: str) -> Path | None:
        """Where the cache has `name` with the bytes that the Hub announces; read whole, once."""
        path, wanted = self.cached(name), self.files[name]
        if path is None or not wanted.digest or hashed.known(path, wanted.digest):
            return path
        if _digest(path, wanted) != wanted.digest:
            return None
        hashed.note(path, wanted.digest)
        return path

    def fetch(
        self, name: str, folder: Path | None = None, arrived: Callable[[int], None] | None = None
    ) -> Path:
        """Get `name`, check its hash, and say where it is.

        Args:
            folder: where to put it; the cache when None. A file that is there is not fetched again.
            arrived: called with the number of bytes that came, again and again; what it raises
                ends the download.

        Raises:
            DownloadError: the network, the Hub or the disk fails, after several tries.
            CheckpointError: the Hub refuses, or gives other bytes than it announces, twice.
        """
        from huggingface_hub import hf_hub_download

        where, wanted = f"{self}/{name}", self.files[name]
        for again in (False, True):

            def download(force: bool = again) -> str:
                return hf_hub_download(
                    self.repo,
                    name,
                    revision=self.commit,
                    local_dir=folder,
                    force_download=force,
                    tqdm_class=_teller(arrived),
                )

            path = Path(patiently(download, where, RETRY_WAITS_S))
            found = _digest(path, wanted)
            if found == wanted.digest:
                if folder is None and wanted.digest:
                    hashed.note(path, wanted.digest)
                return path
            if self.offline:
                break
        raise CheckpointError(
            f"its hash is {found}, the Hub says {wanted.digest}",
            where=where,
            todo="run once without HF_HUB_OFFLINE to download it again"
            if self.offline
            else "the download is damaged, or a proxy changes it; try again later",
        )

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end of a file, by a range request; raises as `fetch` does."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        headers = {
            **build_hf_headers(),
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo, name, revision=self.commit)

        def ask() -> bytes:
            found = bytearray()
            with http_stream_backoff(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                max_retries=0,
            ) as response:
                hf_raise_for_status(response)
                # A server that knows no ranges sends the file from its start.
                skip = begin if response.status_code == 200 else 0
                for chunk in response.iter_bytes():
                    found += chunk
                    if len(found) >= skip + end - begin:
                        break
            piece = bytes(found[skip : skip + end - begin])
            if len(piece) != end - begin:
                raise OSError(f"{len(piece)} bytes came, {end - begin} expected")
            return piece

        return patiently(ask, f"{self}/{name}", RETRY_WAITS_S)


def is_plain(name: str) -> bool:
    """Whether a file lies at the repository's root, under a name that is one here too."""
    return Path(name).name == name and "\\" not in name and name not in ("", ".", "..")


def _listed(index: Path) -> list[str]:
    """The files an index names; what is wrong with it is said by whoever opens the checkpoint."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in names if isinstance(name, str) and is_plain(name)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _digest(path: Path, like: RemoteFile) -> str:
    """The hash of a file, of the kind that `like` has; "" when it has none."""
    if not like.digest:
        return ""
    digest = hashlib.sha256() if len(like.digest) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(like.digest) == 40:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _teller(arrived: Callable[[int], None] | None) -> Any:
    """A class in the shape of tqdm that draws nothing and passes on what arrives."""
    from tqdm import tqdm

    class Teller(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if arrived is not None and n:
                arrived(int(n))
            return None

    return Teller
