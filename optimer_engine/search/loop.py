"""The search loop: ask for weights, merge into the live model, score, write down, repeat.

    proposals ─► asked ─► merge in place ─► some examples ─► more? ─► told ── trials.jsonl
        ▲                                                                        │
        └──────────────── landscape: the surrogate over all trials ◄─────────────┘

One model stays loaded. Every trial rewrites its parameters through the merge engine (plan once,
new weights each time), so no checkpoint is written until the winner is known. What is done next
depends on the seed and the journal and on nothing else: a search that was killed goes on as if it
had not been, and the same seed gives the same search (on one machine with one set of library
versions: the last bits of linear algebra differ elsewhere).

The search ends when it is settled or its trials are made; then the point to recommend is scored on
all examples, and if that takes its place from it, the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from optimer_engine.errors import OptimerError
from optimer_engine.search import paper
from optimer_engine.search.answers import Answers
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.cost import Goal, Point, front, is_whole, reference_of
from optimer_engine.search.evaluation import evaluate_trial
from optimer_engine.search.landscape import Landscape
from optimer_engine.search.proposals import proposal, settled, shares, without_confirmations
from optimer_engine.search.space import Space
from optimer_engine.search.staging import drawn, stages
from optimer_engine.search.subject import Subject
from optimer_engine.search.trials import CONFIRM, REUSED, Asked, Journal, Told

FAILURES_IN_A_ROW = 5
JOURNAL = "trials.jsonl"


@dataclass(frozen=True)
class TrialDone:
    """What callbacks are given after each trial.

    ``best_cost`` and ``best_weights`` are of the point that would be recommended now (None where
    no trial succeeded yet); ``done`` counts merges tried, ``total`` how many there may be.
    """

    trial: Told
    done: int
    total: int
    best_cost: float
    best_weights: dict[str, float] | None


Callback: TypeAlias = Callable[[TrialDone], None]


class Loop:
    """One run of the loop over an open journal."""

    def __init__(self, config: SearchConfig, subject: Subject, journal: Journal) -> None:
        self.config, self.subject, self.journal = config, subject, journal
        self.space, self.goal = Space.of(config.vectors), Goal.of(config)
        assert journal.run is not None
        self.answers = Answers(journal.run.identity)
        self.answers.learn(journal.told)
        self.answers.learn_beside(journal.path.parent, JOURNAL)
        wanted = self.goal.weights or subject.counts
        self._counts = {name: n for name, n in subject.counts.items() if name in wanted}
        self._prepared = False
        self._known: tuple[tuple[int, bool], Landscape] | None = None

    def run(self, callbacks: list[Callback]) -> str:
        """Make the trials; returns why they ended."""
        told = self.journal.told
        reused = sum(t.origin.startswith(REUSED) for t in told)
        total = self.config.total_trials
        failures = 0
        while not (reason := self._ended(total + reused)):
            trial = self.journal.pending or self._next()
            done = self._make(trial)
            made = len(without_confirmations(told)) - reused
            best = self._landscape().best
            point = None if best is None else self._landscape().points[best]
            cost = float("nan") if best is None else float(self._landscape().observed.costs[best])
            for callback in callbacks:
                callback(TrialDone(done, made, total, cost, point.weights if point else None))
            failures = 0 if done.status == "ok" else failures + 1
            if failures == FAILURES_IN_A_ROW:
                raise OptimerError(
                    f"{failures} trials in a row failed, the last with: {done.error}",
                    where=str(self.journal.path),
                    todo="mend the objective and run the same command again; it goes on from here",
                )
        if all(t.status != "ok" for t in told):
            raise OptimerError(
                f"no trial succeeded; the last failed with: {told[-1].error}",
                where=str(self.journal.path),
                todo="mend the objective and raise trials, or search into another folder",
            )
        while (late := self.journal.pending or self._to_confirm()) is not None:
            self._make(late)
        return reason

    def _ended(self, total: int) -> str:
        """Why the trials are over; nothing while they are not."""
        pending, told = self.journal.pending, self.journal.told
        if pending is not None and not pending.origin.startswith(CONFIRM):
            return ""
        tried = without_confirmations(told)
        if len(tried) >= total:
            return f"all {self.config.total_trials} trials were made"
        if not tried or self.config.method == "paper":
            return ""
        same = len(tried) == len(told)
        now = self._landscape() if same else Landscape(self.space, tried, self.goal)
        return settled(self.config, self.space, now, tried)

    def _next(self) -> Asked:
        told = self.journal.told
        start = None
        if self.config.gradient_steps:
            self._prepare()
            start = self.subject.gradient_start
        landscape = self._landscape(proposing=True) if told else None
        trial = proposal(self.config, self.space, landscape, told, start)
        self.journal.ask(trial)
        return trial

    def _prepare(self) -> None:
        if not self._prepared:
            self.subject.prepare()
            self._prepared = True

    def _make(self, trial: Asked) -> Told:
        self._prepare()
        whole = self.config.method == "paper"
        done = evaluate_trial(
            trial,
            self.subject,
            self.answers,
            self._stages(trial),
            lambda n: np.arange(n) if whole else drawn(self.config.seed, trial.number, n),
            set(self.goal.weights),
            lambda partial: self._with(partial).hopeful(trial.weights),
        )
        self.journal.tell(done)
        self.answers.learn([done])
        return done

    def _stages(self, trial: Asked) -> list[dict[str, int]]:
        """Examples by stage: all at once for what others are compared with, and to confirm."""
        counts = self._counts
        if self.config.method == "paper":
            return paper.stages(counts, final=trial.origin.startswith(CONFIRM))
        reference = reference_of(self._landscape().points) if self.journal.told else None
        base = not any(trial.weights.values())
        if reference is None or base or trial.origin.startswith(CONFIRM):
            return [dict(counts)]
        whole = {n: counts[n] for n in counts if not reference.scores[n].parts}
        return [row | whole for row in stages(counts, self.config.first_share)]

    def _landscape(self, *, proposing: bool = False) -> Landscape:
        """Of all trials; of a ``pareto`` goal with the λ of the next proposal, or its mean."""
        told = self.journal.told
        drawn_shares = shares(self.goal, self.config.seed, len(told)) if proposing else None
        key = (len(told), drawn_shares is not None)
        if self._known is None or self._known[0] != key:
            self._known = key, Landscape(self.space, told, self.goal, shares=drawn_shares)
        return self._known[1]

    def _with(self, partial: Told) -> Landscape:
        """Of all trials and the one under way, with the hyperparameters found without it."""
        told = self.journal.told
        return Landscape(
            self.space, [*told, partial], self.goal,
            shares=shares(self.goal, self.config.seed, len(told)),
            like=self._landscape(proposing=True),
        )  # fmt: skip

    def _to_confirm(self) -> Asked | None:
        """The next point to score on all examples: what is recommended, or on the front."""
        counts, told = self._counts, self.journal.told
        if not counts:
            return None
        if self.config.method == "paper":
            return self._confirming(paper.finalist(told, self.goal, counts))
        now = self._landscape()
        wanted = [] if now.best is None else [now.best]
        if self.goal.aggregate == "pareto":
            wanted += front(now.observed, [i for i, p in enumerate(now.points) if p.scores])
        partial = [now.points[i] for i in wanted if not is_whole(now.points[i])]
        return self._confirming(partial[0] if partial else None)

    def _confirming(self, point: Point | None) -> Asked | None:
        if point is None:
            return None
        trial = Asked(len(self.journal.told), point.weights, f"{CONFIRM} {point.number}")
        self.journal.ask(trial)
        return trial
