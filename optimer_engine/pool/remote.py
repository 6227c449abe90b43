"""Pools on the Hugging Face Hub: one repository holds one pool, laid out as on the disk.

Upload, download, resuming of a cut transfer and logins are huggingface_hub's. Added is that a push
is one commit on top of the state that was looked at, so two people who push at once cannot undo
each other; and that nothing of a pull counts before its hashes agree with the manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.checkpoint import Checkpoint
from optimer_engine.durable import sync
from optimer_engine.errors import CheckpointError, MismatchError, OutputError, RecipeError
from optimer_engine.lock import locked
from optimer_engine.pool import folder as pools
from optimer_engine.pool.card import model_card
from optimer_engine.pool.manifest import CARD, MANIFEST, Entry, Manifest, read_manifest

_PULLED = ".pulled"


def push(
    pool: str | Path,
    repo: str,
    names: Sequence[str] = (),
    *,
    license: str | None = None,
    public: bool = False,
    replace: bool = False,
) -> list[str]:
    """Upload vectors of a pool with a model card; files that are there already are not sent again.

    Args:
        repo: `org/name`, made if absent.
        names: vectors to send; all by default. Others that the repository holds stay there.
        license: of the data of vectors that have none noted; kept in the manifest.
        public: visible for everyone, if the repository is made now.
        replace: put vectors in the place of others of the same name.

    Returns:
        The names of the vectors that were sent.

    Raises:
        RecipeError: a vector without data or license, or one of its name is there and differs.
        MismatchError: the repository holds vectors of another base.
        CheckpointError: a vector is not what the manifest says.
        OutputError: the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    pool = Path(pool)
    manifest = pools.note_license(pool, names, license) if license else pools.read(pool)
    chosen = [pools.entry_of(manifest, pool, name) for name in names] or manifest.vectors
    _check_described(chosen)
    if problems := pools.verify(pool, [entry.name for entry in chosen]):
        raise CheckpointError(
            "; ".join(problems), where=str(pool), todo="restore the vector, or remove and add it"
        )
    with _hub_errors(repo, OutputError):
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        head = api.repo_info(repo).sha
        there = _remote_manifest(repo, head)
        together = there or msgspec.structs.replace(manifest, vectors=[])
        if together.base_fingerprint != manifest.base_fingerprint:
            raise MismatchError(
                f"holds vectors of {together.base}, {together.base_fingerprint[:16]}; this pool is"
                f" of {manifest.base}, {manifest.base_fingerprint[:16]}",
                where=repo,
                todo="push to a repository of its own",
            )
        operations: list[Any] = []
        sent = []
        for entry in chosen:
            old = together.find(entry.name)
            if old is not None and old.files == entry.files and old == entry:
                continue
            if old is not None and old.files != entry.files and not replace:
                raise RecipeError(
                    f"there is another {entry.name!r}", where=repo, todo="add --replace"
                )
            known = old.files if old is not None else {}
            for name, facts in entry.files.items():
                if known.get(name) != facts:
                    path = f"{entry.name}/{name}"
                    operations.append(CommitOperationAdd(path, pool / entry.name / name))
            for name in known.keys() - entry.files.keys():
                operations.append(CommitOperationDelete(f"{entry.name}/{name}"))
            together = together.with_entry(entry)
            sent.append(entry.name)
        if sent:
            operations += [
                CommitOperationAdd(MANIFEST, together.encoded()),
                CommitOperationAdd(CARD, model_card(together, repo).encode()),
            ]
            message = f"Add {', '.join(sent)}"
            api.create_commit(repo, operations, commit_message=message, parent_commit=head)
    return sent


def pull(
    repo: str,
    pool: str | Path,
    names: Sequence[str] = (),
    *,
    revision: str | None = None,
    replace: bool = False,
) -> list[str]:
    """Download vectors into a pool, which is made if there is none.

    Args:
        repo: `org/name`, or `org/name@revision`.
        names: vectors to take; all by default.
        revision: branch, tag or commit; wins over the one after `@`.
        replace: put vectors in the place of others of the same name.

    Returns:
        The names of the vectors that were taken; those that are there already are not.

    Raises:
        CheckpointError: the Hub does not give it, or a file is not what the manifest says.
        MismatchError: the pool is of another base.
        RecipeError: no such vector, or another one of that name is in the pool.
    """
    from huggingface_hub import HfApi

    pool = Path(pool)
    repo, _, at = repo.partition("@")
    with _hub_errors(repo, CheckpointError):
        head = HfApi().repo_info(repo, revision=revision or at or None).sha
        there = _remote_manifest(repo, head)
    if there is None:
        raise CheckpointError("is no pool: it has no pool.json", where=repo)
    chosen = [pools.entry_of(there, repo, name) for name in names] or there.vectors
    taken = []
    with locked(pool, wait=True):
        pools.clean(pool)
        here = msgspec.structs.replace(there, vectors=[])
        if (pool / MANIFEST).exists():
            here = pools.read(pool)
        if here.base_fingerprint != there.base_fingerprint:
            raise MismatchError(
                f"is a pool of {there.base}, {there.base_fingerprint[:16]}; this one is of"
                f" {here.base}, {here.base_fingerprint[:16]}",
                where=repo,
                todo="pull it into a folder of its own",
            )
        for entry in chosen:
            old = here.find(entry.name)
            if old is not None and old.files == entry.files:
                continue
            if old is not None and not replace:
                raise RecipeError(
                    f"there is another {entry.name!r} in the pool", where=str(pool),
                    todo="add --replace",
                )  # fmt: skip
            fetched = _fetch(repo, head, entry, here.base_fingerprint, pool / _PULLED)
            pools.place(pool, here, entry, fetched, replace)
            here = pools.read(pool)
            taken.append(entry.name)
        shutil.rmtree(pool / _PULLED, ignore_errors=True)
    return taken


def _fetch(repo: str, head: str | None, entry: Entry, base_fingerprint: str, folder: Path) -> Path:
    """Download a vector's files below `folder` and check them; where they lie.

    A transfer that was cut goes on there.
    """
    from huggingface_hub import hf_hub_download

    target = folder / entry.name
    for name, facts in entry.files.items():
        with _hub_errors(repo, CheckpointError):
            hf_hub_download(repo, f"{entry.name}/{name}", revision=head, local_dir=folder)
        if pools.hash_file(target / name) != facts:
            shutil.rmtree(folder)
            raise CheckpointError(
                "its content is not what the manifest says",
                where=f"{repo}: {entry.name}/{name}",
                todo="pull again; if it stays, ask its author",
            )
        sync(target / name)
    for stray in {path.name for path in target.iterdir()} - entry.files.keys():
        (target / stray).unlink()
    sync(target)
    with Checkpoint.open(target) as opened:
        if opened.kind != entry.kind or opened.base_fingerprint not in (None, base_fingerprint):
            raise CheckpointError(
                f"is not the {entry.kind} of its base that the manifest says",
                where=f"{repo}: {entry.name}",
            )
    return target


def _remote_manifest(repo: str, head: str | None) -> Manifest | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_manifest(Path(hf_hub_download(repo, MANIFEST, revision=head)))
    except LocalEntryNotFoundError:  # no connection, which says nothing about the repository
        raise
    except EntryNotFoundError:
        return None


def _check_described(entries: Sequence[Entry]) -> None:
    for entry in entries:
        for key, todo in (
            ("dataset", "remove it and add it with --dataset"),
            ("license", "say it with --license, as the Hub names licences"),
        ):
            if not getattr(entry, key):
                raise RecipeError(
                    f"its {key} is unknown, and the model card must state it",
                    where=f"vector {entry.name!r}",
                    todo=todo,
                )


@contextmanager
def _hub_errors(repo: str, kind: type[CheckpointError] | type[OutputError]) -> Iterator[None]:
    """What the Hub says, as an error of ours that holds no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (CheckpointError, OutputError, MismatchError, RecipeError):
        raise
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if token := get_token():
            reason = reason.replace(token, "***")
        raise kind(
            f"the Hub does not do it: {reason}",
            where=repo,
            todo="check the name, your login (`hf auth login`) and the connection",
        ) from None
