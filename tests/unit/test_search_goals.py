"""What a search can be asked for: limits, the worst term, units of the base, a front, programs."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from optimer_engine.cli.report import command as report_command
from optimer_engine.errors import MissingExtraError, RecipeError
from optimer_engine.search import Score, SearchConfig, Term, Vector, run_search
from optimer_engine.search.command import CommandObjective
from optimer_engine.search.cost import Goal, Point, observe
from optimer_engine.search.heldout import heldout_rows, refuse_overlap, refuse_same_source
from optimer_engine.search.page import write_page
from optimer_engine.search.split import split
from optimer_engine.search.vllm import VllmTasks
from tests.conftest import nearby, random_tensors


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


def test_a_program_that_hangs_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    slow = CommandObjective([Term("judge", command=command, higher_is_better=True)], 0.3)
    with pytest.raises(RuntimeError, match=r"'judge' was stopped after 0\.3 s"):
        slow(tmp_path)


def test_a_trial_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    def slow(w: dict[str, float]) -> dict[str, Score]:
        if w["ja"] == 1.0:
            time.sleep(60)
        return two(w)

    limited = config(trials=6, objective=[Term("ja"), Term("en")], trial_limit_s=0.5)
    report = run_search(limited, tmp_path, evaluate=slow)
    assert (report.trials, report.failed) == (6, 1)
    assert "took longer than trial_limit_s, 0.5 s" in (tmp_path / "trials.jsonl").read_text()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_program_that_is_ended_or_never_ends_fails_its_trial_alone(tmp_path: Path) -> None:
    """Out of memory, a crash in its own code, an endless loop, children that it leaves behind."""
    children = tmp_path / "children"
    start = (
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(children)!r}, 'a').write(f'{{child.pid}} ')\n"
    )
    cases = (
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by signal 9 (Killed)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by signal 11 (Segmentation fault)"),
        ("time.sleep(600)", "was stopped after 2 s"),
        ("print('NaN')", None),
    )
    for code, message in cases:
        command = [sys.executable, "-c", start + code]
        term = Term("a", command=command, higher_is_better=True)
        made = CommandObjective([term], 2.0 if "sleep(" in code else 60.0)
        if message is None:
            assert np.isnan(made(tmp_path)["a"].value)
            continue
        with pytest.raises(RuntimeError) as caught:
            made(tmp_path)
        assert message in str(caught.value)
    time.sleep(0.05)
    for pid in map(int, children.read_text().split()):
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().split()[2] == "Z"
    assert len(children.read_text().split()) == len(cases)


# held-out data ------------------------------------------------------------------------------------


class Held:
    """Scores 400 examples of a merge: base, and a gain of 0.1 ± 0.5 per example for w = 1."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.base, self.gain = rng.normal(3, 2, 400), rng.normal(0.1, 0.5, 400)
        self.calls = 0

    def __call__(self, weights: dict[str, float]) -> dict[str, Score]:
        self.calls += 1
        return {"t": Score.of(self.base - weights["a"] * self.gain)}


def test_heldout_intervals_are_paired_and_kept(tmp_path: Path) -> None:
    subject = Held()
    chosen = {"base": ({"a": 0.0}, 0.0), "best": ({"a": 1.0}, -0.15)}
    rows = heldout_rows(subject, {"t": 1.0}, chosen, tmp_path)
    best = rows[1]
    se = subject.gain.std() / 400**0.5
    assert best.cost == pytest.approx(-subject.gain.mean(), abs=1e-6)
    assert best.low == pytest.approx(best.cost - 1.96 * se, abs=0.1 * se)
    assert best.high == pytest.approx(best.cost + 1.96 * se, abs=0.1 * se)
    assert best.gap == pytest.approx(best.cost + 0.15)
    assert (rows[0].cost, rows[0].low, rows[0].high) == (0.0, 0.0, 0.0)
    assert heldout_rows(subject, {"t": 1.0}, chosen, tmp_path) == rows
    assert subject.calls == 2


def test_heldout_data_that_was_searched_on_is_refused() -> None:
    with pytest.raises(RecipeError, match="measures just what 'dev' of the objective measures"):
        refuse_overlap({"dev": {"data": "x"}}, {"test": {"data": "x"}})
    refuse_overlap({"dev": {"data": "x"}}, {"test": {"data": "y"}})
    dev, test = Term("dev", corpus="./ja.txt", limit=9), Term("test", corpus="ja.txt")
    with pytest.raises(RecipeError, match="reads the same file as 'dev' of the objective"):
        refuse_same_source(config(objective=[dev], heldout=[test]))
    refuse_same_source(config(objective=[dev], heldout=[Term("test", corpus="ja.test.txt")]))


def test_a_share_is_held_out_by_construction() -> None:
    """Every example is searched or held out, never both; of texts the last ones are held out."""

    class Ten:
        def __init__(self) -> None:
            self.counts = {"t": 10}
            self.identity = {"t": {"data": "x"}}

        def __call__(self, merge: object, examples: dict[str, list[int]]) -> dict[str, Score]:
            return {"t": Score.of(np.array(examples["t"], float))}

    for spaced, expected in ((False, [7.0, 8.0, 9.0]), (True, [3.0, 6.0, 9.0])):
        searched, held = split(Ten(), 0.3, spaced=spaced)
        assert held(None)["t"].parts == expected
        assert sorted(searched(None)["t"].parts + expected) == list(map(float, range(10)))
        assert searched(None, {"t": [0, 6]})["t"].parts == [0.0, 8.0 if spaced else 6.0]
        assert (searched.counts, held.counts) == ({"t": 7}, {"t": 3})
        assert searched.identity != held.identity
    program = CommandObjective([Term("judge", command=["x"], higher_is_better=True)])
    with pytest.raises(RecipeError, match=r"term 'judge'.*cannot be asked for some"):
        split(program, 0.3, spaced=True)
    with pytest.raises(RecipeError, match="either heldout or heldout_share"):
        config(heldout_share=0.2, heldout=[Term("t", corpus="x")])


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


@pytest.fixture
def pool(write_checkpoint) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """A recipe over folders that exist."""
    base = random_tensors(0)
    folders = {"base": write_checkpoint("base", base)}
    for number, name in enumerate(("ja", "math"), start=1):
        folders[name] = write_checkpoint(name, nearby(base, number))
    sources = [{"name": n, "model": str(folders[n]), "weight": 0.4} for n in ("ja", "math")]
    return {"base": str(folders["base"]), "sources": sources}


def test_vllm_keeps_one_engine_that_becomes_each_merge(
    tmp_path: Path, pool: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers get every tensor of the merge, as it would be on disk; nothing is written."""
    from optimer_engine import merge

    started: list[dict[str, object]] = []
    resets: list[int] = []
    loaded: dict[str, object] = {}

    class Engine:
        def __init__(self, **settings: object) -> None:
            started.append(settings)
            module, _, name = str(settings["worker_extension_cls"]).rpartition(".")
            worker = type("Worker", (getattr(sys.modules[module], name),), {})()
            inner = SimpleNamespace(load_weights=loaded.update)
            worker.model_runner = SimpleNamespace(model=inner)
            self.model = SimpleNamespace(
                collective_rpc=lambda name, args: [getattr(worker, name)(*args)],
                reset_prefix_cache=lambda: resets.append(1),
            )

    module = ModuleType("lm_eval.models.vllm_causallms")
    module.VLLM = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    tasks = VllmTasks.__new__(VllmTasks)
    tasks._lm, tasks._base_folder = None, str(pool["base"])
    first = tasks._wrapped(pool)
    assert tasks._wrapped(pool) is first and len(started) == 1 and len(resets) == 2
    assert started[0]["trust_remote_code"] is False
    assert started[0]["pretrained"] == pool["base"]
    merge(pool, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], expected[n]) for n in expected)  # type: ignore[arg-type]


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    tasks = VllmTasks.__new__(VllmTasks)
    tasks._lm = None
    with pytest.raises(MissingExtraError, match="engine: vllm needs vLLM"):
        tasks._wrapped({})
