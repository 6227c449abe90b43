"""Who scores trials: this process alone, or workers beside it and on other machines.

    loop ── weights, examples ─► crew ─► scorer: merge in place, score ─► answer ── loop

A scorer holds one subject: the model is loaded for its first trial and stays. The loop alone
decides and writes the journal, so workers share nothing and may come and go (``workers.py``).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from optimer_engine.errors import NonFiniteError, OptimerError
from optimer_engine.search.objective import Examples, Scores, as_scores
from optimer_engine.search.subject import Subject
from optimer_engine.search.trials import Status


class Answer(msgspec.Struct, frozen=True):
    """What scoring a merge gave; ``error`` says why where ``status`` is not ok."""

    status: Status
    scores: Scores = {}
    error: str = ""
    merge_s: float = 0.0
    evaluate_s: float = 0.0


class Crew(Protocol):
    """Scorers, each of which takes one trial at a time."""

    def seats(self) -> int:
        """How many more trials can be begun now."""
        ...

    def score(self, number: int, weights: dict[str, float], examples: Examples | None) -> None:
        """Let trial ``number`` be scored on ``examples``; it takes a seat the first time."""

    def answer(self) -> tuple[int, Answer]:
        """Wait for one of the trials under way: its number, and what scoring it gave.

        Raises:
            OptimerError: of files or settings, which every further trial would meet too; anything
                else that the objective raises is in the answer.
        """
        ...

    def done(self, number: int) -> None:
        """Give the seat of trial ``number`` back."""

    def heldout(self, weights: dict[str, float]) -> Scores:
        """Scores of a merge on the held-out terms."""
        ...

    def gradient_start(self) -> dict[str, float]:
        """The weights that gradients lead to."""
        ...

    def close(self) -> None:
        """Let the scorers go."""


class Scorer:
    """One subject, prepared when it is first used, that merges only what it does not hold.

    Args:
        make: makes the subject.
        gpu: what ``CUDA_VISIBLE_DEVICES`` shall be in this process.
    """

    def __init__(self, make: Callable[[], Subject], gpu: str | None = None) -> None:
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self._subject = make()
        self._prepared = False
        self._holds: dict[str, float] | None = None

    def identity(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the subject is, and what its held-out terms measure."""
        return self._subject.identity, self._subject.heldout_identity

    def score(self, weights: dict[str, float], examples: Examples | None) -> Answer:
        """Scores of the merge with ``weights``, of everything or of some examples.

        Raises:
            OptimerError: but for NaN, which concerns this merge alone.
        """
        started = time.perf_counter()
        merge_s = 0.0
        try:
            self._apply(weights)
            merge_s = time.perf_counter() - started
            scores = as_scores(self._subject.score(dict(weights), examples))
        except NonFiniteError as problem:
            status: Status = "nan"
            error = str(problem)
        except OptimerError:
            raise
        except (Exception, SystemExit) as problem:  # the objective is foreign code
            # in the main thread an exit may be a signal's; in a worker's it would end the worker
            main = threading.current_thread() is threading.main_thread()
            if main and isinstance(problem, SystemExit):
                raise
            status, error = "crashed", f"{type(problem).__name__}: {problem}"
        else:
            status, error = "ok", ""
        spent = time.perf_counter() - started - merge_s
        return Answer(status, scores if status == "ok" else {}, error, merge_s, spent)

    def heldout(self, weights: dict[str, float]) -> Scores:
        """Scores of the merge on the held-out terms."""
        self._apply(weights)
        return as_scores(self._subject.score_heldout())

    def gradient_start(self) -> dict[str, float]:
        """The weights that gradients lead to; the model is left holding some merge."""
        self._prepare()
        self._holds = None
        return self._subject.gradient_start()

    def close(self) -> None:
        """Remove what trials left."""
        self._subject.close()

    def _prepare(self) -> None:
        if not self._prepared:
            self._subject.prepare()
            self._prepared = True

    def _apply(self, weights: dict[str, float]) -> None:
        self._prepare()
        if weights != self._holds:
            self._holds = None
            self._subject.apply(weights)
            self._holds = dict(weights)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in what runs within, after so long."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(said_late(seconds))

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def said_late(seconds: float) -> str:
    """Why a trial was given up."""
    return f"took longer than trial_limit_s, {seconds:g} s"


class Alone:
    """A crew of one, in this process; a trial is scored while its answer is waited for.

    ``limit_s`` is how long scoring may take; it is kept in a program's main thread only.
    """

    def __init__(self, subject: Subject, limit_s: float | None = None) -> None:
        self._scorer = Scorer(lambda: subject)
        self._limit_s = limit_s
        self._number: int | None = None
        self._asked: tuple[dict[str, float], Examples | None] | None = None

    def seats(self) -> int:
        """One, or none while a trial is under way."""
        return int(self._number is None)

    def score(self, number: int, weights: dict[str, float], examples: Examples | None) -> None:
        """Remember what is to be scored."""
        self._number, self._asked = number, (weights, examples)

    def answer(self) -> tuple[int, Answer]:
        """Score it."""
        assert self._number is not None and self._asked is not None
        with _alarm(self._limit_s):
            return self._number, self._scorer.score(*self._asked)

    def done(self, number: int) -> None:
        """Free the seat."""
        self._number = self._asked = None

    def heldout(self, weights: dict[str, float]) -> Scores:
        """See `Scorer.heldout`."""
        return self._scorer.heldout(weights)

    def gradient_start(self) -> dict[str, float]:
        """See `Scorer.gradient_start`."""
        return self._scorer.gradient_start()

    def close(self) -> None:
        """Nothing: the subject is its owner's to close."""
