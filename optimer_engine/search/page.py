"""A run as one HTML page: no script, no network, nothing beside the file.

It is made from ``trials.jsonl`` alone, so it shows a search that is still running as well as one
that is over; what only the end knows (why it ended, held-out scores) comes from
``search_report.json`` once that is there.
"""

from __future__ import annotations

import json
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from optimer_engine.durable import replace_file
from optimer_engine.search import cosines
from optimer_engine.search.charts import Chart, matrix
from optimer_engine.search.cost import Goal, estimated, front, is_whole, reference_of
from optimer_engine.search.landscape import Landscape
from optimer_engine.search.proposals import without_confirmations
from optimer_engine.search.report import RATIOS_NOTE, examples_scored, sensitivity
from optimer_engine.search.space import Space
from optimer_engine.search.trials import Told, read

GRID = 24
MOST_SLICES = 6

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--faint:#8a929c;--line:#d9dde2;
--mark:#1463c2;--best:#c2410c}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--paper:#14171b;--faint:#8a929c;
--line:#333a43;--mark:#6fb1ff;--best:#ff9a5c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:68rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.2rem;font-size:1.15rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.best td{font-weight:600;color:var(--best)}
svg{width:100%;height:auto}svg text{font-size:10px;fill:var(--faint)}
.axis{fill:none;stroke:var(--faint)}.line{fill:none;stroke:var(--mark);stroke-width:1.5}
.dot,.best-dot{stroke:var(--paper)}.dot{fill:var(--mark)}.part{fill:none;stroke:var(--faint)}.best-dot{fill:var(--best)}
.heat{fill:color-mix(in srgb,var(--mark) var(--strong),var(--paper))}
.against{fill:color-mix(in srgb,var(--best) var(--strong),var(--paper))}
svg text.ink{fill:var(--ink)}
p.note{color:var(--faint)}pre{overflow-x:auto}
"""


def write_page(run: str | Path, *, refresh_s: int | None = None) -> Path:
    """Write ``run/report.html`` and return its path.

    Args:
        run: the folder of a search.
        refresh_s: let a browser load the page again so often.

    Raises:
        RecipeError: there is no journal in ``run``, or it is damaged, or holds no trial.
    """
    run = Path(run)
    head, told = read(run / "trials.jsonl")
    found = run / "search_report.json"
    ended = json.loads(found.read_text("utf-8")) if found.exists() else {}
    if ended and ended["trials"] + ended["reused"] != len(without_confirmations(told)):
        ended = {}  # it goes on
    recipe = run / "best.yaml"
    between = cosines.kept(run, head.identity)
    page = _page(run.name, head.identity, told, ended, between, refresh_s)
    if ended and recipe.exists():
        text = escape(recipe.read_text("utf-8"))
        page += f"<h2>Recipe of the best</h2><pre>{text}</pre>"
    out = run / "report.html"
    replace_file(out, (page + "</body></html>\n").encode())
    return out


def _page(
    name: str, identity: dict[str, Any], told: list[Told], ended: dict[str, Any],
    between: cosines.Cosines | None, refresh_s: int | None,
) -> str:  # fmt: skip
    space = Space.described(identity)
    protocol = identity.get("protocol", {})
    goal = Goal(
        identity["weights"], protocol.get("max_loss", {}),
        protocol.get("aggregate", "mean"), protocol.get("relative", False),
    )  # fmt: skip
    again = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    top = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Search {escape(name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Search {escape(name)}</h1>"
    )
    if not any(t.status == "ok" for t in told):
        return top + f"<p>{len(told)} trials, none of them succeeded yet.</p>"
    land = Landscape(space, told, goal)
    if ended:  # the paper's method has a rule of its own
        numbers = [p.number for p in land.points]
        land.best = numbers.index(ended["best_number"])
    assert land.best is not None
    state = escape(ended["ended"]) if ended else "still running, or interrupted"
    parts = [
        top,
        f"<p>{len(land.points)} merges tried, {examples_scored(told):,} examples scored; {state}."
        f" Cost 0 is the reference, below it is better. Recommended: trial"
        f" {land.points[land.best].number}, cost {land.mean[land.best]:+.4f} ±"
        f" {land.variance[land.best] ** 0.5:.4f} by the surrogate.</p>",
        f"<h2>Known points and the best</h2>{_baselines(space, land, goal)}",
        _heldout(ended),
        f'<h2>Convergence</h2><div class="charts">{_convergence(land, told)}</div>',
        f'<h2>Weights against cost</h2><div class="charts">{_weights(space, land)}</div>',
        _slices(space, land),
        _front(land) if len(land.observed.names) > 1 else "",
        _cosines(between),
        f"<h2>Where the time went</h2>{_seconds(told)}",
        f"<h2>All merges tried</h2>{_trials(space, land, told)}",
    ]
    return "".join(parts)


def _table(head: list[str], rows: list[list[str]], best: int | None = None) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr{" class=best" if i == best else ""}>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )  # fmt: skip
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'


def _row(label: str, space: Space, land: Landscape, i: int) -> list[str]:
    point, reference = land.points[i], reference_of(land.points)
    assert reference is not None
    names = land.observed.names
    scores = [f"{estimated(point, reference, n):.4f}" if n in point.scores else "–" for n in names]
    cost = f"{land.observed.costs[i]:+.4f} ± {land.observed.variances[i] ** 0.5:.4f}"
    return [label, *(f"{point.weights[n]:.3f}" for n in space.names), *scores, cost]


def _baselines(space: Space, land: Landscape, goal: Goal) -> str:
    head = ["", *(f"w {n}" for n in space.names), *land.observed.names, "cost"]
    rows = [
        _row(label, space, land, i)
        for label, weights in space.known_points().items()
        for i, p in enumerate(land.points)
        if p.weights == weights and p.scores
    ]
    assert land.best is not None
    rows.append(_row("best", space, land, land.best))
    weights = land.points[land.best].weights
    positive = {n: max(w, 0.0) for n, w in space.by_vector(weights).items()}
    total = sum(positive.values()) or 1.0
    ratios = ", ".join(f"{n} {w / total:.1%}" for n, w in positive.items())
    limits = "".join(f" {escape(n)} may lose {m:.1%}." for n, m in goal.limits.items())
    rises = ", ".join(f"{n} {rise:.4f}" for n, rise in sensitivity(land, land.best).items())
    note = (
        f"As ratios: {escape(ratios)} ({RATIOS_NOTE}).{limits} When one weight of the best moves by"
        f" 0.1, the cost rises by, by the surrogate: {escape(rises)}."
    )
    return _table(head, rows, len(rows) - 1) + f'<p class="note">{note}</p>'


def _heldout(ended: dict[str, Any]) -> str:
    rows = ended.get("heldout") or []
    if not rows:
        return ""
    terms = list(rows[0]["scores"])
    cells = [
        [
            r["name"], *(f"{r['scores'][t]:.4f}" for t in terms), f"{r['cost']:+.4f}",
            "–" if r["low"] is None else f"{r['low']:+.4f} to {r['high']:+.4f}",
            f"{r['gap']:+.4f}",
        ]
        for r in rows
    ]  # fmt: skip
    head = ["", *terms, "cost, held out", "95 % interval", "worse than searched by"]
    return f"<h2>Held-out data</h2>{_table(head, cells, len(cells) - 1)}"


def _convergence(land: Landscape, told: list[Told]) -> str:
    """Best cost among merges scored on all examples, by examples and by hours."""
    cost = {tuple(p.weights.values()): i for i, p in enumerate(land.points)}
    examples, hours, best = [], [], []
    spent_examples, spent_s, least = 0, 0.0, np.inf
    for trial in told:
        spent_examples += examples_scored([trial])
        spent_s += trial.ask_s + trial.merge_s + trial.evaluate_s
        i = cost[tuple(trial.weights.values())]
        if trial.status == "ok" and is_whole(land.points[i]):
            least = min(least, float(land.observed.costs[i]))
        if np.isfinite(least):
            examples.append(float(spent_examples))
            hours.append(spent_s / 3600)
            best.append(least)
    charts = []
    for x, label in ((examples, "examples scored"), (hours, "hours")):
        if x:
            chart = Chart(x, best, label, "best cost so far")
            chart.steps(x, best)
            charts.append(chart.svg())
    return "".join(charts)


def _dots(chart: Chart, land: Landscape, x: np.ndarray, y: np.ndarray) -> None:
    for kind, chosen in (
        ("part", [i for i, p in enumerate(land.points) if p.scores and not is_whole(p)]),
        ("dot", [i for i, p in enumerate(land.points) if is_whole(p)]),
        ("best-dot", [i for i in [land.best] if i is not None]),
    ):
        titles = [
            f"trial {land.points[i].number}: cost {land.observed.costs[i]:+.4f}" for i in chosen
        ]
        chart.dots(x[chosen].tolist(), y[chosen].tolist(), titles, kind)


def _weights(space: Space, land: Landscape) -> str:
    weights = np.array([list(p.weights.values()) for p in land.points])
    cost = land.observed.costs
    # far outliers would flatten the rest
    shown = np.minimum(cost, np.median(cost) + 3 * (np.median(cost) - cost.min()))
    charts = []
    for j, name in enumerate(space.names):
        chart = Chart([space.low[j], space.high[j]], shown.tolist(), f"weight of {name}", "cost")
        _dots(chart, land, weights[:, j], shown)
        charts.append(chart.svg())
    return "".join(charts)


def _slices(space: Space, land: Landscape) -> str:
    """The surrogate through the best point, over pairs of weights."""
    assert land.best is not None
    rises = list(sensitivity(land, land.best).values())
    pairs = sorted(combinations(range(len(rises)), 2), key=lambda p: -rises[p[0]] - rises[p[1]])
    left_out = max(0, len(pairs) - MOST_SLICES)
    weights = np.array([list(p.weights.values()) for p in land.points])
    steps = (np.arange(GRID) + 0.5) / GRID
    charts = []
    for a, b in pairs[:MOST_SLICES]:
        grid = np.repeat(land.unit[land.best][None], GRID * GRID, axis=0)
        grid[:, a], grid[:, b] = np.tile(steps, GRID), np.repeat(steps, GRID)
        mean, _ = land.model.predict(grid)
        x, y = ([float(space.low[j]), float(space.high[j])] for j in (a, b))
        chart = Chart(x, y, f"weight of {space.names[a]}", f"weight of {space.names[b]}")
        chart.heat(mean.reshape(GRID, GRID))
        _dots(chart, land, weights[:, a], weights[:, b])
        charts.append(chart.svg())
    note = "Strong colour is low cost; the other weights are those of the best point."
    if left_out:
        note += f" The {MOST_SLICES} pairs along which the cost changes most; {left_out} left out."
    return (
        f'<h2>The landscape through the best point</h2><p class="note">{note}</p>'
        f'<div class="charts">{"".join(charts)}</div>'
    ) if charts else ""  # fmt: skip


def _cosines(found: cosines.Cosines | None) -> str:
    if found is None:
        return ""
    note = "Near 0, two vectors can be weighed one by one; near 1, they share one weight."
    return (
        f'<h2>Cosines between the vectors</h2><p class="note">{note}</p>'
        f"{matrix(found.names, found.values)}"
    )


def _front(land: Landscape) -> str:
    terms, names = land.observed.terms, land.observed.names
    best = front(land.observed, [i for i, p in enumerate(land.points) if is_whole(p)])
    if not best:
        return ""
    rows = [
        [f"trial {land.points[i].number}", *(f"{d:+.4f}" for d in terms[i])]
        for i in sorted(best, key=lambda i: terms[i][0])
    ]
    titles = [f"trial {land.points[i].number}" for i in best]
    charts = []
    for a, b in list(combinations(range(len(names)), 2))[:MOST_SLICES] if len(best) > 1 else []:
        x, y = terms[best, a].tolist(), terms[best, b].tolist()
        chart = Chart(x, y, f"{names[a]}: loss", f"{names[b]}: loss")
        chart.dots(x, y, titles)
        charts.append(chart.svg())
    note = "Differences to the base, lower is better; no point beats another in every term."
    return (
        f'<h2>Best compromises</h2><p class="note">{note}</p>'
        f'<div class="charts">{"".join(charts)}</div>' + _table(["", *names], rows)
    )


def _seconds(told: list[Told]) -> str:
    spent = {
        "merge": sum(t.merge_s for t in told), "evaluate": sum(t.evaluate_s for t in told),
        "ask": sum(t.ask_s for t in told),
    }  # fmt: skip
    total = sum(spent.values()) or 1.0
    rows = [[name, f"{s:.1f}", f"{s / total:.0%}"] for name, s in spent.items()]
    return _table(["", "seconds", "share"], rows)


def _trials(space: Space, land: Landscape, told: list[Told]) -> str:
    head = ["trial", "from", *(f"w {n}" for n in space.names), *land.observed.names, "cost"]
    status = {t.number: t.status for t in told}
    rows = []
    for i, point in enumerate(land.points):
        row = _row(str(point.number), space, land, i)
        if not point.scores:
            row[-1] = status[point.number]
        rows.append([row[0], point.origin, *row[1:]])
    return _table(head, rows, land.best)
