"""`optimer verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optimer_engine.cli.output import emit, json_option
from optimer_engine.types import format_bytes


@click.command(name="verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--sampled", is_flag=True, help="Also compute a sample again from its sources.")
@click.option("--full", is_flag=True, help="Also compute all of it again, and compare.")
@json_option
def command(out: Path, sampled: bool, full: bool, as_json: bool) -> None:
    """Check that a merged model or a vector is whole and unchanged.

    Reads the folder OUT once, compares it with the hashes that were published with it, and prints
    the sha256 of every file, as hubs show it.

    \b
    Example:
      optimer verify merged --sampled
    """
    from optimer_engine.progress import bar
    from optimer_engine.verify import verify_output

    bars = [bar(f"verify {out.name}")]
    result: dict[str, Any] = verify_output(out, sampled=sampled, full=full, callbacks=bars)
    lines = [f"{digest}  {name}" for name, digest in sorted(result["sha256"].items())]
    text = f"{out}: {result['files']} files, {format_bytes(result['bytes'])} as published"
    if result["recomputed"]:
        text += f"; {format_bytes(result['recomputed'])} computed again and equal"
    elif full or sampled:
        text += "; no rule to compute it again to the byte"
    emit(result, "\n".join([text, *lines]), as_json)
