"""`optimer demo` in its short form: every stage of the loop, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from optimer_engine.cli import optimer


def demo(out: Path, *options: str):
    result = CliRunner().invoke(
        optimer, ["demo", "--scale", "short", "-o", str(out), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, json.loads(demo(out, "--json").stdout)


def test_every_row_of_both_tables_is_there(finished) -> None:
    _, report = finished
    names = [[row["name"] for row in table["rows"]] for table in report["tables"]]
    assert names[0] == [
        "base", "only ja", "only zh", "only code", "only math", "uniform average", "searched merge",
        "data mixture, T", "data mixture, 4T", "data mixture, 4T, searched ratios",
    ]  # fmt: skip
    assert names[1] == [
        "base", "only ja", "only math", "uniform average", "merge searched for A",
        "searched merge", "data mixture of the 2, 2T", "data mixture, 4T (of A)",
    ]  # fmt: skip
    for table in report["tables"]:
        best = min(table["rows"], key=lambda row: row["mean"])
        assert table["verdict"].startswith(f"Lowest mean: {best['name']}, {best['mean']:.4f}")


def test_equal_tokens_are_equal(finished) -> None:
    _, report = finished
    tokens = {row["name"]: row["tokens"] for row in report["tables"][0]["rows"]}
    assert tokens["base"] == 0
    assert tokens["only ja"] == tokens["data mixture, T"] == report["settings"]["tokens"]
    assert tokens["searched merge"] == tokens["data mixture, 4T"] == 4 * tokens["only ja"]


def test_every_model_was_scored_on_its_own(finished) -> None:
    _, report = finished
    means = [row["mean"] for row in report["tables"][0]["rows"]]
    assert all(0.5 < mean < 4.0 for mean in means)  # trained models, in bits per byte
    trained = set(means) - {means[0]}
    assert len(trained) >= 7  # of nine: the search may settle on a known point, or on the base


def test_the_second_search_reuses_the_trials_of_the_first(finished) -> None:
    out, report = finished
    first, second = report["winners"].values()
    assert first["reused"] == 0
    assert second["reused"] == first["trials"] == report["settings"]["trials"]
    assert second["trials"] == report["settings"]["more_trials"]
    for winner in (first, second):
        assert winner["sum"] == pytest.approx(sum(winner["weights"].values()))
        assert sum(winner["ratios"].values()) == pytest.approx(1.0)
    assert (out / "search-all" / "best" / "model.safetensors").is_file()


def test_vectors_are_short_and_not_parallel(finished) -> None:
    _, report = finished
    assert all(0.001 < norm < 0.2 for norm in report["geometry"]["relative_norms"])
    cosines = report["geometry"]["cosines"]
    for i, row in enumerate(cosines):
        assert row[i] == pytest.approx(1.0)
        assert all(abs(x) < 0.8 for j, x in enumerate(row) if j != i)


def test_a_second_call_reads_what_is_there(finished) -> None:
    out, report = finished
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = demo(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == trained
    assert again.stdout.startswith("# optimer demo (short)")
    assert (out / "demo.md").read_text(encoding="utf-8").strip() == again.stdout.strip()
    assert json.loads((out / "demo.json").read_text(encoding="utf-8")) == report
