"""The search loop on known landscapes: it finds, repeats, survives, resumes and reuses."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimer_engine.errors import MismatchError, OptimerError, OutputError, RecipeError
from optimer_engine.search import Score, SearchConfig, Term, Vector, run_search
from optimer_engine.search.adviser import propose
from optimer_engine.search.surrogate import GaussianProcess
from optimer_engine.search.trials import Journal

OPTIMUM = {"ja": 0.35, "zh": 0.0, "math": 0.6}


def config(trials: int = 12, seed: int = 3, **more: object) -> SearchConfig:
    vectors = [Vector(name, f"vectors/{name}") for name in OPTIMUM]
    return SearchConfig(base="base", vectors=vectors, trials=trials, seed=seed, **more)


def bowl(w: dict[str, float]) -> float:
    """A curved landscape with a stiff total weight and one optimal weight on its bound."""
    step = [(1 + i) * (w[name] - best) ** 2 for i, (name, best) in enumerate(OPTIMUM.items())]
    return float(np.log1p(sum(step) + 4.0 * (sum(w.values()) - 0.95) ** 2))


def two_terms(w: dict[str, float]) -> dict[str, Score]:
    bits = np.array([bowl(w), 1.0 + w["zh"] ** 2, 2.0 + w["ja"]])
    right = [1.0, float(w["math"] > 0.3), float(w["math"] < 0.9)]
    return {"text": Score.of(bits, [2, 1, 1]), "sums": Score.of(right, higher_is_better=True)}


two_terms.identity = {"text": {"data": "x"}, "sums": {"data": "y"}}  # type: ignore[attr-defined]


def lines(folder: Path, *, timeless: bool = True) -> list[dict[str, object]]:
    found = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    if timeless:
        for line in found:
            for key in ("ask_s", "merge_s", "evaluate_s"):
                line.pop(key, None)
    return found


def told(folder: Path) -> list[dict[str, object]]:
    return [line for line in lines(folder) if line["event"] == "told"]


def test_finds_the_optimum_of_a_known_landscape(tmp_path: Path) -> None:
    """25 trials in three dimensions come within 0.05 of every optimal weight."""
    report = run_search(config(25), tmp_path, evaluate=bowl)
    for name, best in OPTIMUM.items():
        assert abs(report.best_weights[name] - best) < 0.05
    known = {row.name: row.cost for row in report.table}
    assert known["best"] < min(known[name] for name in known if name != "best")
    assert known["base"] == 0.0


def test_noise_does_not_lead_it_astray(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    report = run_search(
        config(30), tmp_path, evaluate=lambda w: bowl(w) + 0.02 * float(rng.normal())
    )
    uniform = bowl(dict.fromkeys(OPTIMUM, 1 / 3))
    assert bowl(report.best_weights) < 0.25 * uniform
    assert 0.005 < report.noise_sd < 0.08


def test_known_points_come_first(tmp_path: Path) -> None:
    run_search(config(7), tmp_path, evaluate=bowl)
    origins = [line["origin"] for line in told(tmp_path)]
    assert origins == ["base", "uniform", "only ja", "only zh", "only math", "sobol 0", "sobol 1"]


def test_known_points_outside_the_ranges_are_left_out(tmp_path: Path) -> None:
    vectors = [Vector("a", "a", range=(0.2, 1.0)), Vector("b", "b", range=(-1.0, 0.7))]
    narrow = SearchConfig(base="b", vectors=vectors, trials=8)
    report = run_search(narrow, tmp_path, evaluate=lambda w: (w["a"] - 0.2) ** 2 + w["b"] ** 2)
    assert [line["origin"] for line in told(tmp_path)][:2] == ["uniform", "only a"]
    for line in told(tmp_path):
        assert 0.2 <= line["weights"]["a"] <= 1.0  # type: ignore[index]
        assert -1.0 <= line["weights"]["b"] <= 0.7  # type: ignore[index]
    assert [row.name for row in report.table] == ["uniform", "only a", "best"]


def test_same_seed_repeats_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_search(config(12, seed), tmp_path / name, evaluate=bowl)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert told(tmp_path / "a")[-1]["weights"] != told(tmp_path / "c")[-1]["weights"]


class Killed(BaseException):
    """As abrupt as a process can end inside a test."""


@pytest.mark.parametrize("dies_at", [0, 4, 9])
def test_killed_in_a_trial_it_goes_on_as_if_it_had_not_been(tmp_path: Path, dies_at: int) -> None:
    run_search(config(), tmp_path / "whole", evaluate=bowl)
    calls = 0

    def dying(w: dict[str, float]) -> float:
        nonlocal calls
        calls += 1
        if calls == dies_at + 1:
            raise Killed
        return bowl(w)

    with pytest.raises(Killed):
        run_search(config(), tmp_path / "cut", evaluate=dying)
    assert lines(tmp_path / "cut")[-1]["event"] == "asked"
    run_search(config(), tmp_path / "cut", evaluate=bowl)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_kill_nine_loses_nothing(tmp_path: Path) -> None:
    """The real thing: the process dies by SIGKILL in its ninth evaluation."""
    script = """
import os, signal, sys
from tests.unit.test_search_loop import bowl, config, run_search
calls = []
def deadly(w):
    calls.append(w)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return bowl(w)
run_search(config(), sys.argv[1], evaluate=deadly)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cut")],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(told(tmp_path / "cut")) == 8
    run_search(config(), tmp_path / "cut", evaluate=bowl)
    run_search(config(), tmp_path / "whole", evaluate=bowl)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.02])
def test_a_torn_last_line_costs_at_most_its_trial(
    tmp_path: Path, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    run_search(config(), tmp_path / "whole", evaluate=bowl)
    content = (tmp_path / "whole" / "trials.jsonl").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "trials.jsonl").write_bytes(content[: int(kept * len(content))])
    with caplog.at_level(logging.WARNING):
        run_search(config(), tmp_path / "cut", evaluate=bowl)
    assert "cut short" in caplog.text
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_killed_at_every_effect_on_the_disk_it_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No told trial is lost, none counted twice, and the next proposals are the same."""
    from optimer_engine import durable
    from tests.faults.disk import Dying, Killed

    def search(name: str, disk: Dying) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", disk)
            run_search(config(6), tmp_path / name, evaluate=bowl)

    count = Dying(10**9)
    search("whole", count)
    assert count.count > 30
    for at in range(count.count):
        with pytest.raises(Killed):
            search(f"at{at}", Dying(at))
        run_search(config(6), tmp_path / f"at{at}", evaluate=bowl)
        assert told(tmp_path / f"at{at}") == told(tmp_path / "whole"), at


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from optimer_engine import durable
    from tests.faults.disk import Failing

    run_search(config(6), tmp_path / "whole", evaluate=bowl)
    for at in (0, 3, 8, 13):
        with monkeypatch.context() as patch, pytest.raises(OutputError) as caught:
            patch.setattr(durable, "os", Failing(at, errno.ENOSPC, forever=True))
            run_search(config(6), tmp_path / "cut", evaluate=bowl)
        assert "cannot be written: No space left on device" in str(caught.value)
    run_search(config(6), tmp_path / "cut", evaluate=bowl)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    run_search(config(8), tmp_path, evaluate=bowl)
    journal = tmp_path / "trials.jsonl"
    text = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*text[:5], '{"event":"told"}\n', *text[5:]]))
    with pytest.raises(RecipeError, match="line 6"):
        run_search(config(8), tmp_path, evaluate=bowl)


def test_more_trials_continue_a_finished_run(tmp_path: Path) -> None:
    run_search(config(12), tmp_path / "whole", evaluate=bowl)
    run_search(config(8), tmp_path / "grown", evaluate=bowl)
    run_search(config(12), tmp_path / "grown", evaluate=bowl)
    assert lines(tmp_path / "grown") == lines(tmp_path / "whole")


def test_a_finished_run_evaluates_nothing(tmp_path: Path) -> None:
    first = run_search(config(8), tmp_path, evaluate=bowl)

    def never(_: dict[str, float]) -> float:
        raise AssertionError("evaluated")

    again = run_search(config(8), tmp_path, evaluate=never)
    assert again.best_weights == first.best_weights
    assert json.loads((tmp_path / "search_report.json").read_text())["best_number"] == (
        first.best_number
    )


def test_another_search_in_the_same_folder_is_refused_naming_the_difference(tmp_path: Path) -> None:
    run_search(config(7), tmp_path, evaluate=bowl)
    other = config(7)
    wider = SearchConfig(
        base="base",
        vectors=[*other.vectors[:2], Vector("math", "vectors/math", (0.0, 2.0))],
        seed=3,
    )
    with pytest.raises(
        MismatchError, match=r"space math: here \[0\.0, 2\.0\], there \[0\.0, 1\.0\]"
    ):
        run_search(wider, tmp_path, evaluate=bowl)
    with pytest.raises(MismatchError, match="seed: here 9, there 3"):
        run_search(config(7, seed=9), tmp_path, evaluate=bowl)
    moved = SearchConfig(base="base", vectors=other.vectors[::-1], seed=3)
    with pytest.raises(MismatchError, match="space order"):
        run_search(moved, tmp_path, evaluate=bowl)


def test_two_searches_in_one_folder_are_refused(tmp_path: Path) -> None:
    def second(_: dict[str, float]) -> float:
        run_search(config(7), tmp_path, evaluate=bowl)
        return 0.0

    with pytest.raises(OutputError, match="another search"):
        run_search(config(7), tmp_path, evaluate=second)


@pytest.mark.parametrize("failure", ["crash", "nan", "inf"])
def test_failing_trials_are_survived_even_the_first(tmp_path: Path, failure: str) -> None:
    calls = 0

    def flaky(w: dict[str, float]) -> float:
        nonlocal calls
        calls += 1
        if calls in (1, 4, 9):
            if failure == "crash":
                raise RuntimeError("out of luck")
            return float(failure)
        return bowl(w)

    report = run_search(config(20), tmp_path, evaluate=flaky)
    assert report.failed == 3
    first = told(tmp_path)[0]
    assert first["status"] == ("crashed" if failure == "crash" else "nan")
    assert ("out of luck" if failure == "crash" else failure) in str(first["error"])
    assert "scores" not in first
    assert bowl(report.best_weights) < 0.5 * bowl(dict.fromkeys(OPTIMUM, 1 / 3))


def test_five_failures_in_a_row_stop_and_can_be_continued(tmp_path: Path) -> None:
    def broken(_: dict[str, float]) -> float:
        raise ValueError("no data")

    with pytest.raises(OptimerError, match=r"5 trials in a row failed.*ValueError: no data"):
        run_search(config(20), tmp_path, evaluate=broken)
    assert len(told(tmp_path)) == 5
    assert run_search(config(20), tmp_path, evaluate=bowl).failed == 5


@pytest.mark.parametrize("seed", range(4))
def test_one_absurd_cost_does_not_bend_the_surrogate(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, cube = rng.random((30, 2)), rng.random((4000, 2))
    costs = ((points - 0.4) ** 2).sum(1)
    costs[3] = 1e6
    mean, _ = GaussianProcess().fit(points, costs).predict(cube)
    assert np.abs(cube[mean.argmin()] - 0.4).max() < 0.05
    assert mean[((cube - 0.9) ** 2).sum(1).argmin()] > 0.4


def test_the_surrogate_interpolates_and_knows_where_it_is_ignorant() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((40, 3)) * 0.5
    costs = np.sin(3 * points).sum(1)
    model = GaussianProcess().fit(points, costs)
    mean, variance = model.predict(points)
    assert np.abs(mean - costs).max() < 0.02
    _, far = model.predict(np.ones((1, 3)))
    assert far[0] > 20 * variance.max()


def terms(**weights: float) -> list[Term]:
    return [Term(name, weight=weight) for name, weight in weights.items()]


def test_a_proposal_by_the_mean_is_where_the_model_expects_the_least() -> None:
    """The others lie around it, where it is less sure; only what is tried can be recommended."""
    rng = np.random.default_rng(2)
    points = rng.random((24, 3))
    costs = ((points - 0.4) ** 2).sum(1) + 0.1 * rng.normal(size=24)
    model = GaussianProcess().fit(points, costs)
    least = model.predict(rng.random((20_000, 3)))[0].min()
    for seed in range(3):
        surest, other = (
            model.predict(propose(points, costs, seed=seed, model=model, by_mean=by_mean)[None])
            for by_mean in (True, False)
        )
        assert surest[0][0] < least + 1e-3
        assert other[1][0] > 1.5 * surest[1][0]


def test_every_fourth_proposal_is_by_the_mean_and_the_first_after_a_reuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[bool] = []

    def noting(*arguments: Any, by_mean: bool, **options: Any) -> np.ndarray:
        kinds.append(by_mean)
        return propose(*arguments, by_mean=by_mean, **options)

    monkeypatch.setattr("optimer_engine.search.adviser.propose", noting)
    both = config(16, objective=terms(text=3.0, sums=1.0), patience=0)
    run_search(both, tmp_path / "a", evaluate=two_terms)
    assert kinds == [number % 4 == 3 for number in range(16 - len(kinds), 16)]
    kinds.clear()
    other = config(6, objective=terms(text=1.0, sums=4.0), patience=0)
    run_search(other, tmp_path / "b", evaluate=two_terms, reuse=tmp_path / "a")
    assert kinds == [True, False, False, False, True, False]


def test_cost_is_the_weighted_mean_of_signed_differences_to_the_base(tmp_path: Path) -> None:
    both = config(7, objective=terms(text=3.0, sums=1.0))
    report = run_search(both, tmp_path, evaluate=two_terms)
    rows = {row.name: row for row in report.table}
    base, uniform = rows["base"].scores, rows["uniform"].scores
    assert uniform["sums"] > base["sums"]
    expected = (3 * (uniform["text"] - base["text"]) - (uniform["sums"] - base["sums"])) / 4
    assert rows["uniform"].cost == pytest.approx(expected, abs=1e-12)
    stored = told(tmp_path)[0]["scores"]
    assert stored["text"]["sizes"] == [2.0, 1.0, 1.0]  # type: ignore[index]
    assert "sizes" not in stored["sums"]  # type: ignore[index, operator]


def test_reuse_is_the_same_as_scoring_afresh(tmp_path: Path) -> None:
    """Trials of one objective, told under another, give what evaluating them there would give."""
    run_search(config(12, objective=terms(text=1.0, sums=1.0)), tmp_path / "a", evaluate=two_terms)
    calls: list[dict[str, float]] = []

    def counted(w: dict[str, float]) -> dict[str, Score]:
        calls.append(w)
        return {"text": two_terms(w)["text"]}

    counted.identity = {"text": {"data": "x"}}  # type: ignore[attr-defined]
    only_text = config(3, seed=8, objective=terms(text=1.0))
    report = run_search(only_text, tmp_path / "b", evaluate=counted, reuse=tmp_path / "a")
    assert (report.trials, report.reused, len(calls)) == (3, 12, 3)
    reused = told(tmp_path / "b")[:12]
    for line in reused:
        fresh = two_terms(line["weights"])["text"]  # type: ignore[arg-type]
        assert line["scores"] == {"text": json.loads(json.dumps(vars_of(fresh)))}
    assert [line["origin"] for line in told(tmp_path / "b")][12:] == ["smac"] * 3
    with pytest.raises(MismatchError, match="began with 0 reused"):
        run_search(
            config(12, objective=terms(text=1.0, sums=1.0)),
            tmp_path / "a",
            evaluate=two_terms,
            reuse=tmp_path / "a",
        )
    # continued without the flag, and with it again: nothing is imported twice
    run_search(only_text, tmp_path / "b", evaluate=counted, reuse=tmp_path / "a")
    run_search(only_text, tmp_path / "b", evaluate=counted)
    assert len(told(tmp_path / "b")) == 15 and len(calls) == 3


def vars_of(score: Score) -> dict[str, object]:
    return {"value": score.value, "parts": score.parts, "sizes": score.sizes}


def test_reuse_refuses_what_was_not_measured_there(tmp_path: Path) -> None:
    run_search(config(7, objective=terms(text=1.0)), tmp_path / "a", evaluate=two_terms)

    def other(w: dict[str, float]) -> float:
        return bowl(w)

    other.identity = {"text": {"data": "another file"}}  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match="term text data: here another file, there x"):
        run_search(
            config(objective=terms(text=1.0)), tmp_path / "b", evaluate=other, reuse=tmp_path / "a"
        )
    with pytest.raises(MismatchError, match="no score named 'code'"):
        run_search(
            config(objective=terms(code=1.0)), tmp_path / "b", evaluate=bowl, reuse=tmp_path / "a"
        )
    with pytest.raises(RecipeError, match="no trials to read"):
        run_search(config(), tmp_path / "b", evaluate=bowl, reuse=tmp_path / "nowhere")
    assert not (tmp_path / "b").exists()


def test_a_term_the_objective_does_not_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no score 'code'; it gave value"):
        run_search(config(objective=terms(code=1.0)), tmp_path, evaluate=bowl)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vectors": []}, "vectors is empty"),
        ({"vectors": [Vector("a", "x"), Vector("a", "y")]}, "'a' is used twice"),
        ({"seed": -1}, "seed must lie in"),
        ({"trials": 0}, "trials must be 1 or more"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(
    wrong: dict[str, object], message: str
) -> None:
    good: dict[str, object] = {"base": "base", "vectors": [Vector("a", "x")]}
    with pytest.raises(RecipeError, match=message):
        SearchConfig(**(good | wrong))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="low < high"):
        Vector("a", "x", range=(1.0, 1.0))
    with pytest.raises(RecipeError, match="both task and metric"):
        Term("a", task="sums")


def test_the_journal_refuses_a_second_run_line(tmp_path: Path) -> None:
    run_search(config(7), tmp_path, evaluate=bowl)
    journal = tmp_path / "trials.jsonl"
    first = journal.read_text().splitlines()[0]
    with journal.open("a") as file:
        file.write(first + "\n")
    with pytest.raises(RecipeError, match="one run line"):
        Journal(journal)
