"""The demo's result: two tables, the searched weights, the vectors' geometry, and the times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from optimer_engine.demo.assets import DOMAINS, RETAINED
from optimer_engine.demo.geometry import Geometry
from optimer_engine.demo.table import MERGE, Row, Table
from optimer_engine.search import Score, SearchReport
from optimer_engine.train import TrainReport


class Winner(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found.

    Attributes:
        weights: by vector, and their `sum`.
        ratios: the data mixture that the weights are read as.
        trials, reused: made, and taken from the earlier search.
        seconds: in the trials made.
    """

    weights: dict[str, float]
    sum: float
    ratios: dict[str, float]
    trials: int
    reused: int
    seconds: float

    @classmethod
    def of(cls, report: SearchReport) -> Winner:
        """From the report of a search."""
        return cls(
            weights=report.best_weights,
            sum=report.sum_of_weights,
            ratios=report.ratios,
            trials=report.trials,
            reused=report.reused,
            seconds=sum(report.seconds.values()),
        )


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that the demo found; `demo.json` holds it.

    Attributes:
        scale: name of the settings.
        settings: tokens per vector, learning rate, trials and so on.
        tables: objective A (all domains) and objective B (two of them).
        geometry: of the vectors.
        winners: what the search of each objective found.
        seconds: of each kind of work, from the reports of the runs.
        notes: what the reader must know to read the tables.
    """

    scale: str
    settings: dict[str, int | float | str]
    tables: list[Table]
    geometry: Geometry
    winners: dict[str, Winner]
    seconds: dict[str, float]
    notes: list[str]

    def markdown(self) -> str:
        """The whole report as it is printed."""
        parts = [f"# optimer demo ({self.scale})"]
        for table in self.tables:
            parts += [table.markdown(), table.verdict()]
        parts += [self._winners(), self._vectors(), self._times()]
        parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with each table's means and verdict, and scores without their parts."""
        data: dict[str, Any] = msgspec.to_builtins(self)
        for table, plain in zip(self.tables, data["tables"], strict=True):
            plain["verdict"] = table.verdict()
            for row, plain_row in zip(table.rows, plain["rows"], strict=True):
                plain_row["mean"] = table.mean(row)
                plain_row["scores"] = {d: s.value for d, s in row.scores.items()}
        return data

    def _winners(self) -> str:
        names = self.geometry.names
        lines = [
            "| searched weights | " + " | ".join(names) + " | Σ weights | trials new + reused |",
            "|---|" + "---:|" * (len(names) + 2),
        ]
        for objective, winner in self.winners.items():
            cells = [f"{winner.weights[name]:.3f}" for name in names]
            lines.append(
                f"| {objective} | " + " | ".join(cells) + f" | {winner.sum:.3f}"
                f" | {winner.trials} + {winner.reused} |"
            )
        return "\n".join(lines)

    def _vectors(self) -> str:
        g = self.geometry
        lines = [
            "| vector | norm / base | " + " | ".join(f"cos {n}" for n in g.names) + " |",
            "|---|---:|" + "---:|" * len(g.names),
        ]
        for name, norm, row in zip(g.names, g.relative_norms, g.cosines, strict=True):
            cells = [f"{x:.3f}" for x in row]
            lines.append(f"| {name} | {norm:.1%} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _times(self) -> str:
        lines = ["| seconds | |", "|---|---:|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in self.seconds.items()]
        return "\n".join(lines)


def make_tables(
    scores: Mapping[str, dict[str, Score]],
    winners: tuple[Winner, Winner],
    pair: tuple[str, ...],
    tokens: int,
) -> list[Table]:
    """Objective A (all domains) and objective B (`pair`).

    Args:
        scores: by model, as `Loop.test_scores` names them.
        winners: of A and of B.
        pair: the domains of B.
        tokens: T, trained on for each vector.
    """
    n, p, t = len(DOMAINS), len(pair), tokens

    def row(name: str, key: str, tokens: int, weights: dict[str, float] | None = None) -> Row:
        return Row(name=name, tokens=tokens, scores=scores[key], weights=weights or {})

    singles = {d: row(f"only {d}", f"only {d}", t, {d: 1.0}) for d in DOMAINS}
    base = row("base", "base", 0)
    mixture = f"data mixture, {n}T"
    best_all, best_pair = (winner.weights for winner in winners)
    return [
        Table(
            title="A: all domains",
            domains=list(DOMAINS),
            others=[RETAINED],
            rows=[
                base,
                *singles.values(),
                row("uniform average", "uniform", n * t, dict.fromkeys(DOMAINS, 1 / n)),
                row(MERGE, "search-all", n * t, best_all),
                row("data mixture, T", "mixture-uniform-T", t),
                row(mixture, "mixture-uniform", n * t),
                row(f"data mixture, {n}T, searched ratios", "mixture-searched", n * t),
            ],
        ),
        Table(
            title="B: " + " + ".join(pair),
            domains=list(pair),
            others=[RETAINED],
            rows=[
                base,
                *(singles[d] for d in pair),
                row("uniform average", "uniform pair", p * t, dict.fromkeys(pair, 1 / p)),
                row("merge searched for A", "search-all", n * t, best_all),
                row(MERGE, "search-pair", n * t, best_pair),
                row(f"data mixture of the {p}, {p}T", "mixture-pair", p * t),
                row(f"{mixture} (of A)", "mixture-uniform", n * t),
            ],
        ),
    ]


def make_notes(search: SearchReport, mixed: TrainReport, tokens: int) -> list[str]:
    """How to read the tables: `search` of objective A, the mixture of all `mixed`."""
    search_s = sum(search.seconds.values())
    ratios = ", ".join(f"{d} {r:.2f}" for d, r in search.ratios.items())
    return [
        "Bits per byte on test text, lower is better; the searches saw dev text only."
        f" ({RETAINED}) is outside the mean: it shows what is forgotten.",
        f"T = {tokens:,} tokens; a merge counts the tokens of all vectors it could use."
        " ± is one standard error over test blocks, paired.",
        f"Searched ratios: {ratios} ({search.ratios_note}).",
        f"Search A took {search_s:.0f} s, one mixture run {mixed.seconds:.0f} s"
        f" ({mixed.seconds / search_s:.1f} times as long). A mixture answers one objective:"
        " another objective costs the merge a few trials, and the mixture another run.",
        "A model of 2.6M parameters says nothing about how a 27B one behaves.",
    ]
