"""What a good merge costs: the default search against the paper's protocol, example by example.

The landscape is synthetic and shaped as merging landscapes are found to be: near-orthogonal
vectors of different curvature, small cross terms, and one stiff direction, the total weight.

    f(w) = log(1 + (w − w*)' H (w − w*)),  w in [0, 1]^d
    example i scored at w  =  f(w) + e_i · w + n

e_i is what example i likes better or worse than the average one: a random direction, zero on
average over examples 1 to 100 and over 101 to 300, so that scoring all 100 leaves only the noise.
Its size is ``SPREAD``: over the examples, e_i · w at the uniform average has the standard deviation
SPREAD · f(uniform). On a tiny real pool we measured 0.3 to 2 for different objectives; 1 is used.
n is drawn anew at each evaluation, such that the mean of 100 examples has the standard deviation
noise · f(uniform).

Every method pays for each example it scores. **Regret** is f at the point the method would
recommend, over f(uniform): 1 is no better than 1/N, 0 is the optimum.

    paper          independent TPE (Optuna's default up to version 4), 100 trials on 100 examples,
                   the best 3 again on 300
    multivariate   the same with multivariate TPE (Optuna's default from version 5)
    random         uniform in the cube, 100 trials on 100 examples
    optimer        ``run_search`` with its defaults, on 100 examples
    optimer whole  the same with ``first_share`` 1: every trial on all 100 examples

    python -m benchmarks.search_quality run --seeds 20        # goes on where it was stopped
    python -m benchmarks.search_quality table
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np

RESULTS = Path(__file__).parent / "results" / "search_quality.jsonl"
DIMS, NOISES = (4, 6, 8), (0.0, 0.03, 0.1)
SPREAD = 1.0
EXAMPLES, FINAL = 100, 300
TRIALS, FINALISTS = 100, 3

Landscape = Callable[[np.ndarray], float]
Curve = list[tuple[int, float]]
"""Example-evaluations so far, and the regret of what would be recommended then."""


def landscape(d: int, seed: int) -> tuple[Landscape, np.ndarray]:
    """A random landscape and its optimum w* [d]."""
    rng = np.random.default_rng([seed, d])
    curvature = np.exp(rng.uniform(0.0, np.log(8.0), d))
    cross = rng.normal(size=(d, d)) * 0.1
    root = np.sqrt(np.outer(curvature, curvature))
    h = np.diag(curvature) + root * (cross + cross.T) / 2.0 + 12.0 / d
    optimum = np.clip(rng.dirichlet(np.full(d, 1.2)) * rng.uniform(0.8, 1.6), 0.0, 1.0)

    def f(w: np.ndarray) -> float:
        step = w - optimum
        return float(np.log1p(max(step @ h @ step, 0.0)))

    return f, optimum


class World:
    """A landscape seen through examples; counts what is asked of it."""

    def __init__(self, d: int, noise: float, seed: int) -> None:
        self.d = d
        self.f, _ = landscape(d, seed)
        self.uniform = self.f(np.full(d, 1.0 / d))
        likes = np.random.default_rng([seed, d, 7]).normal(size=(FINAL, d))
        for part in (slice(0, EXAMPLES), slice(EXAMPLES, FINAL)):
            likes[part] -= likes[part].mean(axis=0)
        self.likes = likes * SPREAD * self.uniform * d**0.5
        self.sd = noise * self.uniform * EXAMPLES**0.5
        self.rng = np.random.default_rng([seed, d, 1])
        self.examples = 0

    def score(self, w: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """One number per example; lower is better."""
        self.examples += len(examples)
        noise = self.sd * self.rng.normal(size=len(examples))
        return np.asarray(self.f(w) + self.likes[examples] @ w + noise)

    def regret(self, w: np.ndarray) -> float:
        """Noise-free, relative to the uniform average."""
        return self.f(w) / self.uniform


def optimer(first_share: float | None) -> Callable[[World, int], Curve]:
    """``run_search`` as users run it."""

    def run(world: World, seed: int) -> Curve:
        from optimer_engine.search import Score, SearchConfig, TrialDone, Vector, run_search

        names = [f"v{i}" for i in range(world.d)]
        share = {} if first_share is None else {"first_share": first_share}
        vectors = [Vector(name=n, model=n) for n in names]
        config = SearchConfig(base="base", vectors=vectors, seed=seed, **share)
        curve: Curve = []

        def evaluate(
            w: dict[str, float], examples: dict[str, list[int]] | None = None
        ) -> dict[str, Score]:
            at = np.arange(EXAMPLES) if examples is None else np.array(examples["value"])
            return {"value": Score.of(world.score(np.array([w[n] for n in names]), at))}

        evaluate.counts = {"value": EXAMPLES}  # type: ignore[attr-defined]

        def note(event: TrialDone) -> None:
            assert event.best_weights is not None
            best = np.array([event.best_weights[n] for n in names])
            curve.append((world.examples, world.regret(best)))

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"  # alone in its folder: nothing to take over
            report = run_search(config, out, evaluate=evaluate, callbacks=[note])
        best = np.array([report.best_weights[n] for n in names])
        return [*curve, (world.examples, world.regret(best))]

    return run


def random(world: World, seed: int) -> Curve:
    """Uniform in the cube; the best observed."""
    rng = np.random.default_rng(seed)
    return _best_of(world, (rng.uniform(size=world.d) for _ in range(TRIALS)), lambda _: None)[0]


def tpe(multivariate: bool) -> Callable[[World, int], Curve]:
    """Optuna's TPE in the paper's protocol."""

    def run(world: World, seed: int) -> Curve:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=20, multivariate=multivariate, seed=seed
        )
        study = optuna.create_study(sampler=sampler)
        trials = []

        def points() -> Iterator[np.ndarray]:
            for _ in range(TRIALS):
                trials.append(study.ask())
                at = [trials[-1].suggest_float(f"w{i}", 0.0, 1.0) for i in range(world.d)]
                yield np.array(at)

        curve, found = _best_of(world, points(), lambda c: study.tell(trials[-1], c))
        best = sorted(found, key=lambda pair: pair[0])[:FINALISTS]
        final = [world.score(w, np.arange(FINAL)).mean() for _, w in best]
        return [*curve, (world.examples, world.regret(best[int(np.argmin(final))][1]))]

    return run


def _best_of(
    world: World, points: Iterator[np.ndarray], tell: Callable[[float], object]
) -> tuple[Curve, list[tuple[float, np.ndarray]]]:
    found: list[tuple[float, np.ndarray]] = []
    curve: Curve = []
    for w in points:
        cost = float(world.score(w, np.arange(EXAMPLES)).mean())
        tell(cost)
        found.append((cost, w))
        best = min(found, key=lambda pair: pair[0])[1]
        curve.append((world.examples, world.regret(best)))
    return curve, found


METHODS: dict[str, Callable[[World, int], Curve]] = {
    "optimer": optimer(None),
    "optimer whole": optimer(1.0),
    "paper": tpe(False),
    "multivariate": tpe(True),
    "random": random,
}


@click.group()
def main() -> None:
    """Measure the search: example-evaluations against the quality found."""


@main.command()
@click.option("--seeds", default=20, show_default=True)
@click.option("--dims", multiple=True, type=int, default=DIMS, show_default=True)
@click.option("--noises", multiple=True, type=float, default=NOISES, show_default=True)
@click.option("--methods", multiple=True, type=click.Choice(list(METHODS)), default=list(METHODS))
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def run(
    seeds: int, dims: tuple[int, ...], noises: tuple[float, ...], methods: tuple[str, ...],
    results: Path,
) -> None:  # fmt: skip
    """Make the runs that RESULTS lacks, one line of JSON each."""
    done = {(r["method"], r["d"], r["noise"], r["seed"]) for r in _rows(results)}
    for seed in range(seeds):
        for d in dims:
            for noise in noises:
                for method in methods:
                    if (method, d, noise, seed) in done:
                        continue
                    started = time.perf_counter()
                    curve = METHODS[method](World(d, noise, seed), seed)
                    row = {
                        "method": method, "d": d, "noise": noise, "seed": seed,
                        "seconds": round(time.perf_counter() - started, 2),
                        "curve": _thinned(curve),
                    }  # fmt: skip
                    with results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(method, d, noise, seed, row["seconds"], file=sys.stderr, flush=True)


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def table(results: Path) -> None:
    """Print the tables that the results make."""
    print(tables(_rows(results)))


def _thinned(curve: Curve) -> Curve:
    """Only where the regret changes, to 4 digits, and the end."""
    kept: Curve = []
    for examples, regret in curve:
        value = float(f"{regret:.4g}")
        if not kept or value != kept[-1][1]:
            kept.append((examples, value))
    return [*kept, (curve[-1][0], kept[-1][1])]


def _rows(results: Path) -> list[dict]:  # type: ignore[type-arg]
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


def median_at(curves: list[Curve], examples: float) -> float:
    """Median regret when every run has spent ``examples``; infinite before its first score."""
    return float(
        np.median([next((r for e, r in reversed(c) if e <= examples), np.inf) for c in curves])
    )


def reached(curves: list[Curve], regret: float) -> float:
    """The least number of examples at which, and after which, the median is at most ``regret``."""
    spent = sorted({e for curve in curves for e, _ in curve}, reverse=True)
    least = np.inf
    for examples in spent:
        if median_at(curves, examples) > regret:
            break
        least = examples
    return least


def tables(rows: list[dict]) -> str:  # type: ignore[type-arg]
    """Final regrets, and what share of the paper's examples reaches the rivals' quality."""
    cells = sorted({(r["d"], r["noise"]) for r in rows})

    def curves(method: str, d: int, noise: float) -> list[Curve]:
        chosen = [r for r in rows if (r["method"], r["d"], r["noise"]) == (method, d, noise)]
        return [[(e, g) for e, g in r["curve"]] for r in chosen]

    shown = [m for m in METHODS if all(curves(m, *cell) for cell in cells)]
    lines = [
        "| d | noise | runs | " + " | ".join(shown) + " | examples, optimer |"
        " optimer to paper's | optimer to multivariate's |",
        "|" + "---|" * (len(shown) + 6),
    ]
    for d, noise in cells:
        all_of = {m: curves(m, d, noise) for m in shown}
        final = {m: median_at(c, np.inf) for m, c in all_of.items()}
        spent = np.median([c[-1][0] for c in all_of["optimer"]])
        full = TRIALS * EXAMPLES + FINALISTS * FINAL
        shares = [reached(all_of["optimer"], final[m]) / full for m in ("paper", "multivariate")]
        runs = min(len(c) for c in all_of.values())
        lines.append(
            f"| {d} | {noise:.0%} | {runs} | "
            + " | ".join(f"{final[m]:.3f}" for m in shown)
            + f" | {spent:,.0f} of {full:,} | "
            + " | ".join(f"{s:.1%}" if np.isfinite(s) else "not reached" for s in shares)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.search_quality")
