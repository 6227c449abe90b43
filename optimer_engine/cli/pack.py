"""`optimer pack`."""

from __future__ import annotations

from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.errors import RecipeError
from optimer_engine.types import format_bytes


@click.command(name="pack")
@click.argument("base")
@click.argument("source")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option(
    "--mode",
    type=click.Choice(["exact", "float32", "bf16", "int8", "int4", "lowrank"]),
    default="exact",
    show_default=True,
    help="exact keeps every bit; the others approximate.",
)
@click.option("--rank", type=click.IntRange(min=1), help="For lowrank: of every matrix.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), help="For lowrank: largest relative error, e.g. .1"
)
@click.option("--note", multiple=True, metavar="KEY=TEXT", help="For the header: dataset, tokens.")
@click.option("--discard", is_flag=True, help="Start afresh; default: continue if interrupted.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one per core.")
@json_option
def command(
    base: str,
    source: str,
    out: Path,
    mode: str,
    rank: int | None,
    tolerance: float | None,
    note: tuple[str, ...],
    discard: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Store what SOURCE changed in BASE as a small distribution vector.

    SOURCE is a trained checkpoint, a vector or a LoRA adapter. Every mode merges directly;
    `optimer unpack` restores the trained checkpoint from mode exact, to the bit.

    \b
    Example:
      optimer pack org/base runs/ja/model -o vectors/ja
      optimer merge --base org/base --add vectors/ja=0.4 -o merged
    """
    from optimer_engine.packing import pack
    from optimer_engine.progress import bar

    notes = dict(text.split("=", 1) for text in note if "=" in text)
    if len(notes) != len(note):
        raise RecipeError("write KEY=TEXT, each key once", where="--note")
    report = pack(
        base,
        source,
        out,
        mode=mode,
        rank=rank,
        tolerance=tolerance,
        metadata=notes,
        discard=discard,
        threads=threads,
        callbacks=[bar(f"pack {out.name}")],
    )
    text = (
        f"{out}: {report.tensors} tensors, {format_bytes(report.bytes_written)} in"
        f" {report.wall_s:.2f} s; base {report.fingerprints['base'][:16]}"
    )
    emit(report.to_dict(), text, as_json)
