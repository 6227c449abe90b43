"""`optimer unpack`."""

from __future__ import annotations

from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.types import format_bytes


@click.command(name="unpack")
@click.argument("base")
@click.argument("vector")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--discard", is_flag=True, help="Start afresh; default: continue if interrupted.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per core.")
@json_option
def command(
    base: str, vector: str, out: Path, discard: bool, threads: int | None, as_json: bool
) -> None:
    """Restore the trained checkpoint, every tensor to the bit, from BASE and an exact VECTOR.

    \b
    Example:
      optimer unpack org/base vectors/ja -o ja-model
    """
    from optimer_engine.packing import unpack
    from optimer_engine.progress import bar

    report = unpack(
        base,
        vector,
        out,
        discard=discard,
        threads=threads,
        callbacks=[bar(f"unpack {out.name}")],
    )
    text = (
        f"{out}: {report.tensors} tensors, {format_bytes(report.bytes_written)} in"
        f" {report.wall_s:.2f} s"
    )
    emit(report.to_dict(), text, as_json)
