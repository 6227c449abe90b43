"""What a good merge costs: the default search against the paper's protocol, example by example.

Every method pays for each example it scores. `search_worlds` and `search_pool` say what is searched
and what regret is: 0 at the optimum.

    paper          independent TPE (Optuna's default up to version 4), 100 trials on 100 examples of
                   each term, the best 3 again on 300
    multivariate   the same with multivariate TPE (Optuna's default from version 5)
    random         uniform in the cube, 100 trials on 100 examples
    optimer        ``run_search`` with its defaults, on 100 examples of each term
    optimer whole  the same with ``first_share`` 1: every trial on all 100 examples
    fresh, reuse   a search for one term more than for the others, from nothing, and with the trials
                   of a finished search for all terms alike

    python -m benchmarks.search_quality run --pool FOLDER      # goes on where it was stopped
    python -m benchmarks.search_quality exact --pool FOLDER    # real merges of the ends
    python -m benchmarks.search_quality table --write          # into docs/search.md
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.search_tables import Curve, exact_table, tables
from benchmarks.search_worlds import (
    EXAMPLES,
    FINAL,
    Landscape,
    Several,
    World,
    best_known,
    cost,
)

RESULTS = Path(__file__).parent / "results" / "search_quality.jsonl"
DOCS, MARK = Path(__file__).parents[1] / "docs" / "search.md", "<!-- search_quality -->"
DIMS, NOISES = (4, 6, 8), (0.0, 0.03, 0.1)
TRIALS, FINALISTS = 100, 3
EVENLY, ONE_MORE = {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 4.0, "b": 1.0, "c": 1.0}
"""The goals of the search whose trials are taken over, and of the one that takes them over."""

Found = tuple[Curve, list[float]]
"""A curve, and the weights at its end."""


def optimer(world: World, seed: int, **settings: Any) -> Found:
    """``run_search`` as users run it."""
    with tempfile.TemporaryDirectory() as folder:  # alone in it: nothing to take over
        return _searched(world, seed, Path(folder) / "run", **settings)


def reuse(first: World, world: World, seed: int) -> Found:
    """``run_search`` in ``world`` with the trials of a search in ``first``, not counted."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        _searched(first, seed, Path(one) / "run")
        return _searched(world, seed + 1, Path(other) / "run", Path(one) / "run")


def _searched(
    world: World, seed: int, out: Path, reused: Path | None = None, **settings: Any
) -> Found:
    from optimer_engine.search import Score, SearchConfig, Term, TrialDone, Vector, run_search

    names = [f"v{i}" for i in range(world.d)]
    config = SearchConfig(
        base="base",
        vectors=[Vector(name=n, model=n) for n in names],
        objective=[Term(name=n, weight=g) for n, g in world.goal.items()],
        seed=seed,
        **settings,
    )
    curve: Curve = []

    def evaluate(
        w: dict[str, float], examples: dict[str, list[int]] | None = None
    ) -> dict[str, Score]:
        asked = examples or {t: list(range(EXAMPLES)) for t in world.goal}
        point = np.array([w[n] for n in names])
        scores = world.score(point, {t: np.array(at) for t, at in asked.items()})
        return {t: Score.of(*pair) for t, pair in scores.items()}

    evaluate.counts = dict.fromkeys(world.goal, EXAMPLES)  # type: ignore[attr-defined]

    def note(event: TrialDone) -> None:
        assert event.best_weights is not None
        best = np.array([event.best_weights[n] for n in names])
        curve.append((world.examples, world.regret(best)))

    report = run_search(config, out, evaluate=evaluate, reuse=reused, callbacks=[note])
    best = np.array([report.best_weights[n] for n in names])
    return [*curve, (world.examples, world.regret(best))], best.tolist()


def random(world: World, seed: int) -> Found:
    """Uniform in the cube; the best observed."""
    rng = np.random.default_rng(seed)
    points = (rng.uniform(size=world.d) for _ in range(TRIALS))
    curve, found = _best_of(world, points, lambda _: None)
    return curve, min(found, key=lambda pair: pair[0])[1].tolist()


def tpe(world: World, seed: int, *, multivariate: bool) -> Found:
    """Optuna's TPE in the paper's protocol."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(n_startup_trials=20, multivariate=multivariate, seed=seed)
    study = optuna.create_study(sampler=sampler)
    trials = []

    def points() -> Iterator[np.ndarray]:
        for _ in range(TRIALS):
            trials.append(study.ask())
            yield np.array([trials[-1].suggest_float(f"w{i}", 0.0, 1.0) for i in range(world.d)])

    curve, found = _best_of(world, points(), lambda c: study.tell(trials[-1], c))
    best = [w for _, w in sorted(found, key=lambda pair: pair[0])[:FINALISTS]]
    end = best[int(np.argmin([cost(world, w, FINAL) for w in best]))]
    return [*curve, (world.examples, world.regret(end))], end.tolist()


def _best_of(
    world: World, points: Iterator[np.ndarray], tell: Callable[[float], object]
) -> tuple[Curve, list[tuple[float, np.ndarray]]]:
    found: list[tuple[float, np.ndarray]] = []
    curve: Curve = []
    for w in points:
        found.append((cost(world, w, EXAMPLES), w))
        tell(found[-1][0])
        best = min(found, key=lambda pair: pair[0])[1]
        curve.append((world.examples, world.regret(best)))
    return curve, found


Call = Callable[[Any, int], Found]

METHODS: dict[str, Call] = {
    "optimer": optimer,
    "optimer whole": lambda world, seed: optimer(world, seed, first_share=1.0),
    "paper": lambda world, seed: tpe(world, seed, multivariate=False),
    "multivariate": lambda world, seed: tpe(world, seed, multivariate=True),
    "random": random,
}
ALL = [*METHODS, "fresh", "reuse"]


@click.group()
def main() -> None:
    """Measure the search: example-evaluations against the quality found."""


@main.command()
@click.option("--seeds", default=20, show_default=True)
@click.option("--first-seed", default=1000, show_default=True)
@click.option("--dims", multiple=True, type=int, default=DIMS, show_default=True)
@click.option("--noises", multiple=True, type=float, default=NOISES, show_default=True)
@click.option(
    "--methods",
    multiple=True,
    type=click.Choice(ALL),
    default=[m for m in ALL if m != "optimer whole"],
)
@click.option("--pool", type=click.Path(path_type=Path), help="Also search a real pool, kept here.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def run(
    seeds: int, first_seed: int, dims: tuple[int, ...], noises: tuple[float, ...],
    methods: tuple[str, ...], pool: Path | None, results: Path,
) -> None:  # fmt: skip
    """Make the runs that RESULTS lacks, one line of JSON each."""
    done = {(r["world"], r["method"], r["seed"]) for r in _rows(results) if "curve" in r}
    cells = [cell for d in dims for cell in _synthetic(d, noises)]
    if pool is not None:
        cells += _real(pool)
    for seed in range(first_seed, first_seed + seeds):
        for name, make, calls in cells:
            for method, call in calls.items():
                if method not in methods or (name, method, seed) in done:
                    continue
                world, started = make(seed), time.perf_counter()
                curve, end = call(world, seed)
                row = {
                    "world": name, "method": method, "seed": seed,
                    "seconds": round(time.perf_counter() - started, 2),
                    "curve": _thinned(curve), "end": [round(x, 4) for x in end],
                    "known": float(f"{best_known(world):.4g}"),
                }  # fmt: skip
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, method, seed, row["seconds"], file=sys.stderr, flush=True)


Cell = tuple[str, Callable[[int], World], dict[str, Call]]
"""Name of a world, the world of a seed, and what is run in it."""


def _synthetic(d: int, noises: Sequence[float]) -> list[Cell]:
    cells: list[Cell] = [
        (f"d={d} noise={noise:.0%}", partial(Landscape, d, noise), METHODS) for noise in noises
    ]

    def several(goal: dict[str, float], seed: int) -> Several:
        return Several(d, 0.03, seed, goal)

    second: dict[str, Call] = {
        "fresh": optimer,
        "reuse": lambda world, seed: reuse(several(EVENLY, seed), world, seed),
    }
    return [*cells, (f"d={d}, three terms", partial(several, ONE_MORE), second)]


def _real(folder: Path) -> list[Cell]:
    from benchmarks.search_pool import GOALS, Pool, RealWorld

    pool = Pool(folder)
    cells: list[Cell] = [
        (f"pool, {name}", partial(RealWorld, pool, goal), METHODS) for name, goal in GOALS.items()
    ]
    (every, evenly), (some, other) = GOALS.items()
    second: dict[str, Call] = {
        "fresh": optimer,
        "reuse": lambda world, seed: reuse(RealWorld(pool, evenly, seed), world, seed),
    }
    return [*cells, (f"pool, {some} after {every}", partial(RealWorld, pool, other), second)]


@main.command()
@click.option("--pool", type=click.Path(path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def exact(pool: Path, results: Path) -> None:
    """Merge the points that searches of the pool ended with, and score them, not the table."""
    from benchmarks.search_pool import GOALS, Pool, RealWorld

    rows, made = _rows(results), Pool(pool)
    done = {(r["world"], r["method"], r["seed"]) for r in rows if "exact" in r}
    for name, goal in GOALS.items():
        world = RealWorld(made, goal, 0)
        todo = [r for r in rows if r["world"] == f"pool, {name}" and "curve" in r]
        todo = [r for r in todo if (r["world"], r["method"], r["seed"]) not in done]
        found = made.exact(np.array([r["end"] for r in todo])) if todo else {}
        for i, row in enumerate(todo):
            test = sum(g * found[t][i] for t, g in goal.items()) / sum(goal.values())
            regret = (test - world.best) / (world.base - world.best)
            kept = {k: row[k] for k in ("world", "method", "seed")}
            with results.open("a") as file:
                file.write(json.dumps({**kept, "exact": float(f"{regret:.4g}")}) + "\n")
    print(exact_table(_rows(results)))


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--write", is_flag=True, help="Into docs/search.md, too.")
def table(results: Path, write: bool) -> None:
    """Print the tables that the results make."""
    rows = _rows(results)
    text = tables([r for r in rows if "curve" in r])
    if any("exact" in r for r in rows):
        text += "\n\n" + exact_table(rows)
    print(text)
    if write:
        page = DOCS.read_text("utf-8")
        before, after = page.index(MARK) + len(MARK), page.index("<!-- end -->")
        DOCS.write_text(page[:before] + "\n" + text + "\n" + page[after:], "utf-8")


def _thinned(curve: Curve) -> Curve:
    """Only where the regret changes, to 4 digits, and the end."""
    kept: Curve = []
    for examples, regret in curve:
        value = float(f"{regret:.4g}")
        if not kept or value != kept[-1][1]:
            kept.append((examples, value))
    return [*kept, (curve[-1][0], kept[-1][1])]


def _rows(results: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.search_quality")
