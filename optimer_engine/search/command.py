"""Any program as an objective: it is given the merge as a folder and prints a score.

    - {name: judge, command: [python, judge.py, "{model}"], higher_is_better: true}

The last line that it prints is the score: a number, or a JSON object with ``value``, or with
``parts`` (and ``sizes``), one per example, from which standard errors are known. Every trial then
writes a checkpoint, into one temporary folder that each trial replaces (``TMPDIR`` says where; a
file system in memory is quickest). An exit status other than 0, a signal (out of memory, often)
or more time than ``trial_limit_s`` fails the trial, not the search; what the program started ends
with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from optimer_engine.search.config import Term
from optimer_engine.search.objective import Score, Scores

PLACE = "{model}"
MOST_BYTES = 16 << 20
"""Of a program's output that is looked at."""


class CommandObjective:
    """Scores that programs print; see the module docstring.

    Args:
        terms: each with ``command`` and ``higher_is_better``.
        limit_s: how long each program may run.
    """

    takes = "folder"

    def __init__(self, terms: Sequence[Term], limit_s: float | None = None) -> None:
        self._terms, self._limit_s = list(terms), limit_s

    @property
    def identity(self) -> dict[str, dict[str, Any]]:
        """By term: the command as written; what the program does cannot be known."""
        return {t.name: {"kind": "command", "command": t.command} for t in self._terms}

    def __call__(self, folder: Path) -> Scores:
        """Scores of the checkpoint in ``folder``.

        Raises:
            RuntimeError: a program failed or printed no score; says what it wrote to stderr.
        """
        return {t.name: _printed(t, folder, self._limit_s) for t in self._terms}


def _printed(term: Term, folder: Path, limit_s: float | None) -> Score:
    command = [word.replace(PLACE, str(folder)) for word in term.command or []]
    # Files and not pipes: a child that is left behind would hold a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except (OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            raise RuntimeError(f"{term.name!r} cannot run {command[0]!r}: {what}") from error
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{term.name!r} was stopped after {limit_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also when this process is told to end
            process.wait()
        lines, complaints = _last_lines(out), _last_lines(err)
    said = complaints[-1] if complaints else "nothing on stderr"
    if status < 0:
        name = signal.strsignal(-status) or "unknown"
        raise RuntimeError(f"{term.name!r} was ended by signal {-status} ({name}): {said}")
    if status:
        raise RuntimeError(f"{term.name!r} exited with {status}: {said}")
    higher = bool(term.higher_is_better)
    try:
        found = json.loads(lines[-1])
        if not isinstance(found, dict):
            return Score(float(found), higher)
        if "parts" in found:
            return Score.of(found["parts"], found.get("sizes"), higher_is_better=higher)
        return Score(float(found["value"]), higher)
    except (IndexError, ValueError, KeyError, TypeError) as error:
        last = lines[-1][:80] if lines else ""
        raise RuntimeError(f"{term.name!r} printed no score, its last line is {last!r}") from error


def _last_lines(file: IO[bytes]) -> list[str]:
    """What stands at the end of a program's output, line by line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MOST_BYTES))
    return file.read().decode(errors="replace").strip().splitlines()
