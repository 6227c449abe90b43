"""``run_search``: open the journal, run the loop, write the winner and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from optimer_engine.durable import replace_file
from optimer_engine.errors import MismatchError, MissingExtraError, RecipeError
from optimer_engine.redaction import redacted_data
from optimer_engine.search.config import SearchConfig, with_absolute_paths
from optimer_engine.search.crew import Alone, Crew
from optimer_engine.search.final import final_difference
from optimer_engine.search.heldout import (
    HeldoutRow,
    heldout_rows,
    refuse_overlap,
    refuse_same_source,
)
from optimer_engine.search.identity import identity, refuse_other, rescored
from optimer_engine.search.live import LivePool
from optimer_engine.search.loop import JOURNAL, Callback, Loop
from optimer_engine.search.objective import Evaluate, Objective, Scored
from optimer_engine.search.report import SearchReport, make_report
from optimer_engine.search.space import Space
from optimer_engine.search.subject import FunctionSubject, Subject
from optimer_engine.search.trials import REUSED, Journal, Run, Told, read, unwritable

REPORT = "search_report.json"
CONFIG = "search.yaml"


def run_search(
    config: SearchConfig | str | Path,
    out: str | Path,
    *,
    objective: Objective | Callable[[Any], Scored] | None = None,
    evaluate: Evaluate | None = None,
    reuse: str | Path | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    callbacks: Iterable[Callback] = (),
) -> SearchReport:
    """Search the weights of ``config``'s vectors; run the same call again to continue.

    Args:
        config: a `SearchConfig`, or the path of its YAML file.
        out: the run folder: ``search.yaml``, what is searched, ``trials.jsonl``,
            ``search_report.json``, ``best.yaml`` and ``best/``.
        objective: scores a model, instead of the terms of ``config``; see `objective.Objective`.
        evaluate: scores weights, without any model: nothing is loaded or merged.
        reuse: an earlier run over the same pool whose trials are scored anew, not evaluated again;
            ``trials`` counts those made beside them. A continued run has them already.
        workers: trials scored at once, each by a process of its own on this machine where there
            are several; see `workers.on_this_machine`.
        scheduler: address of a Dask cluster whose workers score the trials, instead;
            "tcp://host:8786".
        callbacks: called after each trial.

    Returns:
        The report that is also written to ``search_report.json``.

    Raises:
        RecipeError: the configuration does not make sense, a file of it is missing.
        MismatchError: ``out`` or ``reuse`` holds a search over something else; says what differs.
        MissingExtraError: SMAC is not installed, or Dask where ``workers`` or ``scheduler`` ask
            for it.
        OutputError: another process is searching in ``out``.
        OptimerError: five trials in a row failed; and whatever reading the checkpoints raises.
    """
    if not isinstance(config, SearchConfig):
        from optimer_engine.recipe import read_config

        config = read_config(config, SearchConfig)
    _require_smac()
    if workers < 1 or (workers > 1 and scheduler is not None):
        raise RecipeError(
            f"got {workers} workers{'' if scheduler is None else ' and a scheduler'}",
            where="--workers",
            todo="give 1 or more, and not together with --dask-scheduler",
        )
    out = Path(out)
    make: Callable[[SearchConfig], Subject] = (
        partial(LivePool, objective=objective)
        if evaluate is None
        else partial(FunctionSubject, evaluate=evaluate)
    )
    subject = make(config)
    this = redacted_data(identity(config, subject.identity))
    refuse_same_source(config)
    refuse_overlap(this["terms"], redacted_data(subject.heldout_identity))
    # read before anything is written: a wrong run to reuse must not leave a run folder behind
    reused = [] if reuse is None else rescored(Path(reuse) / JOURNAL, this)
    journal = Journal(out / JOURNAL)
    try:
        if journal.run is None:
            journal.begin(Run(this), reused)
        else:
            refuse_other(this, journal.run.identity, f"{out} holds another search")
            _refuse_late_reuse(reused, journal)
        _write(out / CONFIG, config.to_yaml().encode())
        with _crew(config, subject, make, workers, scheduler) as crew:
            ended = Loop(config, subject.counts, crew, journal).run(list(callbacks))
            report = make_report(config, this, journal.told, ended)
            if config.heldout or config.heldout_share:
                report.heldout = _heldout(config, crew, report, out)
            if subject.final:
                goal = {t.name: t.weight for t in config.objective}
                report.final = final_difference(subject, goal, report.best_weights, out)
        subject.write(report.best_weights, out)
        clean = redacted_data(msgspec.to_builtins(report))
        _write(out / REPORT, msgspec.json.format(msgspec.json.encode(clean), indent=2))
    finally:
        journal.close()
        subject.close()
    return report


@contextmanager
def _crew(
    config: SearchConfig, subject: Subject, make: Callable[[SearchConfig], Subject],
    workers: int, scheduler: str | None,
) -> Iterator[Crew]:  # fmt: skip
    """Who scores the trials."""
    if workers == 1 and scheduler is None:
        yield Alone(subject, config.trial_limit_s)
        return
    from optimer_engine.search.workers import on_cluster, on_this_machine

    identities = subject.identity, subject.heldout_identity
    there = partial(make, with_absolute_paths(config))
    with (
        on_this_machine(workers, there, identities, config.device, config.trial_limit_s)
        if scheduler is None
        else on_cluster(scheduler, there, identities, config.trial_limit_s)
    ) as crew:
        yield crew


def _heldout(config: SearchConfig, crew: Crew, report: SearchReport, out: Path) -> list[HeldoutRow]:
    """The base, the uniform average, the best single vector and the winner, on held-out data."""
    found = {row.name: (row.weights, row.cost) for row in report.table}
    alone = [name for name in found if name.startswith("only ")]
    names = ["base", "uniform", *sorted(alone, key=lambda name: found[name][1])[:1], "best"]
    space = Space.of(config)
    zero = dict.fromkeys(space.names, 0.0) | space.known_points().get("base", {}), 0.0
    chosen = {name: found.get(name, zero) for name in names if name in found or name == "base"}
    terms = config.heldout or [t for t in config.objective if t.weight]
    weights = {t.name: t.weight for t in terms} or dict.fromkeys(report.higher_is_better, 1.0)
    return heldout_rows(crew.heldout, weights, chosen, out)


def searched_in(run: str | Path) -> SearchConfig:
    """What the search in folder ``run`` was asked for.

    Raises:
        RecipeError: there is none.
    """
    from optimer_engine.recipe import read_config

    return read_config(Path(run) / CONFIG, SearchConfig)


def merge_trial(run: str | Path, number: int) -> Path:
    """Merge trial ``number`` of a finished run to ``run/trial-NUMBER``; returns that folder.

    Raises:
        RecipeError: there is no such trial, or the run has no ``best.yaml`` to take the pool from;
            and whatever merging raises.
    """
    from optimer_engine.engine import merge
    from optimer_engine.recipe import Recipe

    run = Path(run)
    head, told = read(run / JOURNAL)
    tried = {t.number: t.weights for t in told}
    if number not in tried:
        raise RecipeError(f"no trial {number}; there are 0 to {max(tried)}", where=str(run))
    recipe = Recipe.load(run / "best.yaml")
    folder = run / f"trial-{number}"
    merge(Space.described(head.identity).recipe(recipe, tried[number]), folder)
    return folder


def _refuse_late_reuse(reused: list[Told], journal: Journal) -> None:
    """Trials can be taken over only when a run begins; later ones would change its proposals."""
    taken = [t for t in journal.told if t.origin.startswith(REUSED)]
    if reused and (not taken or taken != reused[: len(taken)]):
        raise MismatchError(
            f"began with {len(taken)} reused trials, not with those of the run now given",
            where=str(journal.path),
            todo="leave --reuse out to continue, or search into another folder",
        )


def _write(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def _require_smac() -> None:
    try:
        import smac  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"SMAC is not there: {error}", todo="pip install 'optimer-engine[search]'"
        ) from error
