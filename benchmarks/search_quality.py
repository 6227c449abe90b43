"""How many trials a good merge costs: SMAC with our Gaussian process against TPE and random search.

The landscape is synthetic and shaped as merging landscapes are found to be: near-orthogonal
vectors of different curvature, small cross terms, and one stiff direction, the total weight.

    f(w) = log(1 + (w − w*)' H (w − w*)),  w in [0, 1]^d

Regret is the noise-free cost of the best observed trial over that of the uniform average: 1 is no
better than 1/N, 0 is the optimum. Optuna, where it is installed, gives the TPE columns.

    python benchmarks/search_quality.py --dims 4 8 --seeds 5 --trials 50 --noise 0.03
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

Landscape = Callable[[np.ndarray], float]
Method = Callable[[Landscape, Landscape, int, int, int], list[float]]


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


def smac_gp(f: Landscape, noisy: Landscape, d: int, trials: int, seed: int) -> list[float]:
    """The default of ``optimer search``, without its files."""
    from optimer_engine.search.adviser import propose
    from optimer_engine.search.config import Vector
    from optimer_engine.search.space import Space

    space = Space.of([Vector(name=f"v{i}", model="") for i in range(d)])
    first = [*space.known_points().values(), *space.sobol_points(seed).values()]
    points = [space.to_unit(w) for w in first[:trials]]
    costs = [noisy(p) for p in points]
    while len(points) < trials:
        asked_with = seed * 1000 + len(points)
        points.append(propose(np.array(points), np.array(costs), seed=asked_with))
        costs.append(noisy(points[-1]))
    return _best_so_far(f, points, costs)


def random(f: Landscape, noisy: Landscape, d: int, trials: int, seed: int) -> list[float]:
    """Uniform in the cube."""
    rng = np.random.default_rng(seed)
    points = [rng.uniform(size=d) for _ in range(trials)]
    return _best_so_far(f, points, [noisy(p) for p in points])


def tpe(multivariate: bool) -> Method:
    """Optuna's TPE; multivariate is its default from version 5, independent before."""

    def run(f: Landscape, noisy: Landscape, d: int, trials: int, seed: int) -> list[float]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=multivariate)
        study = optuna.create_study(sampler=sampler)
        points, costs = [], []
        for _ in range(trials):
            trial = study.ask()
            points.append(np.array([trial.suggest_float(f"w{i}", 0.0, 1.0) for i in range(d)]))
            costs.append(noisy(points[-1]))
            study.tell(trial, costs[-1])
        return _best_so_far(f, points, costs)

    return run


def _best_so_far(f: Landscape, points: list[np.ndarray], costs: list[float]) -> list[float]:
    order = [int(np.argmin(costs[: i + 1])) for i in range(len(costs))]
    return [f(points[i]) for i in order]


def methods() -> dict[str, Method]:
    """Everything that can run here."""
    found: dict[str, Method] = {"smac+gp+known points": smac_gp, "random": random}
    try:
        import optuna  # noqa: F401
    except ImportError:
        return found
    return {**found, "tpe multivariate": tpe(True), "tpe independent": tpe(False)}


def main() -> None:
    """Print one JSON line per method and dimension."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--noise", type=float, default=0.03, help="sd / (f(uniform) - f*)")
    parser.add_argument("--methods", nargs="+", default=None)
    args = parser.parse_args()
    at = [n for n in (20, 50, 100) if n <= args.trials]
    print(f"median regret at {'/'.join(map(str, at))} trials, noise {args.noise:.0%}")
    rows = []
    for name, method in methods().items():
        if args.methods and name.split()[0].split("+")[0] not in args.methods:
            continue
        for d in args.dims:
            curves, started = [], time.perf_counter()
            for seed in range(args.seeds):
                f, _ = landscape(d, seed)
                uniform = f(np.full(d, 1.0 / d))
                rng = np.random.default_rng([seed, d, 1])

                def noisy(w: np.ndarray, f=f, rng=rng, sd=args.noise * uniform) -> float:
                    return f(w) + sd * float(rng.normal())

                curves.append(np.array(method(f, noisy, d, args.trials, seed)) / uniform)
            median = np.median(np.array(curves), axis=0)
            rows.append(
                {
                    "method": name,
                    "d": d,
                    **{f"at_{n}": round(float(median[n - 1]), 4) for n in at},
                    "seconds_per_run": round((time.perf_counter() - started) / args.seeds, 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
