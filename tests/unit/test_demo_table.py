"""The demo's tables: verdicts follow the numbers, errors are paired, geometry matches NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from optimer_engine.demo.geometry import geometry
from optimer_engine.demo.table import MERGE, Row, Table, paired_difference
from optimer_engine.errors import MismatchError
from optimer_engine.search import Score

SIZES = [100.0, 80.0, 120.0, 90.0]


def row(name: str, level: float, weights: dict[str, float] | None = None) -> Row:
    scores = {
        domain: Score.of([level * size for size in SIZES], SIZES) for domain in ("ja", "math", "en")
    }
    return Row(name=name, tokens=10, scores=scores, weights=weights or {})


def table(merge: float, mixture: float) -> Table:
    return Table(
        title="A",
        domains=["ja", "math"],
        others=["en"],
        rows=[
            row("base", 2.0),
            row("only ja", 1.9, {"ja": 1.0}),
            row("only math", 1.8, {"math": 1.0}),
            row(MERGE, merge, {"ja": 0.5, "math": 0.5}),
            row("data mixture", mixture),
        ],
    )


def test_the_verdict_names_whichever_row_is_lowest() -> None:
    won = table(merge=1.5, mixture=1.6).verdict()
    assert won.startswith(f"Lowest mean: {MERGE}, 1.5")
    assert f"The {MERGE} is number 1 of 5" in won
    assert "0.1000 ± 0.0000 below data mixture" in won

    lost = table(merge=1.7, mixture=1.6).verdict()
    assert lost.startswith("Lowest mean: data mixture, 1.6")
    assert f"The {MERGE} is number 2 of 5" in lost
    assert "0.1000 ± 0.0000 above data mixture" in lost
    assert "only math" in lost and "only ja" not in lost  # the better single vector alone


def test_bold_marks_the_lowest_of_each_column() -> None:
    lines = table(merge=1.7, mixture=1.6).markdown().splitlines()
    assert lines[0] == "| A | tokens | ja | math | mean | (en) |"
    assert [line.split(" |")[0] for line in lines if "**" in line] == ["| data mixture"]
    assert lines[-1].count("**") == 2 * 4


def test_the_error_is_of_the_paired_difference() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(200, 50, size=400)  # bits that both models pay for hard text
    noise = rng.normal(1.0, 0.5, size=400)
    ones = np.ones(400)
    a = Row(name="a", tokens=0, scores={"x": Score.of(shared + noise, ones)})
    b = Row(name="b", tokens=0, scores={"x": Score.of(shared, ones)})
    difference, error = paired_difference(a, b, ["x"])
    assert difference == pytest.approx(noise.mean(), abs=1e-4)
    assert error == pytest.approx(noise.std(ddof=1) / 20, rel=1e-3)
    two = dict.fromkeys(("x", "y"), a.scores["x"]), dict.fromkeys(("x", "y"), b.scores["x"])
    rows = [Row(name=n, tokens=0, scores=s) for n, s in zip("ab", two, strict=True)]
    assert paired_difference(*rows, ["x", "y"])[1] == pytest.approx(error / 2**0.5)


def vector(folder, tensors: dict[str, np.ndarray]):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_geometry_is_that_of_the_concatenated_tensors(tmp_path) -> None:
    rng = np.random.default_rng(1)
    made = {
        name: {
            "a": rng.normal(size=(7, 5)).astype(np.float32),
            "b": rng.normal(size=11).astype(np.float32),
        }
        for name in ("base", "ja", "math")
    }
    folders = {name: vector(tmp_path / name, tensors) for name, tensors in made.items()}
    found = geometry(folders.pop("base"), folders)
    flat = {n: np.concatenate([t["a"].ravel(), t["b"]]).astype(float) for n, t in made.items()}
    norm = {n: np.linalg.norm(x) for n, x in flat.items()}
    assert found.names == ["ja", "math"]
    assert found.relative_norms == pytest.approx(
        [norm["ja"] / norm["base"], norm["math"] / norm["base"]]
    )
    cosine = flat["ja"] @ flat["math"] / norm["ja"] / norm["math"]
    assert np.array(found.cosines) == pytest.approx(np.array([[1, cosine], [cosine, 1]]))


def test_geometry_refuses_vectors_of_different_models(tmp_path) -> None:
    base = vector(tmp_path / "base", {"a": np.ones(3, np.float32)})
    other = vector(tmp_path / "other", {"a": np.ones(4, np.float32)})
    with pytest.raises(MismatchError, match=r"a: \(4,\), expected \(3,\)"):
        geometry(base, {"one": base, "two": other})
