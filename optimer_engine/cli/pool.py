"""`optimer pool`: a folder of distribution vectors of one base, with a manifest."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import CheckpointError, quoted
from optimer_engine.types import format_bytes

_POOL = click.argument("pool", type=click.Path(path_type=Path))
_NAMES = click.argument("names", nargs=-1)
_REPLACE = click.option(
    "--replace", is_flag=True, help="Put it in the place of another vector of that name."
)


@click.group(name="pool")
def command() -> None:
    """Keep the distribution vectors of one base in a folder, described and checked.

    \b
    Examples:
      optimer pool add pool runs/ja --license cc-by-4.0
      optimer pool list pool
      optimer merge --base org/base --add pool/ja=0.4 -o merged
      optimer pool push pool org/vectors
    """


@command.command(name="add")
@_POOL
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", help="In the pool; default: the dataset's, or the folder's.")
@click.option("--base", metavar="MODEL", help="Folder or Hub id, where SOURCE does not say it.")
@click.option("--dataset", metavar="TEXT", help="What it was trained on.")
@click.option("--license", help="Of that data, as the Hub names it, such as cc-by-4.0.")
@click.option("--tokens", type=click.IntRange(min=0), help="It was trained on.")
@click.option("--seed", type=int, help="It was trained with.")
@click.option("--link", is_flag=True, help="Give the files a second name instead of copying them.")
@_REPLACE
@json_option
def add_(
    pool: Path,
    source: Path,
    name: str | None,
    base: str | None,
    dataset: str | None,
    license: str | None,
    tokens: int | None,
    seed: int | None,
    link: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Put SOURCE, a training run, a vector or a LoRA adapter, into POOL."""
    from optimer_engine.pool import Note, add

    note = Note(dataset=dataset, license=license, tokens=tokens, seed=seed)
    entry = add(pool, source, name, base=base, note=note, link=link, replace=replace)
    text = f"{pool / entry.name}: {len(entry.files)} files, {format_bytes(entry.bytes)}"
    emit(msgspec.to_builtins(entry), text, as_json)


@command.command(name="list")
@_POOL
@json_option
def list_(pool: Path, as_json: bool) -> None:
    """Show what POOL holds."""
    from optimer_engine.pool import read

    manifest = read(pool)
    rows = [("vector", "stored as", "size", "tokens", "seed", "training", "dataset", "licence")]
    for entry in manifest.vectors:
        cells = (
            entry.name,
            "LoRA" if entry.kind != "vector" else entry.storage,
            format_bytes(entry.bytes),
            *("-" if v is None else v for v in (entry.tokens, entry.seed, entry.training)),
            entry.dataset or "-",
            entry.license or "-",
        )
        rows.append(tuple(quoted(cell) for cell in cells))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"base {quoted(manifest.base)}, {manifest.base_fingerprint[:16]}"]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    emit(msgspec.to_builtins(manifest), "\n".join(lines), as_json)


@command.command(name="remove")
@_POOL
@click.argument("name")
@json_option
def remove_(pool: Path, name: str, as_json: bool) -> None:
    """Take a vector out of POOL and delete its files."""
    from optimer_engine.pool import remove

    remove(pool, name)
    emit({"removed": name}, f"{pool}: {name} removed", as_json)


@command.command(name="verify")
@_POOL
@_NAMES
@json_option
def verify_(pool: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Compare POOL with its manifest, byte by byte; exit code 2 where they differ."""
    from optimer_engine.pool import read, verify

    problems = verify(pool, names)
    count = len(names) or len(read(pool).vectors)
    result = {"pool": str(pool), "vectors": count, "problems": problems}
    if problems and not as_json:
        raise CheckpointError(
            "is not what its manifest says:\n  - " + "\n  - ".join(map(quoted, problems)),
            where=str(pool),
            todo="restore these files, or remove the vectors and add them again",
        )
    emit(result, f"{pool}: {count} vectors are whole", as_json)
    if problems:
        click.get_current_context().exit(2)


@command.command(name="push")
@_POOL
@click.argument("repo")
@_NAMES
@click.option("--license", help="Of the data of vectors that have none noted.")
@click.option("--public", is_flag=True, help="Visible for everyone, if REPO is made now.")
@_REPLACE
@json_option
def push_(
    pool: Path,
    repo: str,
    names: tuple[str, ...],
    license: str | None,
    public: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Upload vectors of POOL to REPO (org/name) on the Hub, with a model card."""
    from optimer_engine.pool import push

    sent = push(pool, repo, names, license=license, public=public, replace=replace)
    emit({"repo": repo, "sent": sent}, f"{repo}: {', '.join(sent) or 'nothing new'}", as_json)


@command.command(name="pull")
@click.argument("repo")
@_POOL
@_NAMES
@click.option("--revision", help="Branch, tag or commit.")
@_REPLACE
@json_option
def pull_(
    repo: str,
    pool: Path,
    names: tuple[str, ...],
    revision: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Download vectors of REPO (org/name, or org/name@revision) into POOL and check them."""
    from optimer_engine.pool import pull

    taken = pull(repo, pool, names, revision=revision, replace=replace)
    emit(
        {"pool": str(pool), "taken": taken}, f"{pool}: {', '.join(taken) or 'nothing new'}", as_json
    )
