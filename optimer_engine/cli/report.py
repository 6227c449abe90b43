"""`optimer report`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option


@click.command(name="report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Write it again every 10 s until interrupted.")
@json_option
def command(run: Path, watch: bool, as_json: bool) -> None:
    """Write the search in folder RUN as one HTML page, RUN/report.html.

    The page needs no network and no script. It can be written while the search is running.

    \b
    Example:
      optimer report runs/all
    """
    from optimer_engine.search.page import write_page

    page = write_page(run, refresh_s=10 if watch else None)
    emit({"page": str(page)}, str(page), as_json)
    while watch:
        time.sleep(10)
        write_page(run, refresh_s=10)
