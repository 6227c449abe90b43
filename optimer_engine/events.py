"""What a running plan tells whoever listens: the progress bar, a log, a test.

A callback is any callable that takes one of these. Callbacks are called one at a time, from the
engine's threads; they must be quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optimer_engine.report import Report


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins; `total_bytes` of output will be produced."""

    total_bytes: int


@dataclass(frozen=True, slots=True)
class Advanced:
    """`output_bytes` more of output are done."""

    output_bytes: int


@dataclass(frozen=True, slots=True)
class Downloaded:
    """`nbytes` more bytes of `file` came from the Hub."""

    file: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is over and its output is in place."""

    report: Report


Event = Started | Advanced | Downloaded | Finished
Callback = Callable[[Event], None]
