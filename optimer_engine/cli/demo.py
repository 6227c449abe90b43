"""`optimer demo`."""

from __future__ import annotations

from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option


@click.command(name="demo")
@click.option(
    "-o",
    "--out",
    default="demo-run",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for everything the demo makes; run again to go on.",
)
@click.option(
    "--scale",
    type=click.Choice(["full", "short"]),
    default="full",
    show_default=True,
    help="short: every stage in miniature, under a minute; its numbers mean nothing.",
)
@json_option
def command(out: Path, scale: str, as_json: bool) -> None:
    """Run the whole loop on real text, on a CPU, in minutes.

    Trains a small shipped base on Japanese, Chinese, code and mathematics, one at a time, extracts
    the distribution vectors, searches the weights of their merge, and compares it with the uniform
    average and with training on the mixed data; then searches again for two of the domains, from
    the trials it has. Nothing is downloaded.

    \b
    Examples:
      optimer demo
      optimer demo --scale short -o /tmp/demo --json
    """
    from optimer_engine.demo import run_demo

    report = run_demo(out, scale)
    emit(report.to_dict(), report.markdown().rstrip(), as_json)
