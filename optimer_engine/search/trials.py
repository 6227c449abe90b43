"""The journal of a search: one append-only file, the only truth about what was tried.

``trials.jsonl`` holds one JSON object per line: first ``run`` (what is searched, by fingerprint),
then for each trial ``asked`` before its evaluation and ``told`` after it; where several workers
score, trials are told in the order in which they end. Each line reaches the disk (fsync) before the
search goes on. Everything else, the optimiser's state included, is computed from it, so a search
may be killed at any moment: a line cut short is dropped, a trial asked and not told is run again
under its number, and nothing is counted twice.

The alternative, the optimiser's own state files, are rewritten in place: killed at the wrong
moment they are empty, and a changed setting makes them unreadable.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from optimer_engine import durable
from optimer_engine.errors import OutputError, RecipeError
from optimer_engine.redaction import redacted
from optimer_engine.search.objective import Scores

log = logging.getLogger(__name__)

Status = Literal["ok", "nan", "crashed"]
REUSED = "reused"
"""How the origin of a trial taken from another run begins."""
CONFIRM = "confirm"
"""How the origin of a trial begins that scores tried weights on more examples."""


class Run(msgspec.Struct, tag_field="event", tag="run", frozen=True):
    """First line: the identity of the search; see ``runner.identity``."""

    identity: dict[str, Any]
    format: int = 1


class Asked(msgspec.Struct, tag_field="event", tag="asked", frozen=True, omit_defaults=True):
    """A trial about to be evaluated, where its weights come from, and the gain expected of it."""

    number: int
    weights: dict[str, float]
    origin: str
    ask_s: float = 0.0
    expected: float = 0.0


class Told(msgspec.Struct, tag_field="event", tag="told", frozen=True, omit_defaults=True):
    """A finished trial. ``scores`` holds every finite score; costs are derived, never stored.

    A trial may repeat weights to score more examples of them; then it holds the earlier scores too.
    ``known`` counts the examples whose scores were taken from earlier trials, of any run.
    """

    number: int
    weights: dict[str, float]
    origin: str
    status: Status
    scores: Scores = {}
    error: str = ""
    ask_s: float = 0.0
    merge_s: float = 0.0
    evaluate_s: float = 0.0
    expected: float = 0.0
    known: int = 0


class Journal:
    """The trials of one run folder, open for appending and locked against a second search.

    Attributes:
        run: the identity line, or None in a new journal.
        told: finished trials in the order in which they ended.
        pending: the trials that were asked and not told, by number.
    """

    def __init__(self, path: Path) -> None:
        """Open or create ``path``.

        Raises:
            OutputError: another process is searching in this folder.
            RecipeError: the file is not a journal of this kind, or is damaged before its last line.
        """
        self.path = path
        try:
            durable.make_folder(path.parent)
            self._folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.run, self.told, self.pending = self._load()
        except BlockingIOError:
            os.close(self._folder)
            raise OutputError(
                "another search is running here",
                where=str(path.parent),
                todo="wait for it, or stop it",
            ) from None
        except RecipeError:
            os.close(self._folder)
            raise

    def begin(self, run: Run, reused: Iterable[Told] = ()) -> None:
        """Write the identity and any trials taken from another run, all or nothing."""
        told = list(reused)
        try:
            durable.replace_file(
                self.path, b"".join(msgspec.json.encode(x) + b"\n" for x in [run, *told])
            )
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.run, self.told = run, told

    @property
    def next_number(self) -> int:
        """The number of the next trial to ask."""
        return len(self.told) + len(self.pending)

    def ask(self, trial: Asked) -> None:
        """Record that ``trial`` is about to be evaluated."""
        self._append(trial)
        self.pending[trial.number] = trial

    def tell(self, trial: Told) -> None:
        """Record a finished trial; secrets in an objective's error are not written down."""
        trial = msgspec.structs.replace(trial, error=redacted(trial.error))
        self._append(trial)
        del self.pending[trial.number]
        self.told.append(trial)

    def close(self) -> None:
        """Release the folder's lock."""
        os.close(self._folder)

    def _append(self, line: Asked | Told) -> None:
        try:
            fd = durable.create(self.path)
            try:
                durable.write_at(fd, msgspec.json.encode(line) + b"\n", os.fstat(fd).st_size)
                durable.sync_data(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _load(self) -> tuple[Run | None, list[Told], dict[int, Asked]]:
        if not self.path.exists():
            return None, [], {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            log.warning("%s: the last line was cut short; its trial is run again", self.path)
            fd = durable.create(self.path)
            durable.resize(fd, len(whole))
            os.close(fd)
        return _parse(self.path, whole)


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to raise where the disk refuses a file of a run."""
    return OutputError(
        f"cannot be written: {error.strerror}",
        where=str(path),
        todo="free some space or check the disk, then run the same command again",
    )


def read(path: Path) -> tuple[Run, list[Told]]:
    """Identity and finished trials, as they ended, of the journal at ``path``, left as it is.

    Raises:
        RecipeError: there is no journal, or it is damaged before its last line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"no trials to read: {error.strerror}",
            where=str(path),
            todo="name the folder of an earlier search",
        ) from error
    run, told, _ = _parse(path, content[: content.rfind(b"\n") + 1])
    if run is None:
        raise RecipeError("holds no trials", where=str(path))
    return run, told


def _parse(path: Path, content: bytes) -> tuple[Run | None, list[Told], dict[int, Asked]]:
    run: Run | None = None
    told: list[Told] = []
    pending: dict[int, Asked] = {}
    for number, text in enumerate(content.splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            line = _DECODER.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(
                f"not a line of a search's journal: {error}", where=where,
                todo="restore the file, or search into another folder",
            ) from error  # fmt: skip
        if (run is None) != isinstance(line, Run):
            raise RecipeError("a journal has one run line, its first", where=where)
        if isinstance(line, Run):
            run = line
            continue
        following = len(told) + len(pending)
        under_way = isinstance(line, Told) and line.number in pending
        if line.number != following and not under_way:
            raise RecipeError(f"trial {line.number} where {following} is next", where=where)
        if isinstance(line, Asked):
            pending[line.number] = line
        else:
            told.append(line)
            pending.pop(line.number, None)
    return run, told, pending


_DECODER = msgspec.json.Decoder(Run | Asked | Told)
