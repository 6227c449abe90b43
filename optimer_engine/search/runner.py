"""The search loop: ask for weights, merge into the live model, score, write down, repeat.

    known points ─► 2 Sobol points ─► SMAC, one fresh adviser per proposal
          └── asked ─► merge in place ─► objective ─► told ── trials.jsonl ──┘

One model stays loaded. Every trial rewrites its parameters through the merge engine (plan once,
new weights each time), so no checkpoint is written until the winner is known. The proposal for
trial n depends on the seed and the journal's first n trials and on nothing else: a search that was
killed goes on as if it had not been, and the same seed gives the same search (on one machine with
one set of library versions: the last bits of linear algebra differ elsewhere).

The winner is the evaluated point where the surrogate's mean is lowest: with noisy scores the lowest
observation is often a lucky one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np

from optimer_engine.durable import replace_file
from optimer_engine.errors import (
    MismatchError,
    MissingExtraError,
    NonFiniteError,
    OptimerError,
    RecipeError,
)
from optimer_engine.search.config import SearchConfig
from optimer_engine.search.identity import identity, refuse_other, rescored
from optimer_engine.search.live import LivePool
from optimer_engine.search.objective import Evaluate, Objective, Scored, Scores, as_scores
from optimer_engine.search.report import SearchReport, make_report
from optimer_engine.search.space import Space
from optimer_engine.search.trials import (
    REUSED,
    Asked,
    Journal,
    Run,
    Status,
    Told,
    costs,
)

FAILURES_IN_A_ROW = 5
JOURNAL, REPORT = "trials.jsonl", "search_report.json"


class Subject(Protocol):
    """What is searched: something that weights can be applied to and that is then scored."""

    @property
    def identity(self) -> dict[str, Any]:
        """``base``, ``vectors``, ``model`` and ``terms``, by content."""
        ...

    def prepare(self) -> None:
        """Load what trials need; called once, before the first of them."""

    def apply(self, weights: dict[str, float]) -> None:
        """Become the merge with ``weights``."""

    def score(self, weights: dict[str, float]) -> Scored:
        """Scores of what `apply` made."""
        ...

    def write(self, weights: dict[str, float], out: Path) -> None:
        """Write the merge with ``weights`` into the run folder ``out``."""


@dataclass(frozen=True)
class TrialDone:
    """What callbacks are given after each trial: it, the trial count and the best cost so far."""

    trial: Told
    done: int
    total: int
    best_cost: float


Callback: TypeAlias = Callable[[TrialDone], None]


def run_search(
    config: SearchConfig | str | Path,
    out: str | Path,
    *,
    objective: Objective | Callable[[Any], Scored] | None = None,
    evaluate: Evaluate | None = None,
    reuse: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
) -> SearchReport:
    """Search the weights of ``config``'s vectors; run the same call again to continue.

    Args:
        config: a `SearchConfig`, or the path of its YAML file.
        out: the run folder: ``trials.jsonl``, ``search_report.json``, ``best.yaml`` and ``best/``.
        objective: scores a model, instead of the terms of ``config``; see `objective.Objective`.
        evaluate: scores weights, without any model: nothing is loaded or merged.
        reuse: an earlier run over the same pool whose trials are scored anew, not evaluated again;
            ``trials`` counts those made beside them. A continued run has them already.
        callbacks: called after each trial.

    Returns:
        The report that is also written to ``search_report.json``.

    Raises:
        RecipeError: the configuration does not make sense, a file of it is missing.
        MismatchError: ``out`` or ``reuse`` holds a search over something else; says what differs.
        MissingExtraError: SMAC is not installed.
        OutputError: another process is searching in ``out``.
        OptimerError: five trials in a row failed; and whatever reading the checkpoints raises.
    """
    if not isinstance(config, SearchConfig):
        from optimer_engine.recipe import read_config

        config = read_config(config, SearchConfig)
    _require_smac()
    out = Path(out)
    subject: Subject = (
        LivePool(config, objective) if evaluate is None else _Function(config, evaluate)
    )
    this = identity(config, subject.identity)
    # read before anything is written: a wrong run to reuse must not leave a run folder behind
    reused = [] if reuse is None else rescored(Path(reuse) / JOURNAL, this)
    journal = Journal(out / JOURNAL)
    try:
        if journal.run is None:
            journal.begin(Run(this), reused)
        else:
            refuse_other(this, journal.run.identity, f"{out} holds another search")
            _refuse_late_reuse(reused, journal)
        _search(config, journal, subject, list(callbacks))
        report = make_report(config, this, journal.told)
        subject.write(report.best_weights, out)
        replace_file(out / REPORT, msgspec.json.format(msgspec.json.encode(report), indent=2))
    finally:
        journal.close()
    return report


def proposal(space: Space, told: list[Told], weights: dict[str, float], seed: int) -> Asked:
    """The next trial: the first known or Sobol point not yet tried, else what SMAC advises.

    Sobol points are left out where trials were reused: the model has better to go on.
    """
    started = time.perf_counter()

    def asked(origin: str, weights: dict[str, float]) -> Asked:
        return Asked(len(told), weights, origin, round(time.perf_counter() - started, 4))

    tried = [t.weights for t in told]
    first = dict(space.known_points())
    if not any(t.origin.startswith(REUSED) for t in told):
        first |= space.sobol_points(seed)
    for origin, point in first.items():
        if point not in tried:
            return asked(origin, point)
    from optimer_engine.search.adviser import propose

    number_seed = int(np.random.SeedSequence([seed, len(told)]).generate_state(1)[0] >> 1)
    points = np.array([space.to_unit(w) for w in tried])
    advised = propose(points, costs(told, weights), seed=number_seed)
    return asked("smac", space.to_weights(advised))


def _search(
    config: SearchConfig, journal: Journal, subject: Subject, callbacks: list[Callback]
) -> None:
    space = Space.of(config.vectors)
    weights = {t.name: t.weight for t in config.objective}
    total = config.total_trials + sum(t.origin.startswith(REUSED) for t in journal.told)
    failures = 0
    if len(journal.told) < total:
        subject.prepare()
    while len(journal.told) < total:
        trial = journal.pending
        if trial is None:
            trial = proposal(space, journal.told, weights, config.seed)
            journal.ask(trial)
        told = _run_trial(trial, subject, set(weights))
        journal.tell(told)
        best = float(costs(journal.told, weights).min())
        for callback in callbacks:
            callback(TrialDone(told, len(journal.told), total, best))
        failures = 0 if told.status == "ok" else failures + 1
        if failures == FAILURES_IN_A_ROW:
            raise OptimerError(
                f"{failures} trials in a row failed, the last with: {told.error}",
                where=str(journal.path),
                todo="mend the objective and run the same command again; it goes on from here",
            )
    if all(t.status != "ok" for t in journal.told):
        raise OptimerError(
            f"no trial succeeded; the last failed with: {journal.told[-1].error}",
            where=str(journal.path),
            todo="mend the objective and raise trials, or search into another folder",
        )


def _refuse_late_reuse(reused: list[Told], journal: Journal) -> None:
    """Trials can be taken over only when a run begins; later ones would change its proposals."""
    taken = [t for t in journal.told if t.origin.startswith(REUSED)]
    if reused and (not taken or taken != reused[: len(taken)]):
        raise MismatchError(
            f"began with {len(taken)} reused trials, not with those of the run now given",
            where=str(journal.path),
            todo="leave --reuse out to continue, or search into another folder",
        )


def _run_trial(trial: Asked, subject: Subject, expected: set[str]) -> Told:
    """Evaluate one trial; whatever the objective does becomes its status."""
    scores: Scores = {}
    status: Status = "ok"
    error = ""
    times = [time.perf_counter()]
    try:
        subject.apply(trial.weights)
        times.append(time.perf_counter())
        scores = as_scores(subject.score(dict(trial.weights)))
    except NonFiniteError as problem:
        status, error = "nan", str(problem)
    except OptimerError:
        raise  # files or settings: every further trial would meet it too
    except Exception as problem:  # the objective is foreign code
        status, error = "crashed", f"{type(problem).__name__}: {problem}"
    times.append(time.perf_counter())
    if status == "ok":
        missing = sorted(expected - scores.keys())
        if missing:
            raise RecipeError(
                f"the objective gave no score {missing[0]!r}; it gave {', '.join(scores)}",
                where="objective",
                todo="let the terms and the scores have the same names",
            )
        finite = {name: s for name, s in scores.items() if math.isfinite(s.value)}
        if len(finite) < len(scores):
            bad = min(scores.keys() - finite.keys())
            status, error = "nan", f"score {bad!r} is {scores[bad].value}"
        scores = finite
    return Told(
        number=trial.number,
        weights=trial.weights,
        origin=trial.origin,
        status=status,
        scores=scores,
        error=error,
        ask_s=trial.ask_s,
        merge_s=round(times[1] - times[0], 4),
        evaluate_s=round(times[-1] - times[1], 4),
    )


class _Function:
    """A Python function of the weights as the subject of a search; nothing is merged."""

    def __init__(self, config: SearchConfig, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self.identity = {
            "base": config.base,
            "vectors": {v.name: v.model for v in config.vectors},
            "model": {},
            "terms": getattr(evaluate, "identity", {}),
        }

    def prepare(self) -> None:
        """Nothing to load."""

    def apply(self, weights: dict[str, float]) -> None:
        """Nothing to merge."""

    def score(self, weights: dict[str, float]) -> Scored:
        """What the function says."""
        return self._evaluate(weights)

    def write(self, weights: dict[str, float], out: Path) -> None:
        """Nothing to write."""


def _require_smac() -> None:
    try:
        import smac  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "SMAC is not installed", todo="pip install 'optimer-engine[search]'"
        ) from error
