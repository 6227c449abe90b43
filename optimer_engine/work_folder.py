"""OUT.partial, the folder in which an output grows: whose it is, what in it counts, how it ends.

Locks: every run holds its own journal, and the folder in common with the other parts; who publishes
holds the folder alone. A journal stands in the folder before anything else does and is the last to
leave it, so a folder without one is not ours and is never touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from optimer_engine import durable
from optimer_engine.errors import BusyError, OutputError, RecipeError, is_text, quoted
from optimer_engine.journal import Head, Journal, damage, read_head, read_owner
from optimer_engine.redaction import redacted_data
from optimer_engine.report import Report, combined

PART_WAIT_S = 10.0
OWN_TO_A_PART = ("part", "files")
"""Entries of a head in which the parts of one output differ."""


def check_place(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an `out` that nothing can be renamed to, or that lies in or around an input.

    Raises:
        RecipeError: naming what is in the way.
    """
    if out.name in ("", "..") or not is_text(str(out)):
        _refuse(out, "is not the name of a folder", "name a new folder")
    partial = partial_of(out)
    for path in (out, partial):
        if path.is_symlink():
            _refuse(path, "is a link", "name the folder itself")
    if _is_mount(out):
        _refuse(out, "is a mount point, which nothing can be renamed to", "name a folder in it")
    mine = {_identity(path) for path in (out, partial) if path.exists()}
    above = {_identity(path) for path in (out, *out.resolve().parents) if path.exists()}
    for folder in inputs:
        around = {_identity(path) for path in (folder, *folder.resolve().parents)}
        if _identity(folder) in above or mine & around:
            _refuse(out, f"lies in or around the input {folder}", "write the output somewhere else")


def _is_mount(path: Path) -> bool:
    if path.is_mount():
        return True
    try:  # a second place of a folder of the same file system can be told by its name alone
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
        escaped = os.fsencode(path.resolve())
    except OSError:
        return False
    for mark in (b"\\", b" ", b"\t", b"\n"):
        escaped = escaped.replace(mark, b"\\%03o" % ord(mark))
    return any(line.split()[4] == escaped for line in lines)


def partial_of(out: Path) -> Path:
    """Where `out` grows: beside it, so on the same file system."""
    return out.parent / f"{out.name}.partial"


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _refuse(where: Path, what: str, todo: str) -> NoReturn:
    raise RecipeError(what, where=str(where) if is_text(str(where)) else quoted(where), todo=todo)


def finished(folder: Path, identity: str) -> Report | None:
    """The report of a folder that holds all of the output with this identity, undamaged."""
    report = read_report(folder / "report.json")
    if report is None or not report.files or report.identity != identity:
        return None
    whole = not any(damage(folder / name, ranges) for name, ranges in report.files.items())
    return report if whole else None


def read_report(path: Path) -> Report | None:
    """A report.json, or None when there is none that can be read."""
    try:
        if not path.is_file():  # a FIFO would be waited for
            return None
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class WorkFolder:
    """OUT.partial, held by this run.

    Args:
        out: what it becomes.
        part: (i, n).
        shards: names of the files that this run makes.
        head: all that decides the output's bytes; `identity`, a hash of what the parts share.
        discard: drop what an earlier run left.

    Attributes:
        path: of the folder.
        journal: this run's, with the claims of an earlier one.
        finished: the report, when an earlier run was stopped between it and publication.

    Raises:
        BusyError: another run holds it.
        RecipeError: it holds another merge, or files that no merge wrote.
        OSError: the disk refuses.
    """

    def __init__(
        self,
        out: Path,
        part: tuple[int, int],
        shards: list[str],
        head: Head,
        identity: str,
        discard: bool,
    ) -> None:
        self.out, self.path, self.part, self.shards = out, partial_of(out), part, shards
        self.identity = identity
        self.finished: Report | None = None
        self._stem = "merge" if part[1] == 1 else f"part-{part[0]}-of-{part[1]}"
        self._journal_path = self.path / f"{self._stem}.journal"
        self._journal: Journal | None = None
        durable.make_folder(self.path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._take(head, discard)
        except BaseException:
            self.close()
            raise

    @property
    def journal(self) -> Journal:
        """This run's."""
        assert self._journal is not None
        return self._journal

    def _take(self, head: Head, discard: bool) -> None:
        if self.part[1] == 1:
            self._lock(fcntl.LOCK_EX)
        else:  # a part that looks whether it is the last one holds the folder for a moment
            self._lock(fcntl.LOCK_SH, PART_WAIT_S)
        if not self.path.exists() or _identity(self.path) != _identity_of(self._fd):
            raise RecipeError("was published just now by another run", where=str(self.out))
        if not discard:
            self.finished = finished(self.path, self.identity)
            if self.finished is not None:
                return
            self._check_others(head)
        try:
            journal = Journal(self._journal_path)
        except BlockingIOError:
            self._refuse_busy()
        self._journal = journal
        if journal.head == head and not discard:
            journal.resume()
        elif journal.head is not None and not discard:
            differs = sorted(key for key in head if journal.head.get(key) != head[key])
            self._refuse_other(
                "holds an interrupted merge of other sources or weights"
                f" (differs in {', '.join(differs)})"
            )
        else:
            journal.begin(head)
            durable.sync(self._fd)  # a file without a journal would be nobody's
            self._remove(path for path in self._own_files() if path != self._journal_path)
        if self._part_report(self.part[0]).exists():  # it no longer vouches for this part
            durable.remove(self._part_report(self.part[0]))
            durable.sync(self._fd)

    def _check_others(self, head: Head) -> None:
        others = [path for path in self.path.iterdir() if path.suffix != ".journal"]
        journals = sorted(self.path.glob("*.journal"))  # looked for last: they were there first
        if not journals and others:
            self._refuse_other(f"holds {quoted(others[0].name)}, which no merge left there")
        for path in journals:
            if path == self._journal_path:
                continue
            if path.stem.partition("-of-")[2] != self._stem.partition("-of-")[2]:
                self._refuse_other(f"was begun in other parts ({path.stem})")
            theirs = read_head(path)
            if theirs is not None and _shared(theirs) != _shared(head):
                self._refuse_other(
                    f"holds an interrupted merge of other sources or weights ({path.stem})"
                )

    def _refuse_other(self, what: str) -> NoReturn:
        raise RecipeError(
            f"{self.path.name} {what}",
            where=str(self.out),
            todo="run that merge again to finish it, or add --discard to drop it",
        )

    def _refuse_busy(self) -> NoReturn:
        journals = [self._journal_path, *sorted(self.path.glob("*.journal"))]
        owner = next(filter(None, map(read_owner, journals)), "")
        raise BusyError(
            "another run is writing it now" + (f": {owner}" if owner else ""),
            where=str(self.out),
            todo="wait for it, or stop it",
        )

    def _lock(self, how: int, wait_s: float = 0.0) -> None:
        latest = time.monotonic() + wait_s
        while True:
            try:
                return fcntl.flock(self._fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= latest:
                    self._refuse_busy()
                time.sleep(0.05)

    def _own_files(self) -> Iterator[Path]:
        """What this run may remove, its journal last: a run of all parts, everything."""
        if self.part[1] == 1:
            yield from (path for path in self.path.iterdir() if path != self._journal_path)
        else:
            names = [*self.shards, f"{self._stem}.json"]
            yield from (self.path / name for name in names if (self.path / name).exists())
        if self._journal_path.exists():
            yield self._journal_path

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in list(paths):
            durable.remove(path)

    def abandon(self) -> None:
        """Remove this run's files, and the folder if nothing else is in it."""
        *files, journal = [*self._own_files(), self._journal_path]
        self._remove(path for path in files if path != journal)
        durable.sync(self._fd)
        durable.remove(journal)
        if not any(self.path.iterdir()):
            durable.remove_folder(self.path)

    def is_last(self, report: Report) -> Report | None:
        """Record that this part is finished; the report of all, if this is the one to publish.

        Raises:
            OutputError: another part is of another merge, or not whole.
        """
        durable.sync(self._fd)  # names of shards, before anything vouches for them
        durable.write_file(self._part_report(self.part[0]), msgspec.json.encode(report))
        durable.sync(self._fd)
        if not self.alone():
            return None  # a part still works, or publishes
        reports = []
        for number in range(1, self.part[1] + 1):
            found = read_report(self._part_report(number))
            if found is None:
                return None
            if found.identity != self.identity:
                self._refuse_part(number, "is of another merge")
            for name, ranges in found.files.items():
                path = self.path / name
                size, expected = path.stat().st_size if path.exists() else 0, ranges[-1][1]
                if size != expected:
                    self._refuse_part(number, f"{name} has {size} bytes, {expected} were written")
            reports.append(found)
        return combined(reports)

    def _refuse_part(self, number: int, what: str) -> NoReturn:
        raise OutputError(
            f"part {number} cannot be joined: {what}",
            where=str(self.path),
            todo=f"run part {number}/{self.part[1]} again, with --discard",
        )

    def alone(self) -> bool:
        """Whether no other part holds the folder; then none can until this run closes it."""
        if self.part[1] == 1:
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _part_report(self, number: int) -> Path:
        return self.path / f"part-{number}-of-{self.part[1]}.json"

    def publish(self, report: Report) -> None:
        """Add report.json, drop all that it does not name, and rename into place."""
        if self.finished is None:
            clean = redacted_data(report.to_dict())
            text = json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
            durable.write_file(self.path / "report.json", text.encode())
            durable.sync(self._fd)  # from here on the folder speaks for itself, without a journal
        named = {"report.json", *report.files}
        self._remove(path for path in self.path.iterdir() if path.name not in named)
        durable.sync(self._fd)
        durable.rename(self.path, self.out)

    def close(self) -> None:
        """Let others have the folder."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        os.close(self._fd)


def _identity_of(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _shared(head: Head) -> Head:
    return {key: value for key, value in head.items() if key not in OWN_TO_A_PART}
