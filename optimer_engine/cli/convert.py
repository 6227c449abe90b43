"""`optimer convert`."""

from __future__ import annotations

from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.types import format_bytes


@click.command(name="convert")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@click.option("--discard", is_flag=True, help="Drop what an interrupted conversion left.")
@json_option
def command(folder: Path, out: Path, discard: bool, as_json: bool) -> None:
    """Write a model that was saved as a pickle (pytorch_model.bin) as safetensors.

    Reads each pickle in a process of its own that may only build tensors, within limits of time
    and memory. Names, dtypes, shapes and bytes stay as they are.

    \b
    Example:
      optimer convert old-model -o model
    """
    from optimer_engine.convert import convert

    report = convert(folder, out, discard=discard)
    text = f"{out}: {report.tensors} tensors, {format_bytes(report.bytes_written)} written"
    emit(report.to_dict(), text, as_json)
