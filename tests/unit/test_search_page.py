"""The report in a real browser, and the cosines it shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from optimer_engine.cli.report import command
from optimer_engine.search import Score, SearchConfig, Term, Vector, run_search
from optimer_engine.search.cosines import measured
from optimer_engine.search.page import write_page
from tests.conftest import nearby, random_tensors

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def two(w: dict[str, float]) -> dict[str, Score]:
    rng = np.random.default_rng(1)
    ja = 2.0 + (w["ja"] - 0.8) ** 2 + 0.3 * (w["math"] - 0.2) ** 2 + 0.01 * rng.normal(size=64)
    return {"ja": Score.of(ja), "en": Score(1.0 + 0.05 * (w["ja"] + w["math"]) ** 2)}


@pytest.fixture
def run(tmp_path: Path, write_checkpoint) -> Path:  # type: ignore[no-untyped-def]
    """A finished search over folders that exist, with two terms and a front."""
    base = random_tensors(0, torch.float32)
    folders = {"base": write_checkpoint("base", base)}
    for number, name in enumerate(("ja", "math", "code"), start=1):
        folders[name] = write_checkpoint(name, nearby(base, number))
    config = SearchConfig(
        base=str(folders["base"]),
        vectors=[Vector(name, str(folders[name])) for name in ("ja", "math", "code")],
        objective=[Term("ja"), Term("en")],
        trials=14,
    )
    from optimer_engine.planner import plan

    made = plan(
        {
            "base": config.base,
            "sources": [{"name": v.name, "model": v.model, "weight": 0} for v in config.vectors],
        }
    )
    prints = [s.fingerprint for s in made.sources if s is not None]
    run = tmp_path / "runs" / "all"
    run_search(config, run, evaluate=two)
    journal = run / "trials.jsonl"  # a search of functions knows no fingerprints
    head, *rest = journal.read_text().splitlines(keepends=True)
    line = json.loads(head)
    line["identity"]["base"] = made.base.fingerprint
    line["identity"]["vectors"] = dict(zip(("ja", "math", "code"), prints, strict=True))
    journal.write_text(json.dumps(line) + "\n" + "".join(rest))
    return run


def by_hand(run: Path) -> np.ndarray:
    from safetensors.torch import load_file

    root = run.parents[1]
    tensors = {n: load_file(root / n / "model.safetensors") for n in ("base", "ja", "math", "code")}
    flat = {n: torch.cat([x.double().flatten() for x in t.values()]) for n, t in tensors.items()}
    deltas = torch.stack([flat[n] - flat["base"] for n in ("ja", "math", "code")])
    unit = deltas / deltas.norm(dim=1, keepdim=True)
    return (unit @ unit.T).numpy()


def test_cosines_are_measured_once_and_shown(run: Path) -> None:
    done = CliRunner().invoke(command, [str(run)], catch_exceptions=False)
    assert done.exit_code == 0 and done.stderr == ""
    kept = json.loads((run / "cosines.json").read_text())
    assert kept["names"] == ["ja", "math", "code"]
    np.testing.assert_allclose(kept["values"], by_hand(run), atol=1e-5)
    text = (run / "report.html").read_text()
    assert "Cosines between the vectors" in text and f"{kept['values'][0][1]:.3f}" in text
    stamp = (run / "cosines.json").stat().st_mtime_ns
    assert measured(run) == "" and (run / "cosines.json").stat().st_mtime_ns == stamp
    shutil.rmtree(run.parents[1] / "ja")
    (run / "cosines.json").unlink()
    done = CliRunner().invoke(command, [str(run)], catch_exceptions=False)
    assert done.exit_code == 0 and "no cosines of the vectors" in done.stderr
    assert "Cosines between" not in (run / "report.html").read_text()


def test_a_search_that_goes_on_is_not_shown_as_ended(run: Path) -> None:
    report = json.loads((run / "search_report.json").read_text())
    assert report["ended"] in write_page(run).read_text()
    journal = (run / "trials.jsonl").read_text().splitlines(keepends=True)
    (run / "trials.jsonl").write_text("".join(journal[:-2]))
    assert "still running" in write_page(run).read_text()


class Tables(HTMLParser):
    """Cells of every table, by the heading before it, as the browser has them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._heading = self._open = self._text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.found.setdefault(self._heading, []).append([])
        if tag in ("h2", "td", "th"):
            self._open, self._text = tag, ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self._heading = self._text
        if tag in ("td", "th"):
            self.found[self._heading][-1].append(self._text)


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    profile = page.parent / "profile"
    fixed = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    log = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [str(BROWSER), *fixed, *log, *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    shutil.rmtree(profile, ignore_errors=True)
    return done


@needs_browser
def test_a_browser_shows_the_numbers_of_the_run_and_complains_of_nothing(run: Path) -> None:
    assert measured(run) == ""
    page = write_page(run)
    done = browse(page, "--dump-dom")
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    tables = Tables()
    tables.feed(done.stdout)
    report = json.loads((run / "search_report.json").read_text())
    known = tables.found["Known points and the best"]
    assert known[0] == ["", "w ja", "w math", "w code", "ja", "en", "cost"]
    assert [row[0] for row in known[1:]] == [row["name"] for row in report["table"]]
    for cells, row in zip(known[1:], report["table"], strict=True):
        assert cells[1:4] == [f"{w:.3f}" for w in row["weights"].values()]
        assert cells[4:6] == [f"{row['scores'][t]:.4f}" for t in ("ja", "en")]
        assert cells[6].startswith(f"{row['cost']:+.4f}")
    trials = tables.found["All merges tried"]
    lines = [json.loads(x) for x in (run / "trials.jsonl").read_text().splitlines()]
    tried = [x for x in lines if x["event"] == "told" and not x["origin"].startswith("confirm")]
    assert len(trials) == 1 + len(tried)
    for cells, told in zip(trials[1:], tried, strict=True):
        assert cells[:2] == [str(told["number"]), told["origin"]]
        assert cells[2:5] == [f"{w:.3f}" for w in told["weights"].values()]
    spent = {row[0]: row[1] for row in tables.found["Where the time went"][1:]}
    assert spent == {k: f"{s:.1f}" for k, s in report["seconds"].items()}
    assert len(tables.found["Best compromises"]) > 1
    assert len(re.findall(r"<svg", done.stdout)) >= 2 + 3 + 3 + 1 + 1


@needs_browser
def test_the_page_is_light_or_dark_as_the_browser_is(run: Path) -> None:
    from PIL import Image

    page = write_page(run)
    for flags, light in (((), True), (("--force-dark-mode",), False)):
        picture = run / "page.png"
        done = browse(page, *flags, f"--screenshot={picture}", "--window-size=900,1200")
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        pixels = np.asarray(Image.open(picture).convert("L"), dtype=float)
        assert (np.median(pixels) > 200) == light
        assert pixels.std() > 5


def test_a_watched_page_loads_itself_again_until_the_watching_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimer_engine.cli import report

    reloads = []

    def tick(seconds: float) -> None:
        reloads.append("refresh" in (run / "report.html").read_text())
        if len(reloads) == 2:
            raise SystemExit(130)  # as the program's signals do

    monkeypatch.setattr(report.time, "sleep", tick)
    with pytest.raises(SystemExit):
        report.command.main([str(run), "--watch"], standalone_mode=False)
    assert reloads == [True, True]
    assert "refresh" not in (run / "report.html").read_text()
