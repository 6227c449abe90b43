"""Few examples first: what is asked, what is never asked twice, and what is decided from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from optimer_engine.errors import RecipeError
from optimer_engine.search import Score, SearchConfig, Term, Vector, run_search
from optimer_engine.search.cost import Goal, Point, observe
from optimer_engine.search.differences import difference, differences
from optimer_engine.search.staging import drawn, stages
from optimer_engine.search.surrogate import GaussianProcess

OPTIMUM = {"ja": 0.35, "zh": 0.1, "math": 0.6}
N = 96


class Examples:
    """A landscape seen through N examples, each with likes of its own; remembers what it is asked.

    The mean over all examples is the landscape itself.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0, sizes: bool = False) -> None:
        rng = np.random.default_rng(seed)
        likes = rng.normal(size=(N, 3)) * 0.4
        self.likes = likes - likes.mean(axis=0)
        self.hard = rng.normal(size=N) * 5.0  # some examples are hard for every model
        self.hard -= self.hard.mean()
        self.counts = {"text": N}
        self.identity = {"text": {"data": f"x{seed}"}}
        self.asked: list[tuple[tuple[float, ...], int]] = []
        self.noise, self.rng = noise, rng

    def __call__(
        self, w: dict[str, float], examples: dict[str, list[int]] | None = None
    ) -> dict[str, Score]:
        at = np.arange(N) if examples is None else np.array(examples["text"])
        self.asked += [(tuple(w.values()), int(e)) for e in at]
        value = truth(w) + self.hard[at] + self.likes[at] @ np.array(list(w.values()))
        return {"text": Score.of(value + self.noise * self.rng.normal(size=len(at)))}


def truth(w: dict[str, float]) -> float:
    step = [(1 + i) * (w[name] - best) ** 2 for i, (name, best) in enumerate(OPTIMUM.items())]
    return float(np.log1p(sum(step) + 4.0 * (sum(w.values()) - 1.05) ** 2))


def config(**more: object) -> SearchConfig:
    vectors = [Vector(name, f"vectors/{name}") for name in OPTIMUM]
    return SearchConfig(base="base", vectors=vectors, **({"trials": 20, "seed": 3} | more))  # type: ignore[arg-type]


def told(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "told"]


def test_it_finds_what_all_examples_find_and_pays_a_fraction(tmp_path: Path) -> None:
    staged, whole = Examples(), Examples()
    report = run_search(config(trials=30, patience=0), tmp_path / "a" / "run", evaluate=staged)
    alike = config(trials=30, patience=0, first_share=1.0)
    run_search(alike, tmp_path / "b" / "run", evaluate=whole)
    assert len(whole.asked) == 30 * N
    assert len(staged.asked) < 0.7 * len(whole.asked)
    assert truth(report.best_weights) < 0.1 * truth(dict.fromkeys(OPTIMUM, 1 / 3))
    assert report.examples == len(staged.asked)


def test_no_example_is_scored_twice_at_one_point(tmp_path: Path) -> None:
    evaluate = Examples()
    run_search(config(), tmp_path / "run", evaluate=evaluate)
    assert len(set(evaluate.asked)) == len(evaluate.asked)


def test_what_is_recommended_was_scored_on_all_examples(tmp_path: Path) -> None:
    """What was hopeless for one objective is the best for the other, and is scored to the end."""
    likes = np.random.default_rng(2).normal(size=(N, 3)) * 0.1
    likes -= likes.mean(axis=0)

    def opposed(
        w: dict[str, float], examples: dict[str, list[int]] | None = None
    ) -> dict[str, Score]:
        wanted = examples or {n: list(range(N)) for n in ("near", "far")}
        off = (1.0 - w["ja"]) ** 2 + w["zh"] ** 2 + w["math"] ** 2  # from ja alone
        cost = {"near": 5.0 * w["ja"] + w["zh"], "far": 5.0 * off}
        own = likes @ np.array(list(w.values()))
        return {n: Score.of(cost[n] + own[np.array(e)]) for n, e in wanted.items()}

    opposed.counts = {"near": N, "far": N}  # type: ignore[attr-defined]
    first = config(trials=12, objective=[Term("near"), Term("far", weight=1e-6)])
    run_search(first, tmp_path / "a", evaluate=opposed)
    stopped = [t for t in told(tmp_path / "a") if "examples" in t["scores"]["far"]]
    assert stopped
    second = config(trials=1, objective=[Term("far")])
    report = run_search(second, tmp_path / "b", evaluate=opposed, reuse=tmp_path / "a")
    confirmed = [t for t in told(tmp_path / "b") if t["origin"].startswith("confirm")]
    assert confirmed and "examples" not in confirmed[-1]["scores"]["far"]
    assert {r.name: r.cost_se for r in report.table}["best"] == 0.0
    assert report.examples < 4 * N


def test_a_run_beside_it_knows_the_answers(tmp_path: Path) -> None:
    """Base, uniform and single vectors of another run over the same data are not scored again."""
    first, second, stranger = Examples(), Examples(), Examples(seed=5)
    run_search(config(), tmp_path / "a", evaluate=first)
    report = run_search(config(seed=8), tmp_path / "b", evaluate=second)
    assert not set(first.asked) & set(second.asked)
    assert report.examples_known >= N  # the base, at least
    assert run_search(config(), tmp_path / "c", evaluate=stranger).examples_known == 0


def test_the_same_search_beside_it_costs_nothing(tmp_path: Path) -> None:
    evaluate = Examples()
    first = run_search(config(), tmp_path / "a", evaluate=evaluate)
    evaluate.asked.clear()
    again = run_search(config(), tmp_path / "b", evaluate=evaluate)
    assert evaluate.asked == [] and again.examples == 0
    assert again.best_weights == first.best_weights


def test_killed_anywhere_it_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    whole = Examples()
    run_search(config(), tmp_path / "a" / "run", evaluate=whole)
    journal = tmp_path / "a" / "run" / "trials.jsonl"
    calls = 0

    def timeless(path: Path) -> list[dict]:  # type: ignore[type-arg]
        found = [json.loads(line) for line in path.read_text().splitlines()]
        dull = ("ask_s", "merge_s", "evaluate_s")
        return [{k: v for k, v in line.items() if k not in dull} for line in found]

    class Dying(Examples):
        def __call__(self, *args: object) -> dict[str, Score]:  # type: ignore[override]
            nonlocal calls
            calls += 1
            if calls % 11 == 0:
                raise Killed
            return super().__call__(*args)  # type: ignore[arg-type]

    dying = Dying()
    for _ in range(20):
        try:
            run_search(config(), tmp_path / "b" / "run", evaluate=dying)
            break
        except Killed:
            continue
    assert calls > 22
    assert timeless(tmp_path / "b" / "run" / "trials.jsonl") == timeless(journal)
    dying.asked.clear()
    run_search(config(), tmp_path / "b" / "run", evaluate=dying)
    assert dying.asked == []  # finished: nothing is evaluated, confirmed or added
    assert timeless(tmp_path / "b" / "run" / "trials.jsonl") == timeless(journal)


def test_stages_double_up_to_all_and_spare_small_terms() -> None:
    rows = stages({"long": 100, "short": 40}, 0.125)
    assert [row["long"] for row in rows] == [13, 25, 50, 100]
    assert {row["short"] for row in rows} == {40}
    assert stages({"long": 100}, 1.0) == [{"long": 100}]
    orders = [drawn(3, number, 100) for number in (1, 1, 2)]
    assert (orders[0] == orders[1]).all() and (orders[0] != orders[2]).any()
    assert sorted(orders[0]) == list(range(100))


def score(
    values: np.ndarray, at: np.ndarray | None = None, sizes: np.ndarray | None = None
) -> Score:
    if at is None:
        return Score.of(values, sizes)
    chosen = None if sizes is None else sizes[at]
    return Score.of(values[at], chosen, examples=at.tolist())


def test_standard_errors_are_those_of_repeated_draws() -> None:
    """The variance told to the surrogate is what drawing subsets again and again gives."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(40, 160, N).astype(float)
    base = rng.normal(10.0, 4.0, N) * sizes / 100
    other = base + rng.normal(0.3, 0.8, N) * sizes / 100
    reference = Point(0, {"a": 0.0}, "base", {"t": score(base, sizes=sizes)})
    goal = Goal({"t": 1.0}, {})
    costs, variances = [], []
    for _ in range(600):
        at = np.sort(rng.permutation(N)[:32])
        point = Point(1, {"a": 1.0}, "x", {"t": score(other, at, sizes)})
        seen = observe([reference, point], goal)
        costs.append(seen.costs[1])
        variances.append(seen.variances[1])
    assert np.mean(costs) == pytest.approx((other - base).sum() / sizes.sum(), abs=0.01)
    assert np.mean(variances) == pytest.approx(np.var(costs), rel=0.15)
    unpaired = np.var([other[rng.permutation(N)[:32]].mean() for _ in range(600)])
    assert np.var(costs) < unpaired / 5
    whole = observe([reference, Point(1, {"a": 1.0}, "x", {"t": score(other, sizes=sizes)})], goal)
    assert whole.variances[1] == 0.0


def test_agreement_of_a_few_answers_is_not_taken_for_certainty() -> None:
    answers = np.zeros(N)
    changed = answers.copy()
    changed[:40] = 1.0
    points = [
        Point(0, {"a": 0.0}, "base", {"t": score(answers)}),
        Point(1, {"a": 0.5}, "x", {"t": score(changed, np.arange(0, N, 4))}),
        Point(2, {"a": 1.0}, "y", {"t": score(changed, np.arange(50, 62))}),  # all alike
    ]
    assert observe(points, Goal({"t": 1.0}, {})).variances[2] > 0.0


def test_the_surrogate_trusts_each_point_by_its_error() -> None:
    x = np.linspace(0, 1, 21)[:, None]
    y = (x[:, 0] - 0.4) ** 2
    lied = y.copy()
    lied[[3, 17]] += 0.5
    variances = np.zeros(21)
    variances[[3, 17]] = 0.25
    mean, variance = GaussianProcess().fit(x, lied, variances).predict(x)
    assert np.abs(mean - y).max() < 0.02
    assert variance[3] > variance[10]


def test_a_hopeless_trial_is_stopped_early_and_a_good_one_is_not(tmp_path: Path) -> None:
    run_search(config(), tmp_path / "run", evaluate=Examples())
    lines = [t for t in told(tmp_path / "run") if t["origin"] == "smac"]
    used = {len(t["scores"]["text"]["parts"]) for t in lines}
    assert min(used) == 12 and max(used) == N
    worst = max(lines, key=lambda t: truth(t["weights"]))
    assert len(worst["scores"]["text"]["parts"]) < N


def test_a_settled_search_stops_and_says_why(tmp_path: Path) -> None:
    evaluate = Examples()
    report = run_search(config(trials=200, patience=6), tmp_path / "run", evaluate=evaluate)
    assert report.trials < 100
    assert report.ended.startswith("settled: the last 6 trials gained")
    assert truth(report.best_weights) < 0.05
    through = run_search(config(trials=25, patience=0), tmp_path / "b" / "run", evaluate=evaluate)
    assert through.trials == 25 and through.ended == "all 25 trials were made"


def test_parts_that_do_not_match_the_examples_are_refused(tmp_path: Path) -> None:
    def wrong(
        w: dict[str, float], examples: dict[str, list[int]] | None = None
    ) -> dict[str, Score]:
        return {"text": Score.of(np.ones(N) * truth(w))}

    wrong.counts = {"text": N}  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"asked for 12 examples and gave 96 parts"):
        run_search(config(), tmp_path / "run", evaluate=wrong)


def test_a_score_without_parts_is_always_taken_whole(tmp_path: Path) -> None:
    sizes = []

    def corpus_level(
        w: dict[str, float], examples: dict[str, list[int]] | None = None
    ) -> dict[str, Score]:
        sizes.append(N if examples is None else len(examples["text"]))
        return {"text": Score(truth(w))}

    corpus_level.counts = {"text": N}  # type: ignore[attr-defined]
    run_search(config(trials=9), tmp_path / "run", evaluate=corpus_level)
    assert sizes == [N] * 9


def test_the_paper_protocol(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="the paper's method is Optuna's TPE")
    assert optuna

    class Long(Examples):
        def __call__(
            self, w: dict[str, float], examples: dict[str, list[int]] | None = None
        ) -> dict[str, Score]:
            assert examples is not None
            at = np.array(examples["text"])
            self.asked += [(tuple(w.values()), int(e)) for e in at]
            return {"text": Score.of(truth(w) + self.hard[at % N])}

    for name, trials in (("a", 25), ("b", None)):
        evaluate = Long()
        evaluate.counts = {"text": 300}
        paper = config(trials=trials, method="paper", objective=[Term("text")])
        report = run_search(paper, tmp_path / name / "run", evaluate=evaluate)
    lines = told(tmp_path / "b" / "run")
    short = told(tmp_path / "a" / "run")[:25]
    assert [t["weights"] for t in short] == [t["weights"] for t in lines[:25]]
    assert [t["origin"] for t in lines[:100]] == ["random"] * 20 + ["tpe"] * 80
    assert [t["origin"].split()[0] for t in lines[100:]] == ["confirm"] * 3
    parts = [len(t["scores"]["text"]["parts"]) for t in lines]
    assert parts == [100] * 100 + [300] * 3
    assert all(t["scores"]["text"]["examples"] == list(range(100)) for t in lines[:100])
    assert len(evaluate.asked) == 100 * 100 + 3 * 200
    assert report.best_weights in [t["weights"] for t in lines[100:]]
    first = sorted(lines[:100], key=lambda t: truth(t["weights"]))[:3]
    assert {t["number"] for t in first} == {int(t["origin"].split()[1]) for t in lines[100:]}


def scored(likes: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of the regressed and of the paired differences, and the variances claimed."""
    rng = np.random.default_rng(2)
    n, d = 40, likes.shape[1]
    weights = np.concatenate([np.zeros((1, d)), rng.uniform(size=(n, d))])
    hard = rng.normal(3.0, 2.0, N)
    truths = np.array([np.log1p(((w - 0.4) ** 2).sum()) for w in weights])
    scores: list[Score | None] = []
    for k, w in enumerate(weights):
        at = np.arange(N) if k == 0 else np.sort(rng.permutation(N)[: rng.choice([12, 24, 48])])
        parts = truths[k] + hard + likes @ w + noise * rng.normal(size=N)
        scores.append(score(parts, at if k else None))
    found, variances = differences(scores, weights, 0)
    truth = (truths - truths[0])[1:]
    base = scores[0]
    assert base is not None
    paired = np.array([difference(s, base) for s in scores[1:] if s is not None])
    return found[1:] - truth, paired - truth, variances[1:]


def test_what_other_trials_tell_of_the_examples_is_taken_off() -> None:
    likes = np.random.default_rng(0).normal(size=(N, 3))
    likes -= likes.mean(axis=0)
    errors, paired, variances = scored(likes, 0.05)
    assert np.mean(errors**2) < 0.15 * np.mean(paired**2)
    assert 0.4 < np.mean(errors**2 / variances) < 2.5


def test_nothing_is_taken_off_where_examples_differ_by_chance_alone() -> None:
    errors, paired, variances = scored(np.zeros((N, 3)), 0.5)
    assert np.mean(errors**2) < 1.1 * np.mean(paired**2)
    assert 0.4 < np.mean(errors**2 / variances) < 2.5


def test_the_surrogate_goes_on_downhill_beyond_the_trials() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.0, 0.5, (24, 3))
    cube = rng.random((20_000, 3))

    def costs(x: np.ndarray) -> np.ndarray:
        return ((x - 0.9) ** 2).sum(axis=1) + 0.03 * rng.normal(size=len(x))

    y = costs(x)
    best, first = float(y.min()), x.max()
    for _ in range(6):
        found = cube[GaussianProcess().fit(x, y).predict(cube)[0].argmin()][None]
        assert found.max() > first
        x, y = np.concatenate([x, found]), np.concatenate([y, costs(found)])
    assert y.min() < 0.5 * best


def test_more_numbers_get_more_trials() -> None:
    def trials(n: int, **more: object) -> int:
        vectors = [Vector(f"v{i}", f"v{i}") for i in range(n)]
        return SearchConfig(base="base", vectors=vectors, **more).total_trials  # type: ignore[arg-type]

    assert (trials(2), trials(6), trials(6, method="paper")) == (60, 90, 100)
    halves = {"layer_groups": 2, "merge_method": "ties", "parameters": {"density": [0.1, 1.0]}}
    assert trials(3, **halves) == 105
