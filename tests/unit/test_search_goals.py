"""What a search can be asked for: limits, the worst term, units of the base, a front, programs."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from optimer_engine.cli.report import command as report_command
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.search import Score, SearchConfig, Term, Vector, run_search
from optimer_engine.search.command import CommandObjective
from optimer_engine.search.cost import Goal, Point, observe
from optimer_engine.search.heldout import heldout_rows, refuse_overlap
from optimer_engine.search.page import write_page
from optimer_engine.search.vllm import VllmTasks, tensors_in


def two(w: dict[str, float]) -> dict[str, Score]:
    """Japanese falls with its vector, English rises with the sum of both."""
    return {
        "ja": Score(2.0 + (w["ja"] - 0.8) ** 2 + 0.3 * (w["math"] - 0.2) ** 2),
        "en": Score(1.0 + 0.05 * (w["ja"] + w["math"]) ** 2),
    }


def config(**more: object) -> SearchConfig:
    settings = {
        "base": "base",
        "vectors": [Vector("ja", "vectors/ja"), Vector("math", "vectors/math")],
        "trials": 20,
        "patience": 0,
    } | more
    return SearchConfig(**settings)  # type: ignore[arg-type]


def test_a_limit_is_kept_and_costs_no_more_than_it_must(tmp_path: Path) -> None:
    """English may lose 1 %: (ja + math)² ≤ 0.2, so the best sum is √0.2 = 0.447."""
    free = config(objective=[Term("ja"), Term("en", weight=0.0, max_loss=10.0)])
    bound = config(objective=[Term("ja"), Term("en", weight=0.0, max_loss=0.01)])
    weights = run_search(free, tmp_path / "free", evaluate=two).best_weights
    assert weights["ja"] == pytest.approx(0.8, abs=0.05)
    report = run_search(bound, tmp_path / "bound", evaluate=two)
    kept = two(report.best_weights)
    assert kept["en"].value <= 1.0105
    assert 0.35 < report.best_weights["ja"] < 0.46
    assert report.best_cost < -0.4


def points(*values: dict[str, float]) -> list[Point]:
    return [
        Point(i, {"a": float(i)}, "x", {n: Score(v, n == "acc") for n, v in row.items()})
        for i, row in enumerate(values)
    ]


def test_aggregates_by_hand() -> None:
    rows = points({"bits": 2.0, "acc": 0.5}, {"bits": 1.8, "acc": 0.4}, {"bits": 2.2, "acc": 0.9})
    weights = {"bits": 3.0, "acc": 1.0}

    def costs(**more: object) -> list[float]:
        return list(observe(rows, Goal(weights, {}, **more)).costs)  # type: ignore[arg-type]

    assert costs() == pytest.approx([0.0, (3 * -0.2 + 0.1) / 4, (3 * 0.2 - 0.4) / 4])
    assert costs(aggregate="worst") == pytest.approx([0.0, 0.1, 0.6])
    assert costs(relative=True) == pytest.approx([0.0, (3 * -0.1 + 0.2) / 4, (3 * 0.1 - 0.8) / 4])
    limit = observe(rows, Goal(weights, {"acc": 0.1})).limits[0][0]
    assert limit == pytest.approx([-0.1, 0.1, -0.9])


def test_the_worst_term_decides(tmp_path: Path) -> None:
    def pulled(w: dict[str, float]) -> dict[str, float]:
        return {"a": 1 + (w["ja"] - 0.2) ** 2, "b": 1 + (w["ja"] - 0.6) ** 2 + w["math"]}

    both = config(objective=[Term("a"), Term("b", weight=1.0)], aggregate="worst")
    report = run_search(both, tmp_path, evaluate=pulled)
    # a can gain 0.04 at most, at 0.2, where b gains more as long as math stays below 0.16
    assert report.best_weights["ja"] == pytest.approx(0.2, abs=0.03)
    assert report.best_weights["math"] < 0.17
    assert report.best_cost == pytest.approx(-0.04, abs=0.001)


def test_a_front_is_found_and_shown(tmp_path: Path) -> None:
    def opposed(w: dict[str, float]) -> dict[str, float]:
        rest = (w["math"] - 0.5) ** 2
        return {"a": 1 + (w["ja"] - 0.1) ** 2 + rest, "b": 1 + (w["ja"] - 0.9) ** 2 + rest}

    both = config(objective=[Term("a"), Term("b")], aggregate="pareto", trials=35)
    report = run_search(both, tmp_path / "run", evaluate=opposed)
    front = [row.scores for row in report.front]
    assert len(front) >= 6
    for one in front:
        assert not any(other["a"] < one["a"] and other["b"] < one["b"] for other in front)
    spread = sorted(row.weights["ja"] for row in report.front)
    assert spread[0] < 0.3 and spread[-1] > 0.7
    page = write_page(tmp_path / "run").read_text()
    assert all(row.name in page for row in report.front)
    with pytest.raises(RecipeError, match="needs two terms"):
        config(objective=[Term("a")], aggregate="pareto")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0.0}, "is 0 and it has no max_loss"),
        ({"max_loss": -0.1}, "max_loss of 'a' must be 0 or more"),
        ({"command": ["x"]}, "both command and higher_is_better"),
        ({"command": ["x"], "corpus": "y", "higher_is_better": True}, "a corpus and a command"),
    ],
)
def test_terms_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Term("a", **wrong)  # type: ignore[arg-type]


def program(tmp_path: Path, text: str) -> CommandObjective:
    script = tmp_path / "score.py"
    script.write_text("import sys\nfolder = sys.argv[1]\n" + text)
    command = [sys.executable, str(script), "{model}"]
    return CommandObjective([Term("judge", command=command, higher_is_better=True)])


def test_a_program_prints_the_score(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    found = program(tmp_path, "print('loading')\nprint(len(folder))")(folder)["judge"]
    assert found == Score(float(len(str(folder))), higher_is_better=True)
    found = program(tmp_path, 'print(\'{"parts": [1, 0, 1, 1], "sizes": [1, 1, 1, 1]}\')')(folder)
    assert found["judge"].value == 0.75 and found["judge"].parts == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sys.exit('no GPU')", "exited with 1: no GPU"),
        ("print('done')", "printed no score, its last line is 'done'"),
        ("", "printed no score"),
    ],
)
def test_a_program_that_fails_says_how(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        program(tmp_path, text)(tmp_path)
    missing = CommandObjective([Term("a", command=["no-such-program"], higher_is_better=True)])
    with pytest.raises(RuntimeError, match="cannot run 'no-such-program'"):
        missing(tmp_path)


# held-out data ------------------------------------------------------------------------------------


class Held:
    """Scores 400 examples of a merge: base, and a gain of 0.1 ± 0.5 per example for w = 1."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.base, self.gain = rng.normal(3, 2, 400), rng.normal(0.1, 0.5, 400)
        self.weight, self.calls = 0.0, 0

    def apply(self, weights: dict[str, float]) -> None:
        self.weight = weights["a"]

    def score_heldout(self) -> dict[str, Score]:
        self.calls += 1
        return {"t": Score.of(self.base - self.weight * self.gain)}


def test_heldout_intervals_are_paired_and_kept(tmp_path: Path) -> None:
    subject = Held()
    chosen = {"base": ({"a": 0.0}, 0.0), "best": ({"a": 1.0}, -0.15)}
    rows = heldout_rows(subject, {"t": 1.0}, chosen, tmp_path)  # type: ignore[arg-type]
    best = rows[1]
    se = subject.gain.std() / 400**0.5
    assert best.cost == pytest.approx(-subject.gain.mean(), abs=1e-6)
    assert best.low == pytest.approx(best.cost - 1.96 * se, abs=0.1 * se)
    assert best.high == pytest.approx(best.cost + 1.96 * se, abs=0.1 * se)
    assert best.gap == pytest.approx(best.cost + 0.15)
    assert (rows[0].cost, rows[0].low, rows[0].high) == (0.0, 0.0, 0.0)
    assert heldout_rows(subject, {"t": 1.0}, chosen, tmp_path) == rows  # type: ignore[arg-type]
    assert subject.calls == 2


def test_heldout_data_that_was_searched_on_is_refused() -> None:
    with pytest.raises(RecipeError, match="measures just what 'dev' of the objective measures"):
        refuse_overlap({"dev": {"data": "x"}}, {"test": {"data": "x"}})
    refuse_overlap({"dev": {"data": "x"}}, {"test": {"data": "y"}})


# the page -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that open and close, and everything a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_fetches_nothing_and_holds_the_numbers(tmp_path: Path) -> None:
    named = config(objective=[Term("ja"), Term("en")])
    report = run_search(named, tmp_path / "<run>", evaluate=two)
    done = CliRunner().invoke(
        report_command, [str(tmp_path / "<run>"), "--json"], catch_exceptions=False
    )
    text = Path(json.loads(done.stdout)["page"]).read_text("utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.fetched == [] and "script" not in page.tags
    assert not re.search(r"url\(|@import|nan", text)
    assert "Search &lt;run&gt;" in text and report.ended in text
    best = report.table[-1]
    for number in (*best.weights.values(), *best.scores.values()):
        assert f"<td>{number:.3f}</td>" in text or f"<td>{number:.4f}</td>" in text
    assert text.count("<tr") >= 20
    assert page.tags.count("svg") >= 5


def test_the_page_can_be_written_while_the_search_runs(tmp_path: Path) -> None:
    seen = []

    def watched(w: dict[str, float]) -> dict[str, Score]:
        if w["ja"] == 1.0:
            seen.append(write_page(tmp_path, refresh_s=10).read_text("utf-8"))
            raise RuntimeError("this one fails")
        return two(w)

    run_search(config(trials=6, objective=[Term("ja"), Term("en")]), tmp_path, evaluate=watched)
    assert "still running" in seen[0] and 'http-equiv="refresh"' in seen[0]
    assert "crashed" in write_page(tmp_path).read_text("utf-8")
    with pytest.raises(RecipeError, match="no trials to read"):
        write_page(tmp_path / "absent")


# vLLM ---------------------------------------------------------------------------------------------


def test_vllm_keeps_one_engine_and_reloads_each_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    class Engine:
        def __init__(self, **settings: object) -> None:
            calls.append(settings)
            self.model = SimpleNamespace(
                collective_rpc=lambda name, args: calls.append((name, args)),
                reset_prefix_cache=lambda: calls.append("reset"),
            )

    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    tasks = VllmTasks.__new__(VllmTasks)
    tasks._lm = None
    first = tasks._wrapped(tmp_path / "model")
    assert tasks._wrapped(tmp_path / "model") is first
    started, reloaded, reset = calls
    assert started["trust_remote_code"] is False  # type: ignore[index]
    assert started["worker_extension_cls"] == "optimer_engine.search.vllm.ReloadsWeights"  # type: ignore[index]
    assert reloaded == ("reload_from", (str(tmp_path / "model"),))
    assert reset == "reset"


def test_without_vllm_it_says_so(tmp_path: Path) -> None:
    tasks = VllmTasks.__new__(VllmTasks)
    tasks._lm = None
    with pytest.raises(MissingExtraError, match="engine: vllm needs vLLM"):
        tasks._wrapped(tmp_path)


def test_workers_are_given_every_tensor_of_the_merge(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    made = {f"w{i}": torch.full((2, 3), float(i)) for i in range(4)}
    save_file({n: made[n] for n in ("w0", "w3")}, tmp_path / "model-1.safetensors")
    save_file({n: made[n] for n in ("w1", "w2")}, tmp_path / "model-2.safetensors")
    found = dict(tensors_in(tmp_path))
    assert found.keys() == made.keys()
    assert all(torch.equal(found[n], made[n]) for n in made)
