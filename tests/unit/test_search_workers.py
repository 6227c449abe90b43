"""Trials scored by several processes: the same search, and workers that die."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from optimer_engine.errors import MismatchError, MissingExtraError, OptimerError, RecipeError
from optimer_engine.search import Score, SearchConfig, Term, Vector, run_search
from optimer_engine.search.adviser import propose
from optimer_engine.search.config import with_absolute_paths
from optimer_engine.search.crew import Answer, Scorer
from optimer_engine.search.identity import identity
from optimer_engine.search.loop import Loop
from optimer_engine.search.subject import FunctionSubject
from optimer_engine.search.surrogate import GaussianProcess
from optimer_engine.search.trials import Asked, Journal, Run, Told

OPTIMUM = {"ja": 0.35, "zh": 0.0, "math": 0.6}
N = 80

needs_dask = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("distributed") is None,
    reason="Dask is an optional library",
)


def config(trials: int = 14, **more: object) -> SearchConfig:
    vectors = [Vector(name, f"vectors/{name}") for name in OPTIMUM]
    return SearchConfig(base="base", vectors=vectors, trials=trials, seed=3, **more)  # type: ignore[arg-type]


class Bowl:
    """A landscape seen through N examples; says who scored, and dies when it is told to.

    ``deadly`` maps a file to weights: whoever scores these weights removes the file and is killed.
    """

    def __init__(self, log: Path, deadly: dict[str, dict[str, float]] | None = None) -> None:
        self.counts = {"value": N}
        self.log, self.deadly = str(log), deadly or {}

    @property
    def identity(self) -> dict[str, dict[str, object]]:
        return {"value": {"data": "bowl"}}

    def __call__(
        self, w: dict[str, float], examples: dict[str, list[int]] | None = None
    ) -> dict[str, Score]:
        at = np.arange(N) if examples is None else np.array(examples["value"])
        for name, weights in self.deadly.items():
            if weights == w and Path(name).exists():
                Path(name).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        with Path(self.log).open("a") as file:
            file.write(json.dumps([os.getpid(), list(w.values()), len(at)]) + "\n")
        off = [(1 + i) * (w[n] - best) ** 2 for i, (n, best) in enumerate(OPTIMUM.items())]
        likes = np.random.default_rng(0).normal(size=(N, 3)) * 0.1
        value = np.log1p(sum(off)) + (likes - likes.mean(axis=0))[at] @ np.array(list(w.values()))
        return {"value": Score.of(value)}

    def calls(self) -> list[tuple[int, list[float], int]]:
        return [tuple(json.loads(line)) for line in Path(self.log).read_text().splitlines()]


def lines(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    found = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    dull = ("ask_s", "merge_s", "evaluate_s")
    return [{k: v for k, v in line.items() if k not in dull} for line in found]


def events(folder: Path, event: str) -> list[dict]:  # type: ignore[type-arg]
    return [line for line in lines(folder) if line["event"] == event]


@pytest.fixture(scope="module")
def cluster():  # type: ignore[no-untyped-def]
    """Two worker processes, brought back by a nanny when they die."""
    distributed = pytest.importorskip("distributed", reason="Dask is an optional library")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.CRITICAL,
    ) as made:
        yield made


@needs_dask
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_two_workers_share_the_trials_and_find_the_same(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bowl = Bowl(tmp_path / "log")
    report = run_search(
        config(), tmp_path / "a" / "run", evaluate=bowl, scheduler=cluster.scheduler_address
    )
    calls = bowl.calls()
    pids = {pid for pid, _, _ in calls}
    assert len(pids) == 2 and os.getpid() not in pids
    scored = Counter(pid for pid, _, _ in calls)
    assert min(scored.values()) >= 2
    for name, best in OPTIMUM.items():
        assert abs(report.best_weights[name] - best) < 0.15
    told = events(tmp_path / "a" / "run", "told")
    assert report.trials == 14 and report.failed == 0
    assert sorted(t["number"] for t in told) == list(range(len(told)))
    tried = [tuple(t["weights"].values()) for t in told if not t["origin"].startswith("confirm")]
    assert len(set(tried)) == 14
    assert all(t["scores"]["value"]["parts"] for t in told)
    # a trial stays with the worker that merged it
    by_point = {tuple(w): {pid for pid, v, _ in calls if v == w} for _, w, _ in calls}
    staged = [w for w in by_point if sum(1 for _, v, _ in calls if tuple(v) == w) > 1]
    confirmed = sum(t["origin"].startswith("confirm") for t in told)
    assert staged and sum(len(by_point[w]) > 1 for w in staged) <= confirmed


@needs_dask
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_worker_that_dies_loses_nothing_and_a_deadly_trial_only_itself(
    cluster,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    once, twice = tmp_path / "once", [tmp_path / "first", tmp_path / "second"]
    for path in (once, *twice):
        path.touch()
    uniform = dict.fromkeys(OPTIMUM, 0.333333333)
    alone = {"ja": 1.0, "zh": 0.0, "math": 0.0}
    deadly = {str(once): uniform, str(twice[0]): alone, str(twice[1]): alone}
    bowl = Bowl(tmp_path / "log", deadly)
    report = run_search(
        config(9), tmp_path / "a" / "run", evaluate=bowl, scheduler=cluster.scheduler_address
    )
    assert not any(path.exists() for path in (once, *twice))
    status = {t["origin"]: t for t in events(tmp_path / "a" / "run", "told")}
    assert status["uniform"]["status"] == "ok"
    assert status["only ja"]["status"] == "crashed"
    assert "workers died with it" in status["only ja"]["error"]
    assert (report.trials, report.failed) == (9, 1)


@needs_dask
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_one_worker_makes_the_search_that_no_worker_makes(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Proposals and scores are equal where no two trials are under way at once."""
    from optimer_engine.search import workers

    bowl = Bowl(tmp_path / "log")
    run_search(config(), tmp_path / "a" / "run", evaluate=bowl)
    first = sorted(cluster.scheduler_info["workers"])[:1]
    there = workers.Workers._there
    try:
        workers.Workers._there = lambda self: set(first)  # type: ignore[method-assign]
        run_search(
            config(), tmp_path / "b" / "run", evaluate=bowl, scheduler=cluster.scheduler_address
        )
    finally:
        workers.Workers._there = there  # type: ignore[method-assign]
    assert lines(tmp_path / "a" / "run") == lines(tmp_path / "b" / "run")


@needs_dask
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_errors_of_workers_are_told_like_those_of_one_process(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    class Broken(Bowl):
        def __call__(self, *args: object) -> dict[str, Score]:  # type: ignore[override]
            raise ValueError("no data")

    address = cluster.scheduler_address
    with pytest.raises(OptimerError, match=r"5 trials in a row failed.*ValueError: no data"):
        run_search(
            config(), tmp_path / "a" / "x", evaluate=Broken(tmp_path / "l"), scheduler=address
        )

    class Elsewhere(Bowl):
        @property
        def identity(self) -> dict[str, dict[str, object]]:
            return {"value": {"data": os.getpid()}}

    with pytest.raises(MismatchError, match=r"worker tcp.* has another pool: terms value"):
        run_search(
            config(), tmp_path / "b" / "x", evaluate=Elsewhere(tmp_path / "l"), scheduler=address
        )
    with pytest.raises(RecipeError, match="no Dask scheduler answers"):
        run_search(
            config(),
            tmp_path / "c" / "x",
            evaluate=bowl_of(tmp_path),
            scheduler="tcp://127.0.0.1:1",
        )


def bowl_of(folder: Path) -> Bowl:
    return Bowl(folder / "log")


def test_workers_without_dask_are_refused_naming_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"optimer-engine\[spread\]"):
        run_search(config(), tmp_path / "run", evaluate=bowl_of(tmp_path), workers=2)
    with pytest.raises(RecipeError, match="--workers"):
        run_search(
            config(), tmp_path / "run", evaluate=bowl_of(tmp_path), workers=2, scheduler="tcp://x:1"
        )


def test_an_objective_that_exits_fails_its_trial_and_takes_no_worker_with_it() -> None:
    """Dask scores in threads; an exit that left one would end the worker's process."""

    def exits(w: dict[str, float]) -> float:
        raise SystemExit(2)

    scorer = Scorer(lambda: FunctionSubject(config(), exits))
    point = dict.fromkeys(OPTIMUM, 0.5)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(scorer.score, point, None).result()
    assert (answer.status, answer.error) == ("crashed", "SystemExit: 2")
    with pytest.raises(SystemExit):  # the main thread's: a signal's, for instance
        scorer.score(point, None)


def test_more_workers_than_gpus_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="Dask is an optional library")
    with pytest.raises(RecipeError, match="7 workers need a GPU each"):
        run_search(config(device="cuda"), tmp_path / "run", evaluate=bowl_of(tmp_path), workers=7)


def test_trials_under_way_keep_the_next_proposals_away(tmp_path: Path) -> None:
    """Six proposals that know of each other lie apart; six that do not crowd in one place."""
    rng = np.random.default_rng(1)
    points = rng.random((20, 3))
    costs = ((points - 0.4) ** 2).sum(1) + 0.05 * rng.normal(size=20)
    model = GaussianProcess().fit(points, costs)

    def six(told: bool) -> float:
        made = np.empty((0, 3))
        for seed in range(6):
            running = made if told else None
            found = propose(points, costs, seed=seed, model=model, running=running)
            made = np.concatenate([made, found[None]])
        apart = np.linalg.norm(made[:, None] - made[None], axis=2)
        return float(np.median(apart[np.triu_indices(6, 1)]))

    assert six(told=True) > 2 * six(told=False)
    believed = model.believing(points[:2] + 0.05)
    mean, variance = model.predict(points[:2] + 0.05)
    np.testing.assert_allclose(believed.predict(points[:2] + 0.05)[0], mean, atol=1e-3)
    assert (believed.predict(points[:2] + 0.05)[1] <= variance).all()


def test_a_journal_of_several_workers_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    """Trials told out of order, and two left under way by a kill: both are made, nothing twice."""
    bowl = Bowl(tmp_path / "log")
    run_search(config(5), tmp_path / "a" / "run", evaluate=bowl)
    whole = [json.loads(x) for x in (tmp_path / "a/run/trials.jsonl").read_text().splitlines()]
    asked = {x["number"]: x for x in whole if x["event"] == "asked"}
    told = {x["number"]: x for x in whole if x["event"] == "told"}
    cut = [whole[0], asked[0], asked[1], asked[2], told[1], asked[3], told[0]]
    (tmp_path / "b" / "run").mkdir(parents=True)
    journal = tmp_path / "b" / "run" / "trials.jsonl"
    journal.write_text("".join(json.dumps(x) + "\n" for x in cut))
    before = len(bowl.calls())
    report = run_search(config(5), tmp_path / "b" / "run", evaluate=bowl)
    assert [t["number"] for t in events(tmp_path / "b" / "run", "told")][:4] == [1, 0, 2, 3]
    assert report.trials == 5
    scored = [tuple(w) for _, w, _ in bowl.calls()[before:]]
    assert tuple(asked[0]["weights"].values()) not in scored
    bad = [*cut, {**told[0], "number": 9}]
    journal.write_text("".join(json.dumps(x) + "\n" for x in bad))
    with pytest.raises(RecipeError, match="trial 9 where 4 is next"):
        run_search(config(5), tmp_path / "b" / "run", evaluate=bowl)


def test_the_journal_numbers_trials_as_they_are_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trials.jsonl")
    journal.begin(Run({}))
    for number in range(3):
        assert journal.next_number == number
        journal.ask(Asked(number, {"a": float(number)}, "sobol"))
    journal.tell(Told(1, {"a": 1.0}, "sobol", "ok"))
    assert journal.next_number == 3 and sorted(journal.pending) == [0, 2]
    journal.close()
    again = Journal(tmp_path / "trials.jsonl")
    assert sorted(again.pending) == [0, 2] and [t.number for t in again.told] == [1]
    again.close()


def test_paths_are_absolute_for_workers_and_names_of_the_hub_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "ja.txt").write_text("x")
    given = SearchConfig(
        base="base", vectors=[Vector("ja", "org/ja")], objective=[Term("ja", corpus="ja.txt")]
    )
    moved = with_absolute_paths(given)
    assert (moved.base, moved.vectors[0].model) == (str(tmp_path / "base"), "org/ja")
    assert moved.objective[0].corpus == str(tmp_path / "ja.txt")


class Several:
    """A crew in this process whose last trial is always the first one done."""

    def __init__(self, bowl: Bowl, seats: int) -> None:
        self.scorer = Scorer(lambda: FunctionSubject(config(), bowl))
        self.free, self.work = seats, []
        self.most = 0

    def seats(self) -> int:
        return self.free

    def score(self, number: int, weights: dict[str, float], examples: object) -> None:
        self.work.append((number, weights, examples))
        self.most = max(self.most, len(self.work))

    def answer(self) -> tuple[int, Answer]:
        number, weights, examples = self.work.pop()
        return number, self.scorer.score(weights, examples)  # type: ignore[arg-type]

    def done(self, number: int) -> None:
        assert number not in [n for n, _, _ in self.work]


@pytest.mark.parametrize("more", [{}, {"method": "paper"}])
def test_trials_that_end_in_any_order_are_all_told(tmp_path: Path, more: dict[str, str]) -> None:
    """More seats than known points; proposals are made beside trials under way."""
    if more:
        pytest.importorskip("optuna", reason="the paper's method is Optuna's TPE")
    bowl = Bowl(tmp_path / "log")
    wanted = config(26, patience=0, **more)
    journal = Journal(tmp_path / "run" / "trials.jsonl")
    subject = FunctionSubject(wanted, bowl)
    journal.begin(Run(identity(wanted, subject.identity)))
    crew = Several(bowl, 9)
    ended = Loop(wanted, subject.counts, crew, journal).run([])  # type: ignore[arg-type]
    journal.close()
    assert ended == "all 26 trials were made" and crew.most == 9 and not journal.pending
    told = events(tmp_path / "run", "told")
    tried = [t for t in told if not t["origin"].startswith("confirm")]
    assert [t["number"] for t in told] != sorted(t["number"] for t in told)
    assert sorted(t["number"] for t in told) == list(range(len(told)))
    assert len({tuple(t["weights"].values()) for t in tried}) == len(tried) == 26


@needs_dask
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_four_processes_of_our_own(tmp_path: Path) -> None:
    bowl = Bowl(tmp_path / "log")
    report = run_search(config(30), tmp_path / "a" / "run", evaluate=bowl, workers=4)
    assert report.trials == 30 and len({pid for pid, _, _ in bowl.calls()}) == 4
