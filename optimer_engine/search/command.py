"""Any program as an objective: it is given the merge as a folder and prints a score.

    - {name: judge, command: [python, judge.py, "{model}"], higher_is_better: true}

The last line that it prints is the score: a number, or a JSON object with ``value``, or with
``parts`` (and ``sizes``), one per example, from which standard errors are known. Every trial then
writes a checkpoint, into one temporary folder that each trial replaces (``TMPDIR`` says where; a
file system in memory is quickest). An exit status other than 0 fails the trial, not the search.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimer_engine.search.config import Term
from optimer_engine.search.objective import Score, Scores

PLACE = "{model}"


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
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{term.name!r} was stopped after {limit_s:g} s") from error
    except OSError as error:
        raise RuntimeError(f"{term.name!r} cannot run {command[0]!r}: {error.strerror}") from error
    said = done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
    if done.returncode:
        raise RuntimeError(f"{term.name!r} exited with {done.returncode}: {said[0]}")
    lines = done.stdout.strip().splitlines()
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
