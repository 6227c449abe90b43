"""A progress bar on stderr for anything that emits events."""

from __future__ import annotations

from optimer_engine.events import Advanced, Callback, Downloaded, Event, Finished, Started
from optimer_engine.types import format_bytes

QUIET_S = 2.0
"""Nothing is shown for work shorter than this."""


def bar(description: str) -> Callback:
    """A callback that draws bytes of output done, for runs that take more than two seconds."""
    from tqdm import tqdm

    shown: tqdm | None = None
    downloaded_bytes = 0

    def show(event: Event) -> None:
        nonlocal shown, downloaded_bytes
        if isinstance(event, Started):
            shown = tqdm(
                desc=description, total=event.total_bytes, unit="B", unit_scale=True, delay=QUIET_S
            )
        elif isinstance(event, Advanced) and shown is not None:
            shown.update(event.output_bytes)
        elif isinstance(event, Downloaded) and shown is not None:
            downloaded_bytes += event.nbytes
            text = f"{format_bytes(downloaded_bytes)} downloaded"
            shown.set_postfix_str(text, refresh=False)
        elif isinstance(event, Finished) and shown is not None:
            shown.close()

    return show
