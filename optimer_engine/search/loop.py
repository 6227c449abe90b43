"""The search loop: ask for weights, merge into the live model, score, write down, repeat.

    proposals ─► asked ─► merge in place ─► some examples ─► more? ─► told ── trials.jsonl
        ▲                                                                        │
        └──────────────── landscape: the surrogate over all trials ◄─────────────┘

One model stays loaded in every scorer of the crew, one in this process unless more are asked for.
Every trial rewrites its parameters through the merge engine (plan once, new weights each time), so
no checkpoint is written until the winner is known. As soon as a scorer is free, the next trial is
asked for, with those under way taken into account.

What is done next depends on the seed and the journal and on nothing else: a search that was killed
goes on as if it had not been, and the same seed gives the same search (on one machine with one set
of library versions: the last bits of linear algebra differ elsewhere). With several scorers the
journal, and so the search, also depends on which of them was faster.

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
from optimer_engine.search.cost import Goal, front, is_base, is_whole, reference_of
from optimer_engine.search.crew import Answer, Crew
from optimer_engine.search.evaluation import Steps, trial_steps
from optimer_engine.search.landscape import Landscape
from optimer_engine.search.proposals import proposal, settled, shares, without_confirmations
from optimer_engine.search.space import Space
from optimer_engine.search.staging import drawn, stages
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

    def __init__(
        self, config: SearchConfig, counts: dict[str, int], crew: Crew, journal: Journal
    ) -> None:
        self.config, self.crew, self.journal = config, crew, journal
        self.space, self.goal = Space.of(config), Goal.of(config)
        assert journal.run is not None
        self.answers = Answers(journal.run.identity)
        self.answers.learn(journal.told)
        self.answers.learn_beside(journal.path.parent, JOURNAL)
        wanted = self.goal.weights or counts
        self._counts = {name: n for name, n in counts.items() if name in wanted}
        self._running: dict[int, Steps] = {}
        self._known: tuple[tuple[int, int | None], Landscape] | None = None

    def run(self, callbacks: list[Callback]) -> str:
        """Make the trials; returns why they ended."""
        told = self.journal.told
        reused = sum(t.origin.startswith(REUSED) for t in told)
        total = self.config.total_trials
        failures = 0
        while True:
            reason, begun = self._begin(total + reused)
            if begun is not None:
                done = self._advance(begun, None)
            elif self._running:
                done = self._advance(*self.crew.answer())
            else:
                break
            if done is None:
                continue
            made = len(without_confirmations(told)) - reused
            best = self._landscape().best
            point = None if best is None else self._landscape().points[best]
            cost = float("nan") if best is None else float(self._landscape().observed.costs[best])
            for callback in [] if done.origin.startswith(CONFIRM) else callbacks:
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
        return reason

    def _begin(self, total: int) -> tuple[str, int | None]:
        """Begin one trial, where there is a seat for it and one is wanted.

        First come those that an interrupted run left, then new ones and, once the search is over
        and none of its own is under way, those that confirm what it recommends.

        Returns:
            Why the search is over, or nothing; and the number of the trial.
        """
        if len(self._running) >= self.crew.seats():
            return "", None
        left = sorted(self.journal.pending.keys() - self._running.keys())
        if left:
            trial: Asked | None = self.journal.pending[left[0]]
            reason = ""
        else:
            reason = self._ended(total)
            if not reason:
                trial = self._next()
            elif without_confirmations(list(self.journal.pending.values())):
                trial = None
            else:
                trial = self._to_confirm()
            if trial is None:
                return reason, None
            self.journal.ask(trial)
        assert trial is not None
        weights, number = trial.weights, trial.number
        whole = self.config.method == "paper"
        self._running[number] = trial_steps(
            trial,
            self.answers.of(weights),
            self._counts,
            self._stages(trial),
            lambda n: np.arange(n) if whole else drawn(self.config.seed, number, n),
            set(self.goal.weights),
            lambda partial: self._with(partial).hopeful(weights),
        )
        return reason, number

    def _advance(self, number: int, answer: Answer | None) -> Told | None:
        """Let trial ``number`` take its next step; what is told of it, if that was the last."""
        steps, weights = self._running[number], self.journal.pending[number].weights
        try:
            wanted = next(steps) if answer is None else steps.send(answer)
        except StopIteration as over:
            done: Told = over.value
            self.crew.done(number)
            del self._running[number]
            self.journal.tell(done)
            self.answers.learn([done])
            return done
        self.crew.score(number, weights, wanted)
        return None

    def _ended(self, total: int) -> str:
        """Why no further trial is wanted; nothing while one is."""
        told = self.journal.told
        tried = without_confirmations(told)
        if len(tried) + len(without_confirmations(list(self.journal.pending.values()))) >= total:
            return f"all {self.config.total_trials} trials were made"
        if not tried or self.config.method == "paper":
            return ""
        same = len(tried) == len(told)
        now = self._landscape() if same else Landscape(self.space, tried, self.goal)
        return settled(self.config, self.space, now, tried)

    def _next(self) -> Asked:
        told, running = self.journal.told, list(self.journal.pending.values())
        start = self.crew.gradient_start if self.config.gradient_steps else None
        landscape = self._landscape(self.journal.next_number) if told else None
        return proposal(self.config, self.space, landscape, told, start, running)

    def _stages(self, trial: Asked) -> list[dict[str, int]]:
        """Examples by stage: all at once for what others are compared with, and to confirm."""
        counts = self._counts
        if self.config.method == "paper":
            return paper.stages(counts, final=trial.origin.startswith(CONFIRM))
        reference = reference_of(self._landscape().points) if self.journal.told else None
        if reference is None or is_base(trial.origin) or trial.origin.startswith(CONFIRM):
            return [dict(counts)]
        whole = {n: counts[n] for n in counts if not reference.scores[n].parts}
        return [row | whole for row in stages(counts, self.config.first_share)]

    def _landscape(self, number: int | None = None) -> Landscape:
        """Of all trials; of a ``pareto`` goal with the λ of trial ``number``, or its mean."""
        told = self.journal.told
        drawn_shares = None if number is None else shares(self.goal, self.config.seed, number)
        key = (len(told), None if drawn_shares is None else number)
        if self._known is None or self._known[0] != key:
            self._known = key, Landscape(self.space, told, self.goal, shares=drawn_shares)
        return self._known[1]

    def _with(self, partial: Told) -> Landscape:
        """Of all trials and the one under way, with the hyperparameters found without it."""
        told = self.journal.told
        return Landscape(
            self.space, [*told, partial], self.goal,
            shares=shares(self.goal, self.config.seed, partial.number),
            like=self._landscape(partial.number),
        )  # fmt: skip

    def _to_confirm(self) -> Asked | None:
        """The next point to score on all examples: what is recommended, or on the front."""
        counts, told = self._counts, self.journal.told
        if not counts:
            return None
        confirming = {p.origin for p in self.journal.pending.values()}
        if self.config.method == "paper":
            wanted = paper.finalists(told, self.goal, counts)
        else:
            now = self._landscape()
            chosen = [] if now.best is None else [now.best]
            if self.goal.aggregate == "pareto":
                chosen += front(now.observed, [i for i, p in enumerate(now.points) if p.scores])
            wanted = [now.points[i] for i in chosen if not is_whole(now.points[i])]
        for point in wanted:
            origin = f"{CONFIRM} {point.number}"
            if origin not in confirming:
                return Asked(self.journal.next_number, point.weights, origin)
        return None
