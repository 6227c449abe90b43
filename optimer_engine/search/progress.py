"""A progress bar on stderr for a search."""

from __future__ import annotations

from typing import Any

from optimer_engine.search.loop import Callback, TrialDone


def bar(description: str) -> Callback:
    """A callback that draws trials done and the best cost on stderr."""
    from tqdm import tqdm

    shown: Any = None

    def show(event: TrialDone) -> None:
        nonlocal shown
        if shown is None:
            shown = tqdm(desc=description, total=event.total, initial=event.done - 1, unit="trial")
        if event.trial.status != "ok":
            shown.write(f"trial {event.trial.number}: {event.trial.error}", file=shown.fp)
        shown.set_postfix_str(f"best cost {event.best_cost:+.4f}", refresh=False)
        shown.update()
        if event.done == event.total:
            shown.close()

    return show
