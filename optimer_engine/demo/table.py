"""A table of models: as data, as Markdown, and as a sentence that the numbers write themselves.

Every number is bits per byte on text that nothing was tuned on; lower is better. A verdict names
the row with the lowest mean whatever it is, and says how far the searched merge lies from each
rival, with the standard error of that difference. Errors are of *paired* differences: two models
are compared block by block on the same text, which takes out the large part of the noise that both
share. They cover the choice of test text, not the seeds of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from optimer_engine.search import Score

MERGE = "searched merge"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One model in a table.

    Attributes:
        name: what it is.
        tokens: CPT tokens that went into it, all vectors of a merge counted.
        weights: of the vectors, for a merge.
        scores: bits per byte by domain, with the parts that give errors; `retained` included.
    """

    name: str
    tokens: int
    scores: dict[str, Score]
    weights: dict[str, float] = {}


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows on one objective.

    Attributes:
        title: of the table.
        domains: those the mean is over; the objective of the search.
        others: further columns, outside the mean.
        rows: in reading order; the first is the base.
    """

    title: str
    domains: list[str]
    others: list[str]
    rows: list[Row]

    def mean(self, row: Row) -> float:
        """Mean bits per byte over the table's domains."""
        return sum(row.scores[d].value for d in self.domains) / len(self.domains)

    def markdown(self) -> str:
        """The table, the lowest value of each column in bold."""
        columns = [*self.domains, "mean", *(f"({d})" for d in self.others)]
        values = [
            [row.scores[d].value for d in self.domains]
            + [self.mean(row)]
            + [row.scores[d].value for d in self.others]
            for row in self.rows
        ]
        lowest = [min(column) for column in zip(*values, strict=True)]
        lines = [
            f"| {self.title} | tokens | " + " | ".join(columns) + " |",
            "|---|---:|" + "---:|" * len(columns),
        ]
        for row, numbers in zip(self.rows, values, strict=True):
            cells = [
                f"**{x:.4f}**" if x == low else f"{x:.4f}"
                for x, low in zip(numbers, lowest, strict=True)
            ]
            lines.append(f"| {row.name} | {row.tokens:,} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def verdict(self) -> str:
        """Which row wins, and how far the searched merge is from each kind of rival."""
        ranked = sorted(self.rows, key=self.mean)
        merge = next(row for row in self.rows if row.name == MERGE)
        singles = [row for row in ranked if len(row.weights) == 1]
        rivals = [row for row in self.rows if row is not merge and row not in singles[1:]]
        place = f"number {1 + ranked.index(merge)} of {len(ranked)}"
        parts = [self._compared(merge, row) for row in rivals]
        return (
            f"Lowest mean: {ranked[0].name}, {self.mean(ranked[0]):.4f} bits per byte. "
            f"The {MERGE} is {place} with {self.mean(merge):.4f}: "
            + ", ".join(parts[:-1])
            + f" and {parts[-1]}."
        )

    def _compared(self, merge: Row, rival: Row) -> str:
        difference, error = paired_difference(merge, rival, self.domains)
        word = "below" if difference < 0 else "above"
        return f"{abs(difference):.4f} ± {error:.4f} {word} {rival.name}"


def paired_difference(one: Row, other: Row, domains: Sequence[str]) -> tuple[float, float]:
    """Mean over domains of (one - other) in bits per byte, and its standard error over blocks.

    Each domain is a ratio Σ bits / Σ bytes over blocks that both rows were scored on; the error is
    that of a sum of independent per-block differences, the domains taken as independent.
    """
    differences, variance = [], 0.0
    for domain in domains:
        a, b = one.scores[domain], other.scores[domain]
        bits = np.asarray(a.parts) - np.asarray(b.parts)
        sizes = np.asarray(a.sizes) if a.sizes else np.ones(len(bits))
        difference = a.value - b.value
        residual = bits - difference * sizes
        differences.append(difference)
        variance += float(np.square(residual).sum()) * _small(len(bits)) / float(sizes.sum()) ** 2
    return sum(differences) / len(domains), math.sqrt(variance) / len(domains)


def _small(count: int) -> float:
    return count / (count - 1) if count > 1 else 1.0
