"""What searches are compared on: landscapes over merge weights, seen through examples.

A world has terms, each with `EXAMPLES` examples that a search may ask for and `FINAL` that a
protocol may use in the end. It counts what is asked of it, and knows what no search may know:
**regret**, the noise-free quality of a point, 0 at the optimum.

**Synthetic** (`Landscape`), shaped as merging landscapes are found to be: near-orthogonal vectors
of different curvature, small cross terms, and one stiff direction, the total weight.

    f(w) = log(1 + (w − w*)' H (w − w*)),  w in [0, 1]^d
    example i scored at w  =  f(w) + e_i · w + n

e_i is what example i likes better or worse than the average one: a random direction, zero on
average over examples 1 to 100 and over 101 to 300, so that scoring all 100 leaves only the noise.
Its size is `SPREAD`: over the examples, e_i · w at the uniform average has the standard deviation
SPREAD · f(uniform). On a tiny real pool we measured 0.3 to 2 for different objectives; 1 is used.
n is drawn anew at each evaluation, such that the mean of 100 examples has the standard deviation
noise · f(uniform). Regret is f(w) / f(uniform): 1 at the uniform average. `Several` has a landscape
for each of three terms and another optimum in each.

**Real** (`benchmarks.search_pool`): bits per byte of real merges, tabulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

SPREAD = 1.0
EXAMPLES, FINAL = 100, 300

Asked = Mapping[str, np.ndarray]
"""By term, the numbers of examples."""


class World(Protocol):
    """What a method of search is given.

    Attributes:
        d: dimension; weights lie in [0, 1]^d.
        goal: weight of each term in the cost.
        examples: example-evaluations made so far.
    """

    d: int
    goal: dict[str, float]
    examples: int

    def score(self, w: np.ndarray, asked: Asked) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By term, the examples' parts and sizes; the score is Σ parts / Σ sizes, lower better."""
        ...

    def regret(self, w: np.ndarray) -> float:
        """Noise-free, 0 at the optimum."""
        ...


def cost(world: World, w: np.ndarray, n: int) -> float:
    """The weighted mean of the terms over the first ``n`` examples of each."""
    scores = world.score(w, {name: np.arange(n) for name in world.goal})
    means = {name: parts.sum() / sizes.sum() for name, (parts, sizes) in scores.items()}
    return float(sum(g * means[t] for t, g in world.goal.items()) / sum(world.goal.values()))


def best_known(world: World) -> float:
    """The least regret of the base, the uniform average and each vector alone."""
    points = [np.zeros(world.d), np.full(world.d, 1.0 / world.d), *np.eye(world.d)]
    return min(world.regret(point) for point in points)


def landscape(d: int, seed: int) -> Callable[[np.ndarray], float]:
    """A random landscape."""
    rng = np.random.default_rng([seed, d])
    curvature = np.exp(rng.uniform(0.0, np.log(8.0), d))
    cross = rng.normal(size=(d, d)) * 0.1
    root = np.sqrt(np.outer(curvature, curvature))
    h = np.diag(curvature) + root * (cross + cross.T) / 2.0 + 12.0 / d
    optimum = np.clip(rng.dirichlet(np.full(d, 1.2)) * rng.uniform(0.8, 1.6), 0.0, 1.0)

    def f(w: np.ndarray) -> float:
        step = w - optimum
        return float(np.log1p(max(step @ h @ step, 0.0)))

    return f


class Landscape:
    """One synthetic term."""

    goal: dict[str, float]

    def __init__(self, d: int, noise: float, seed: int) -> None:
        self.d, self.goal = d, {"value": 1.0}
        self.f = landscape(d, seed)
        self.uniform = self.f(np.full(d, 1.0 / d))
        likes = np.random.default_rng([seed, d, 7]).normal(size=(FINAL, d))
        for part in (slice(0, EXAMPLES), slice(EXAMPLES, FINAL)):
            likes[part] -= likes[part].mean(axis=0)
        self.likes = likes * SPREAD * self.uniform * d**0.5
        self.sd = noise * self.uniform * EXAMPLES**0.5
        self.rng = np.random.default_rng([seed, d, 1])
        self.examples = 0

    def score(self, w: np.ndarray, asked: Asked) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `World`; all sizes are 1."""
        at = asked["value"]
        self.examples += len(at)
        noise = self.sd * self.rng.normal(size=len(at))
        return {"value": (self.f(w) + self.likes[at] @ w + noise, np.ones(len(at)))}

    def regret(self, w: np.ndarray) -> float:
        """Relative to the uniform average."""
        return self.f(w) / self.uniform


class Several:
    """Three synthetic terms; ``goal`` says what is looked for."""

    def __init__(self, d: int, noise: float, seed: int, goal: Mapping[str, float]) -> None:
        self.d, self.goal = d, dict(goal)
        self.terms = {n: Landscape(d, noise, 1_000_000 + 3 * seed + i) for i, n in enumerate("abc")}
        self.best, self.uniform = self._least(), self._mean(np.full(d, 1.0 / d))

    @property
    def examples(self) -> int:
        """Over all terms."""
        return sum(term.examples for term in self.terms.values())

    def score(self, w: np.ndarray, asked: Asked) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `World`."""
        return {n: self.terms[n].score(w, {"value": at})["value"] for n, at in asked.items()}

    def regret(self, w: np.ndarray) -> float:
        """Of the goal, relative to the uniform average."""
        return (self._mean(w) - self.best) / (self.uniform - self.best)

    def _mean(self, w: np.ndarray) -> float:
        return sum(g * self.terms[n].f(w) for n, g in self.goal.items()) / sum(self.goal.values())

    def _least(self) -> float:
        from scipy.optimize import minimize

        starts = np.random.default_rng(0).uniform(size=(20, self.d)) / self.d * 2.0
        box = [(0.0, 1.0)] * self.d
        ends = [minimize(self._mean, s, bounds=box, method="L-BFGS-B").fun for s in starts]
        return float(min(ends))
