"""`optimer extract`."""

from __future__ import annotations

from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.types import format_bytes


@click.command(name="extract")
@click.argument("base")
@click.argument("trained")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--dtype", default="float32", show_default=True, help="Of the stored vector.")
@click.option("--discard", is_flag=True, help="Start afresh; default: continue if interrupted.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per core.")
@json_option
def command(
    base: str,
    trained: str,
    out: Path,
    dtype: str,
    discard: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Subtract BASE from TRAINED: a distribution vector, to be merged with any weight.

    Both are folders or org/name on the Hub. The vector remembers its base, and merging it into
    another base is refused.

    \b
    Example:
      optimer extract org/base runs/ja/model -o vectors/ja
      optimer merge --base org/base --add vectors/ja=0.4 -o merged
    """
    from optimer_engine.engine import extract
    from optimer_engine.progress import bar

    report = extract(
        base,
        trained,
        out,
        dtype=dtype,
        discard=discard,
        threads=threads,
        callbacks=[bar(f"extract {out.name}")],
    )
    text = (
        f"{out}: {report.tensors} tensors, {format_bytes(report.bytes_written)} in"
        f" {report.wall_s:.2f} s; base {report.fingerprints['base'][:16]}"
    )
    emit(report.to_dict(), text, as_json)
