"""`optimer report`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from optimer_engine.cli.output import emit, json_option

REFRESH_S = 10


@click.command(name="report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Write it again every 10 s until interrupted.")
@json_option
def command(run: Path, watch: bool, as_json: bool) -> None:
    """Write the search in folder RUN as one HTML page, RUN/report.html.

    The page needs no network and no script. It can be written while the search is running; with
    --watch the browser loads it again by itself. The cosines of the vectors are measured the first
    time, in one pass over their files.

    \b
    Example:
      optimer report runs/all
    """
    from optimer_engine.search.cosines import measured
    from optimer_engine.search.page import write_page

    refresh_s = REFRESH_S if watch else None
    page = write_page(run, refresh_s=refresh_s)
    reason = measured(run)
    if reason:
        click.echo(f"no cosines of the vectors: {reason}", err=True)
    else:
        write_page(run, refresh_s=refresh_s)
    emit({"page": str(page)}, str(page), as_json)
    try:
        while watch:
            time.sleep(REFRESH_S)
            write_page(run, refresh_s=REFRESH_S)
    finally:  # of --watch, by a signal: what stays open shall not load itself again for ever
        if watch:
            write_page(run)
