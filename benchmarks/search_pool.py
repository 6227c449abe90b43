"""A real landscape to search: bits per byte of real merges of a tiny pool, tabulated.

The base and the texts of `optimer demo` give four vectors (Japanese, Chinese, code, math; 82k
tokens of continued pre-training each). A search of 100 trials for each of twenty seeds and several
methods would take days of real evaluations, so the landscape is tabulated: `DESIGN` merges, random
in the cube and more of them where the weights' sum is small, are made by the engine and scored
block by block; then each block's bits are a polynomial of degree 3 in the weights, fitted to them.
A tenth of the design is left out of the fit and says how far the polynomial is off; the points that
the searches end with are merged and scored again, exactly.

Dev blocks are what searches see; each seed draws its own 100 of a domain's 300 (all 300 are the
paper's final). Regret is that of the *test* blocks, which no search sees, in the table's own
polynomial: (f(w) − f*) / (f(base) − f*), the share missed of what merging can gain over the base.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np

from benchmarks.search_worlds import FINAL, Asked

DESIGN, DEGREE, LENGTH = 100, 3, 16
TEST_BLOCKS = 100
GOALS = {
    "all four": {"ja": 1.0, "zh": 1.0, "code": 1.0, "math": 1.0},
    "ja and math": {"ja": 1.0, "math": 1.0},
}


class Pool:
    """The vectors, trained and tabulated in a folder; what is there is not made again."""

    def __init__(self, folder: Path) -> None:
        from optimer_engine.demo.assets import DOMAINS, unpack
        from optimer_engine.demo.loop import SCALES, Loop
        from optimer_engine.demo.machine import one_thread
        from optimer_engine.train.trainer import quiet_libraries

        self.folder, self.domains = folder, DOMAINS
        scale = SCALES["full"]
        with quiet_libraries(), one_thread():
            unpack(folder / "text", scale.text_bytes)
            for domain in DOMAINS:
                if not (folder / "cpt" / domain / "vector").exists():
                    Loop(folder, scale).train(f"cpt/{domain}", {domain: 1.0}, scale.tokens)
            if not (folder / "table.npz").exists():
                self._tabulate()
        self.table = dict(np.load(folder / "table.npz"))
        terms = _powers(len(DOMAINS))
        fitted = len(self.table["weights"]) * 9 // 10
        self.coefficients: dict[str, np.ndarray] = {}
        self.errors: dict[str, float] = {}
        for name in (k for k in self.table if k.startswith("bits")):
            x = _features(self.table["weights"], terms)
            bits = self.table[name]
            kept = _solve(x[:fitted], bits[:fitted])
            off = (x[fitted:] @ kept - bits[fitted:]).sum(axis=1) / self.nbytes(name).sum()
            self.errors[name.removeprefix("bits ")] = float(np.sqrt((off**2).mean()))
            self.coefficients[name] = _solve(x, bits)
        self.terms = terms

    def nbytes(self, name: str) -> np.ndarray:
        """Bytes of each block."""
        return self.table[name.replace("bits", "bytes")]

    def bits(self, name: str, w: np.ndarray) -> np.ndarray:
        """Bits of each block at ``w`` by the polynomial; name is like "bits dev ja"."""
        return np.asarray((_features(w[None], self.terms) @ self.coefficients[name])[0])

    def exact(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Bits per byte of the test blocks of real merges, by domain, float64 [n]."""
        found = self._score(points, ("test",))
        return {
            d: found[f"bits test {d}"].sum(axis=1) / found[f"bytes test {d}"].sum()
            for d in self.domains
        }

    def _tabulate(self) -> None:
        rng = np.random.default_rng(0)
        d = len(self.domains)
        random = rng.uniform(size=(DESIGN, d))
        near = rng.dirichlet(np.ones(d), DESIGN) * rng.uniform(0.0, 2.0, (DESIGN, 1))
        points = np.where(np.arange(DESIGN)[:, None] % 2, np.minimum(near, 1.0), random)
        points[: d + 2] = [np.zeros(d), np.full(d, 1 / d), *np.eye(d)]
        found = self._score(points, ("dev", "test"))
        np.savez_compressed(self.folder / "table.npz", weights=points, **found)

    def _score(self, points: np.ndarray, splits: tuple[str, ...]) -> dict[str, np.ndarray]:
        from tqdm import tqdm

        from optimer_engine.demo.assets import BASE
        from optimer_engine.planner import plan
        from optimer_engine.search import CorpusObjective
        from optimer_engine.search.live import load_model, load_tokenizer
        from optimer_engine.sink import LiveModelSink

        limits = {"dev": FINAL, "test": TEST_BLOCKS}
        text = self.folder / "text"
        files = {f"{s} {d}": text / f"{d}.{s}.jsonl" for s in splits for d in self.domains}
        objective = CorpusObjective(
            files, load_tokenizer(str(BASE)), block_length=LENGTH, batch_size=32,
            limits={name: limits[name.split()[0]] for name in files},
        )  # fmt: skip
        sources = [
            {"name": d, "model": str(self.folder / "cpt" / d / "vector"), "weight": 0.0}
            for d in self.domains
        ]
        made = plan({"base": str(BASE), "sources": sources, "out_dtype": "float32"})
        model = load_model(str(BASE))
        rows: dict[str, list[list[float]]] = {name: [] for name in files}
        sizes: dict[str, list[float]] = {}
        for point in tqdm(points, desc="real merges", file=sys.stderr, delay=2):
            weights = dict(zip(self.domains, map(float, point), strict=True))
            made.with_weights(weights).run(LiveModelSink(model))
            for name, score in objective(model).items():
                rows[name].append(score.parts)
                sizes[name] = score.sizes
        made.close()
        return {f"bits {n}": np.array(r) for n, r in rows.items()} | {
            f"bytes {n}": np.array(s) for n, s in sizes.items()
        }


class RealWorld:
    """The pool as a `search_worlds.World`."""

    def __init__(self, pool: Pool, goal: Mapping[str, float], seed: int) -> None:
        self.pool, self.d, self.goal, self.examples = pool, len(pool.domains), dict(goal), 0
        rng = np.random.default_rng([seed, 5])
        self.order = {d: rng.permutation(FINAL) for d in pool.domains}
        self.best, self.base = self._least(), self.test(np.zeros(self.d))

    def score(self, w: np.ndarray, asked: Asked) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """See `search_worlds.World`: bits and bytes of blocks."""
        found = {}
        for name, at in asked.items():
            blocks, kind = self.order[name][at], f"bits dev {name}"
            self.examples += len(at)
            found[name] = self.pool.bits(kind, w)[blocks], self.pool.nbytes(kind)[blocks]
        return found

    def test(self, w: np.ndarray) -> float:
        """The goal on the test blocks, bits per byte."""
        total = 0.0
        for name, g in self.goal.items():
            kind = f"bits test {name}"
            total += g * self.pool.bits(kind, w).sum() / self.pool.nbytes(kind).sum()
        return float(total / sum(self.goal.values()))

    def regret(self, w: np.ndarray) -> float:
        """Share missed of what merging can gain over the base, on test blocks."""
        return (self.test(w) - self.best) / (self.base - self.best)

    def _least(self) -> float:
        from scipy.optimize import minimize

        starts = np.random.default_rng(0).dirichlet(np.ones(self.d), 10)
        box = [(0.0, 1.0)] * self.d
        ends = [minimize(self.test, s, bounds=box, method="L-BFGS-B").fun for s in starts]
        return float(min(ends))


def _powers(d: int) -> list[tuple[int, ...]]:
    return [c for k in range(DEGREE + 1) for c in combinations_with_replacement(range(d), k)]


def _features(points: np.ndarray, terms: list[tuple[int, ...]]) -> np.ndarray:
    return np.array([[np.prod(point[list(term)]) for term in terms] for point in points])


def _solve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with a ridge that only keeps it well-posed."""
    return np.asarray(np.linalg.solve(x.T @ x + 1e-8 * np.eye(x.shape[1]), x.T @ y))
