"""The comparison of searches: its worlds are what they say, its sums are right, runs go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.search_quality import METHODS, main
from benchmarks.search_tables import median_at, reached, tables
from benchmarks.search_worlds import FINAL, Landscape, Several, best_known, cost


def test_all_examples_without_noise_are_the_landscape() -> None:
    world = Landscape(4, 0.0, 7)
    w = np.array([0.3, 0.1, 0.0, 0.6])
    assert cost(world, w, 100) == pytest.approx(world.f(w))
    assert cost(world, w, FINAL) == pytest.approx(world.f(w))
    assert world.examples == 100 + FINAL
    assert world.regret(np.full(4, 0.25)) == 1.0 >= best_known(world)


def test_noise_is_what_the_cell_says() -> None:
    world = Landscape(4, 0.1, 7)
    w = np.full(4, 0.25)
    sd = np.std([cost(world, w, 100) for _ in range(400)])
    assert sd == pytest.approx(0.1 * world.uniform, rel=0.15)


def test_several_terms_have_a_best_that_none_beats() -> None:
    world = Several(3, 0.03, 5, {"a": 4.0, "b": 1.0, "c": 1.0})
    points = np.random.default_rng(0).uniform(size=(300, 3))
    assert min(world.regret(p) for p in points) >= 0.0
    assert world.regret(np.full(3, 1 / 3)) == pytest.approx(1.0)
    world.score(points[0], {"a": np.arange(5), "c": np.arange(7)})
    assert world.examples == 12


def test_medians_and_when_they_are_reached() -> None:
    curves = [[(10, 1.0), (30, 0.2)], [(20, 0.8), (40, 0.1)], [(10, 0.9), (50, 0.3)]]
    assert median_at(curves, 10) == 1.0
    assert median_at(curves, 40) == 0.2
    assert reached(curves, 0.8) == 30
    assert reached(curves, 0.05) == np.inf


def test_the_search_beats_random_points() -> None:
    worlds = [Landscape(4, 0.03, 0) for _ in range(2)]
    ours, random = (METHODS[m](w, 0)[0] for m, w in zip(("optimer", "random"), worlds, strict=True))
    assert ours[-1][1] < 0.3 < random[-1][1]
    assert ours[-1][0] == worlds[0].examples < 0.5 * worlds[1].examples


def test_runs_go_on_and_make_the_tables(tmp_path: Path) -> None:
    results = tmp_path / "r.jsonl"
    given = ["--seeds", "1", "--dims", "4", "--noises", "0.1", "--results", str(results)]
    methods = ["--methods", "random", "--methods", "paper"]
    methods += ["--methods", "multivariate", "--methods", "optimer"]
    pytest.importorskip("optuna", reason="the rivals are Optuna's")
    CliRunner().invoke(main, ["run", *given, *methods[:2]], catch_exceptions=False)
    first = results.read_text()
    CliRunner().invoke(main, ["run", *given, *methods], catch_exceptions=False)
    assert results.read_text().startswith(first) and results.read_text().count("\n") == 4
    done = CliRunner().invoke(main, ["table", "--results", str(results)], catch_exceptions=False)
    assert "| d=4 noise=10% | 1 |" in done.output and "of 1 runs of optimer" in done.output
    assert tables([]).startswith("| world")
